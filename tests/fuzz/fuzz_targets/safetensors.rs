//! The weights of a model folder. The body is in `src/safetensors.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dsv3_fuzz::safetensors(bytes));
