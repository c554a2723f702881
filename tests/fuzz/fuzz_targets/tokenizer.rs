//! `tokenizer.json` and `tokenizer_config.json`, and what is encoded with them. The body is in `src/tokenizer.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dsv3_fuzz::tokenizer(bytes));
