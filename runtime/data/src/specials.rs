//! Roles of special tokens. A tokenizer names them in many spellings; the code asks for the role.

use std::collections::BTreeMap;

/// Ids of the special tokens that have a role here; `None` where the tokenizer has no such token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Specials {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
    pub user: Option<u32>,
    pub assistant: Option<u32>,
    pub think: Option<u32>,
    pub end_think: Option<u32>,
    pub fim_begin: Option<u32>,
    pub fim_hole: Option<u32>,
    pub fim_end: Option<u32>,
}

/// The ten specials of a tokenizer trained here, ids 0 to 9 in this order, spelled as DeepSeek-V3 publishes them.
pub const SPECIALS: [&str; 10] = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
];

/// Other spellings, by position in [`SPECIALS`].
const SPELLINGS: [&[&str]; 10] = [
    &["<|bos|>", "<bos>", "<s>", "<|begin_of_text|>"],
    &["<|eos|>", "<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"],
    &["<|pad|>", "<pad>", "[PAD]"],
    &["<|User|>", "<|user|>"],
    &["<|Assistant|>", "<|assistant|>"],
    &[],
    &[],
    &["<|fim_begin|>", "<|fim_prefix|>", "<fim_prefix>"],
    &["<|fim_hole|>", "<|fim_suffix|>", "<fim_suffix>"],
    &["<|fim_end|>", "<|fim_middle|>", "<fim_middle>"],
];

impl Specials {
    /// Looks every known spelling up.
    pub(crate) fn find(lookup: impl Fn(&str) -> Option<u32>) -> Self {
        let mut ids = SPECIALS
            .iter()
            .zip(SPELLINGS)
            .map(|(published, others)| std::iter::once(published).chain(others).find_map(|spelling| lookup(spelling)));
        let mut next = || ids.next().flatten();
        Self {
            bos: next(),
            eos: next(),
            pad: next(),
            user: next(),
            assistant: next(),
            think: next(),
            end_think: next(),
            fim_begin: next(),
            fim_hole: next(),
            fim_end: next(),
        }
    }

    /// Takes `bos_token`, `eos_token` and `pad_token` from a `tokenizer_config.json`, each a text or `{"content": text}`.
    pub(crate) fn read_config(&mut self, config: &serde_json::Value, lookup: impl Fn(&str) -> Option<u32>) {
        for (name, slot) in [("bos_token", &mut self.bos), ("eos_token", &mut self.eos), ("pad_token", &mut self.pad)] {
            let value = config.get(name);
            let text = value.and_then(|v| v.as_str().or_else(|| v.get("content").and_then(|c| c.as_str())));
            if let Some(id) = text.and_then(&lookup) {
                *slot = Some(id);
            }
        }
    }

    /// Roles that the tokenizer has, by name.
    pub fn present(&self) -> BTreeMap<&'static str, u32> {
        let all = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("pad", self.pad),
            ("user", self.user),
            ("assistant", self.assistant),
            ("think", self.think),
            ("end_think", self.end_think),
            ("fim_begin", self.fim_begin),
            ("fim_hole", self.fim_hole),
            ("fim_end", self.fim_end),
        ];
        all.into_iter().filter_map(|(name, id)| Some((name, id?))).collect()
    }
}
