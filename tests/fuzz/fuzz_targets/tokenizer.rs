//! `tokenizer.json` and `tokenizer_config.json`, and what is encoded with them. The body is in `src/tokenizer.rs`.

#![no_main]

// A panic that is caught on the way (the library's, turned into an error) is no finding; one that arrives here is.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| ())), |bytes: &[u8]| dsv3_fuzz::tokenizer(bytes));
