//! Tokenizers in the Hugging Face `tokenizer.json` form: load any, train a byte-level BPE.
//!
//! Invariant: text of a user's data never becomes a special token ([`Tokenizer::encode`]); only text that a chat template
//! rendered does ([`Tokenizer::encode_chat`]). Training is deterministic: ties of pair counts go to the smaller pair.
//! Paper: byte-level BPE with digits in runs of at most three, DeepSeek-V3 report 4.1.

mod pieces;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::{Deserialize, Serialize};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, OffsetReferential, OffsetType, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, SplitDelimiterBehavior, TokenizerImpl,
    models::bpe::{BPE, BpeTrainer},
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

pub use self::pieces::{PIECE_BYTES, UNCUT_BYTES_MAX};
use self::pieces::{Pieces, parts};
use crate::{
    error::{DataError, Result},
    specials::{SPECIALS, Specials},
};

/// Splits text before bytes are merged: digits in runs of at most three, words, punctuation, white space; a leading
/// space belongs to what follows it.
pub const SPLIT_PATTERN: &str = r" ?\d{1,3}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+";

/// How a byte-level BPE is trained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Tokens in all: specials, 256 bytes, merges.
    pub vocab_size: usize,
    /// Special tokens, whose ids are their positions here.
    pub specials: Vec<String>,
    /// Regular expression whose matches are never merged across.
    pub pattern: String,
}

impl TrainOptions {
    /// The specials of [`SPECIALS`] and the pattern [`SPLIT_PATTERN`].
    pub fn new(vocab_size: usize) -> Self {
        Self { vocab_size, specials: SPECIALS.map(str::to_owned).to_vec(), pattern: SPLIT_PATTERN.to_owned() }
    }
}

/// A tokenizer. Cheap to share behind an `Arc`; all methods take `&self`.
#[derive(Clone)]
pub struct Tokenizer {
    /// Specials in text stay text.
    plain: tokenizers::Tokenizer,
    /// Specials in text become their tokens.
    chat: tokenizers::Tokenizer,
    specials: Specials,
    /// Added tokens that are marked special or have a role, by id.
    special_texts: BTreeMap<u32, String>,
    /// Character of the byte-level alphabet to its byte; `None` when the decoder is not byte-level.
    alphabet: Option<BTreeMap<char, u8>>,
    vocab_size: usize,
    json: Vec<u8>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).field("specials", &self.specials).finish()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When the bytes are not a tokenizer this build understands.
    pub fn from_bytes(json: &[u8]) -> Result<Self> {
        // The library gives up on a file that is cut inside some of its parts, where JSON's own reader says what is wrong.
        serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(DataError::tokenizer)?;
        guarded(|| {
            let mut chat = tokenizers::Tokenizer::from_bytes(json).map_err(DataError::tokenizer)?;
            // Some published files cut every text to the context of their model, or fill it up to that length.
            chat.with_truncation(None).map_err(DataError::tokenizer)?;
            chat.with_padding(None);
            Self::wrap(chat, json.to_vec())
        })
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When the file cannot be read or is no tokenizer.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(|source| DataError::io(path, source))?;
        Self::from_bytes(&json).map_err(|error| DataError::File { path: path.to_owned(), message: error.to_string() })
    }

    /// Reads `tokenizer.json` of a model folder, with the names of bos, eos and pad from `tokenizer_config.json` if that
    /// file is there.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let mut tokenizer = Self::from_file(&folder.join("tokenizer.json"))?;
        let path = folder.join("tokenizer_config.json");
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|source| DataError::io(&path, source))?;
            tokenizer
                .read_config(&bytes)
                .map_err(|error| DataError::File { path: path.clone(), message: error.to_string() })?;
        }
        Ok(tokenizer)
    }

    /// Takes the names of bos, eos and pad from the bytes of a `tokenizer_config.json`.
    ///
    /// # Errors
    /// When the bytes are not JSON.
    pub fn read_config(&mut self, json: &[u8]) -> Result<()> {
        let config: serde_json::Value = serde_json::from_slice(json).map_err(DataError::tokenizer)?;
        let chat = &self.chat;
        self.specials.read_config(&config, |text| chat.token_to_id(text));
        Ok(())
    }

    fn wrap(chat: tokenizers::Tokenizer, json: Vec<u8>) -> Result<Self> {
        // Every text would silently become nothing.
        if chat.get_vocab_size(false) == 0 {
            return Err(DataError::tokenizer("its vocabulary is empty"));
        }
        let specials = Specials::find(|text| chat.token_to_id(text));
        let with_role: BTreeSet<u32> = specials.present().into_values().collect();
        // Some tokenizers do not mark tokens such as `<think>` as special; here their role makes them so.
        let special_texts: BTreeMap<u32, String> = chat
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(id, token)| token.special || with_role.contains(id))
            .map(|(id, token)| (id, token.content))
            .collect();
        let mut plain = chat.clone();
        plain
            .add_special_tokens(special_texts.values().map(|text| AddedToken::from(text.as_str(), true)))
            .map_err(DataError::tokenizer)?;
        plain.set_encode_special_tokens(true);
        let alphabet = byte_level_decoder(&chat).then(byte_alphabet);
        let vocab_size = chat.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { plain, chat, specials, special_texts, alphabet, vocab_size, json })
    }

    /// Trains a byte-level BPE on `documents`.
    ///
    /// # Errors
    /// When the vocabulary is too small for the specials and the 256 bytes, or the pattern is no regular expression.
    pub fn train<S: AsRef<str> + Send>(
        documents: impl Iterator<Item = S> + Send,
        options: &TrainOptions,
    ) -> Result<Self> {
        let least = options.specials.len() + 256;
        if options.vocab_size < least {
            return Err(DataError::options(format!(
                "vocab_size {} is below {least}: {} specials and 256 bytes",
                options.vocab_size,
                options.specials.len()
            )));
        }
        let pattern = SplitPattern::Regex(options.pattern.clone());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(DataError::tokenizer)?;
        let cuts = split.clone();
        let documents =
            documents.flat_map(move |text| parts(text, |left: &str, right: &str| splits(&cuts, left, right)));
        let bytes = ByteLevel::new(false, true, false);
        let mut tokenizer: TokenizerImpl<
            BPE,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        > = TokenizerImpl::new(BPE::default());
        tokenizer
            .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![split.into(), bytes.into()]))));
        tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(bytes)));
        let added = options.specials.iter().map(|text| AddedToken::from(text.as_str(), true)).collect();
        let mut trainer = BpeTrainer::builder()
            .vocab_size(options.vocab_size)
            .special_tokens(added)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .show_progress(false)
            .build();
        tokenizer.train(&mut trainer, documents).map_err(DataError::tokenizer)?;
        // Through its own JSON, so that a trained tokenizer and a loaded one are the same thing.
        let model: ModelWrapper = tokenizer.get_model().clone().into();
        let mut whole = tokenizers::Tokenizer::new(model);
        whole.with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned());
        whole.with_decoder(tokenizer.get_decoder().cloned());
        whole
            .add_special_tokens(options.specials.iter().map(|text| AddedToken::from(text.as_str(), true)))
            .map_err(DataError::tokenizer)?;
        let json = whole.to_string(true).map_err(DataError::tokenizer)?;
        Self::from_bytes(json.as_bytes())
    }

    /// The `tokenizer.json`, byte for byte as it was loaded or trained.
    pub fn to_bytes(&self) -> &[u8] {
        &self.json
    }

    /// Token ids of a user's text. Spellings of special tokens in it are plain text.
    ///
    /// # Errors
    /// When a word-level tokenizer without an unknown token meets an unknown word.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        ids(&self.plain, text)
    }

    /// A long text in pieces whose ids, one after the other, are those of the whole; a text of at most [`PIECE_BYTES`] is
    /// one piece, and an empty one has none.
    ///
    /// # Errors
    /// Where nothing can be cut in [`UNCUT_BYTES_MAX`] bytes.
    pub fn pieces<'t>(&'t self, text: &'t str) -> impl Iterator<Item = Result<&'t str>> {
        Pieces::new(text, |left: &str, right: &str| {
            let both = self.encode(&[left, right].concat()).ok();
            let (left, right) = (self.encode(left).ok(), self.encode(right).ok());
            both.is_some() && both == left.zip(right).map(|(left, right)| [left, right].concat())
        })
    }

    /// Token ids of text that a chat template rendered, or of a response in the chat's form (`<think>…`): spellings of
    /// special tokens become those tokens. No bos or eos is added.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        ids(&self.chat, text)
    }

    /// Text of `ids`, special tokens spelled out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_with(ids, false)
    }

    /// Text of `ids` without special tokens other than the thinking marks.
    pub fn decode_visible(&self, ids: &[u32]) -> String {
        let kept: Vec<u32> = ids.iter().copied().filter(|id| !self.is_control(*id)).collect();
        self.decode_with(&kept, false)
    }

    fn decode_with(&self, ids: &[u32], skip_special: bool) -> String {
        let decoded = guarded(|| self.chat.decode(ids, skip_special).map_err(DataError::tokenizer));
        decoded.unwrap_or_else(|_| {
            let tokens: Vec<String> = ids.iter().filter_map(|id| self.id_to_token(*id)).collect();
            tokens.join(" ")
        })
    }

    /// Text of one token: its own bytes, U+FFFD where they are part of a character; the empty text for an id that is not
    /// in the vocabulary.
    pub fn decode_token(&self, id: u32) -> String {
        self.decode(&[id])
    }

    /// Bytes of one token, exact even where it is part of a character.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let token = self.id_to_token(id).unwrap_or_default();
        if let Some(alphabet) = self.alphabet.as_ref().filter(|_| !self.special_texts.contains_key(&id)) {
            let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
            return bytes.unwrap_or_else(|| token.into_bytes());
        }
        self.decode_token(id).into_bytes()
    }

    /// Id of a token in the vocabulary's own spelling (byte-level: `Ġ` for a space).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.chat.token_to_id(token)
    }

    /// The vocabulary's own spelling of `id`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.chat.id_to_token(id)
    }

    /// Smallest number above every id; the number of tokens unless ids have gaps.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids of the special tokens by role.
    pub fn specials(&self) -> &Specials {
        &self.specials
    }

    /// Overrides eos, for a model folder whose `generation_config.json` or `config.json` names another.
    pub fn set_eos(&mut self, id: u32) {
        self.specials.eos = Some(id);
    }

    /// Overrides bos.
    pub fn set_bos(&mut self, id: u32) {
        self.specials.bos = Some(id);
    }

    /// Whether `id` is a special token that a reader should not see (the thinking marks are shown).
    pub fn is_control(&self, id: u32) -> bool {
        self.special_texts.contains_key(&id) && self.specials.think != Some(id) && self.specials.end_think != Some(id)
    }

    /// Whether some special token is spelled in `text`.
    pub fn spells_special(&self, text: &str) -> bool {
        self.special_texts.values().any(|special| text.contains(special.as_str()))
    }

    /// Text of the special token `id` for a template variable such as `bos_token`; empty for `None`.
    pub(crate) fn special_text(&self, id: Option<u32>) -> String {
        id.and_then(|id| self.id_to_token(id)).unwrap_or_default()
    }
}

fn ids(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
    guarded(|| {
        let encoding = tokenizer.encode_fast(text, false).map_err(DataError::tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    })
}

/// The library panics on some files whose parts do not fit together; that, too, is an error.
fn guarded<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(DataError::tokenizer("its parts do not fit together: the library gave up on it")))
}

/// Whether the split keeps two neighbouring texts apart.
fn splits(split: &Split, left: &str, right: &str) -> bool {
    let words = |text: &str| -> Option<Vec<String>> {
        let mut text = PreTokenizedString::from(text);
        split.pre_tokenize(&mut text).ok()?;
        let words = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Some(words.into_iter().map(|(word, _, _)| word.to_owned()).collect())
    };
    let both = words(&[left, right].concat());
    both.is_some() && both == words(left).zip(words(right)).map(|(left, right)| [left, right].concat())
}

fn byte_level_decoder(tokenizer: &tokenizers::Tokenizer) -> bool {
    match tokenizer.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(all)) => {
            all.get_decoders().iter().any(|one| matches!(one, DecoderWrapper::ByteLevel(_)))
        }
        _ => false,
    }
}

/// GPT-2's printable alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and on.
fn byte_alphabet() -> BTreeMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut map = BTreeMap::new();
    let mut next = 256u32;
    for byte in 0..=255u8 {
        if printable(&byte) {
            map.insert(char::from(byte), byte);
        } else {
            map.insert(char::from_u32(next).unwrap_or('\u{FFFD}'), byte);
            next += 1;
        }
    }
    map
}

/// Turns a growing list of ids into text piece by piece, holding back the bytes of an unfinished character. Joined pieces
/// equal the text of the whole list (for word-level tokenizers including the spaces between words).
#[derive(Clone, Debug, Default)]
pub struct Incremental {
    ids: Vec<u32>,
    shown: usize,
}

/// Most tokens kept as context of the next piece.
const CONTEXT_TOKENS: usize = 4;

impl Incremental {
    /// No ids yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one id; returns the text that became certain, possibly empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.ids.push(id);
        let before = tokenizer.decode(&self.ids[..self.shown]);
        let now = tokenizer.decode(&self.ids);
        if now.ends_with('\u{FFFD}') && self.ids.len() - self.shown < 4 {
            return String::new();
        }
        self.advance(&before, &now)
    }

    /// Returns what was held back; the unfinished character becomes U+FFFD.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let before = tokenizer.decode(&self.ids[..self.shown]);
        let now = tokenizer.decode(&self.ids);
        self.advance(&before, &now)
    }

    fn advance(&mut self, before: &str, now: &str) -> String {
        let piece = now.strip_prefix(before).unwrap_or("").to_owned();
        let drop = self.ids.len().saturating_sub(CONTEXT_TOKENS);
        self.ids.drain(..drop);
        self.shown = self.ids.len();
        piece
    }
}

#[cfg(test)]
mod tests;
