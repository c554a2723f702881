//! Bodies of requests to the server. The body is in `src/http.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dsv3_fuzz::http(bytes));
