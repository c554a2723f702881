//! Records of a store: manifests, results, checkpoints, statuses, events, plans. The body is in `src/manifest.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dsv3_fuzz::manifest(bytes));
