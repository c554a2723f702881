//! A `tokenizer.json`, and behind the first zero byte a `tokenizer_config.json`: read, and used where they can be.

use dsv3_data::{Incremental, Tokenizer};

const TEXT: &str = "A text of 12 words\n\n\twith é, 日本 and \u{1F600}: <think> don't</think>   <s>";

/// Reads the bytes as the files of a tokenizer.
pub fn tokenizer(bytes: &[u8]) {
    let (json, config) = match bytes.iter().position(|byte| *byte == 0) {
        Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
        None => (bytes, None),
    };
    let mut tokenizer = match Tokenizer::from_bytes(json) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    if let Some(config) = config {
        let _ = tokenizer.read_config(config);
    }
    for ids in [tokenizer.encode(TEXT), tokenizer.encode_chat(TEXT)].into_iter().flatten() {
        let mut stream = Incremental::new();
        let shown: usize = ids.iter().map(|id| stream.push(&tokenizer, *id).len()).sum();
        let _ = (shown, stream.finish(&tokenizer), tokenizer.decode(&ids), tokenizer.decode_visible(&ids));
    }
    for id in [0, 1, 2, 7, 300, u32::MAX] {
        let _ = (tokenizer.decode_token(id), tokenizer.token_bytes(id), tokenizer.is_control(id));
    }
    let _ = (tokenizer.spells_special(TEXT), tokenizer.specials().present(), tokenizer.vocab_size());
}
