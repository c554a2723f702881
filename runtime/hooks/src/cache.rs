//! Compiled code on disk, by digest of the component and of everything that changes its compilation.
//!
//! File layout: 32 bytes BLAKE3 of the rest, then `Component::serialize`'s bytes. A file that does not match its digest
//! (torn write, bit rot) is ignored and written anew. The cache folder must be writable only by the user who runs the
//! pipeline, since compiled code is trusted.

use std::{
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
};

use dsv3_core::Digest;
use wasmtime::{Engine, component::Component};

/// Compiles `wasm`, or loads what an earlier process compiled.
pub(crate) fn component(engine: &Engine, wasm: &[u8], dir: Option<&Path>) -> wasmtime::Result<Component> {
    let Some(dir) = dir else { return Component::new(engine, wasm) };
    let path = entry_path(engine, wasm, dir);
    if let Some(component) = load(engine, &path) {
        return Ok(component);
    }
    let component = Component::new(engine, wasm)?;
    if let Err(error) = component.serialize().and_then(|code| Ok(store(&path, &code)?)) {
        tracing::warn!(path = %path.display(), %error, "compiled hook was not cached");
    }
    Ok(component)
}

fn entry_path(engine: &Engine, wasm: &[u8], dir: &Path) -> PathBuf {
    let mut hasher = FixedHasher(0xCBF2_9CE4_8422_2325);
    engine.precompile_compatibility_hash().hash(&mut hasher);
    dir.join(format!("{}-{:016x}.cwasm", Digest::of(wasm), hasher.finish()))
}

fn load(engine: &Engine, path: &Path) -> Option<Component> {
    let bytes = std::fs::read(path).ok()?;
    let (digest, code) = bytes.split_at_checked(32)?;
    if Digest::of(code).as_bytes() != digest {
        return None;
    }
    // SAFETY: the bytes are what `Component::serialize` wrote for this engine's settings (both are in the file name) and
    // their digest matches; the folder belongs to the user who runs the pipeline.
    #[allow(unsafe_code)]
    unsafe {
        Component::deserialize(engine, code).ok()
    }
}

fn store(path: &Path, code: &[u8]) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let mut bytes = Digest::of(code).as_bytes().to_vec();
    bytes.extend_from_slice(code);
    let scratch = path.with_extension(format!("tmp{}", std::process::id()));
    std::fs::write(&scratch, bytes)?;
    std::fs::rename(&scratch, path)
}

/// FNV-1a: a hasher whose result is the same in every process.
struct FixedHasher(u64);

impl Hasher for FixedHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
    }
}
