#!/usr/bin/env bash
# Builds the example hooks to components: ./build.sh [OUT_DIR] (default: beside this file).
#
# With a rustup toolchain that has the wasm32-unknown-unknown target this is an ordinary cargo build. Without it, Debian's
# rustc-web and rust-web-src packages give a compiler and a standard library of one version.
set -euo pipefail
cd "$(dirname "$0")"
out=$(mkdir -p "${1:-.}" && cd "${1:-.}" && pwd)
tools="$(rustc --print sysroot)/lib/rustlib/$(rustc -vV | sed -n 's/^host: //p')/bin"
export CARGO_TARGET_DIR=${HOOKS_TARGET_DIR:-$PWD/target}
export PATH="$tools/gcc-ld:$PATH" CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER="$tools/wasm-component-ld"
# Panic messages hold source paths: rename the folders of this machine and of the registry.
flags="-Ctarget-feature=+simd128 --remap-path-prefix=$PWD=hooks --remap-path-prefix=/usr/lib/rustlib/src/rust=rust"
cargo fetch --locked
for registry in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do flags+=" --remap-path-prefix=$registry=crates"; done
export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS="$flags"
extra=()
if [ ! -d "$(rustc --print sysroot)/lib/rustlib/wasm32-unknown-unknown" ]; then
  [ -x /usr/bin/rustc ] || { echo "no wasm32-unknown-unknown target: rustup target add it, or install rustc-web and rust-web-src" >&2; exit 69; }
  export RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1
  extra=(-Zbuild-std=std,panic_abort)
fi
cargo build --release --locked --target wasm32-unknown-unknown "${extra[@]}"
for hook in quality answer; do cp "$CARGO_TARGET_DIR/wasm32-unknown-unknown/release/$hook.wasm" "$out/$hook.wasm"; done
