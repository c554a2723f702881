//! Pipeline files: read, checked and planned. The body is in `src/yaml.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dsv3_fuzz::yaml(bytes));
