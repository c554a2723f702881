//! A long text in pieces that are tokenised apart: the tokens of the pieces, one after the other, are those of the text.
//!
//! Tokenising costs a hundred times a text's size in memory for as long as it lasts and cannot be stopped half way, so a
//! document of 200 MB is handed over in pieces of 256 KiB. A text may be cut where the tokenizer itself would cut it: a
//! candidate is a change between white space, letters, digits and the rest, and it is taken when the characters around it
//! give the same tokens in one and in two parts. Invariant: a text of at most [`PIECE_BYTES`] is one piece.

use crate::error::{DataError, Result};

/// Texts up to this length are one piece, and longer ones are cut as soon after it as they can be.
pub const PIECE_BYTES: usize = 1 << 18;
/// Longest piece. A text that cannot be cut anywhere in a stretch of this length is refused.
pub const UNCUT_BYTES_MAX: usize = 8 << 20;
/// Characters around a candidate that are looked at, in bytes to either side.
const CONTEXT_BYTES: usize = 512;
/// Candidates tried at one place before the search moves on by [`STRIDE_BYTES`].
const TRIES: usize = 16;
const STRIDE_BYTES: usize = PIECE_BYTES / 4;

/// Whether the tokens of the two texts put together are those of both, one after the other.
pub(crate) trait Cuts: Fn(&str, &str) -> bool {}
impl<F: Fn(&str, &str) -> bool> Cuts for F {}

/// Iterator over the pieces of a text.
pub(crate) struct Pieces<'t, F> {
    rest: &'t str,
    cuts: F,
}

impl<'t, F: Cuts> Pieces<'t, F> {
    pub(crate) fn new(text: &'t str, cuts: F) -> Self {
        Self { rest: text, cuts }
    }

    /// Where the next piece ends; nothing when there is no such place in reach.
    fn end(&self) -> Option<usize> {
        let mut from = PIECE_BYTES;
        while from < self.rest.len().min(UNCUT_BYTES_MAX) {
            let begin = boundary(self.rest, from);
            let near = &self.rest[begin..boundary(self.rest, from + STRIDE_BYTES)];
            let mut found = candidates(near).take(TRIES).map(|at| begin + at);
            if let Some(at) = found.find(|at| self.is_cut(*at)) {
                return Some(at);
            }
            from += STRIDE_BYTES;
        }
        (self.rest.len() <= UNCUT_BYTES_MAX).then_some(self.rest.len())
    }

    fn is_cut(&self, at: usize) -> bool {
        let left = &self.rest[boundary(self.rest, at.saturating_sub(CONTEXT_BYTES))..at];
        (self.cuts)(left, &self.rest[at..boundary(self.rest, at + CONTEXT_BYTES)])
    }
}

impl<'t, F: Cuts> Iterator for Pieces<'t, F> {
    type Item = Result<&'t str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let end = if self.rest.len() <= PIECE_BYTES { Some(self.rest.len()) } else { self.end() };
        let Some(end) = end else {
            self.rest = "";
            let limit = UNCUT_BYTES_MAX >> 20;
            let message = format!("a text runs on for more than {limit} MiB without a place where it may be cut");
            return Some(Err(DataError::tokenizer(message)));
        };
        let (piece, rest) = self.rest.split_at(end);
        self.rest = rest;
        Some(Ok(piece))
    }
}

/// A whole text, or a piece of a long one.
pub(crate) enum Part<S> {
    Whole(S),
    Piece(String),
}

impl<S: AsRef<str>> AsRef<str> for Part<S> {
    fn as_ref(&self) -> &str {
        match self {
            Self::Whole(text) => text.as_ref(),
            Self::Piece(text) => text,
        }
    }
}

/// The pieces of a text to learn from. What cannot be cut is left out: tokenising it will be refused.
pub(crate) fn parts<S: AsRef<str>>(text: S, cuts: impl Cuts) -> Vec<Part<S>> {
    if text.as_ref().len() <= PIECE_BYTES {
        return vec![Part::Whole(text)];
    }
    Pieces::new(text.as_ref(), cuts).map_while(Result::ok).map(|piece| Part::Piece(piece.to_owned())).collect()
}

/// Offsets at which the kind of character changes.
fn candidates(text: &str) -> impl Iterator<Item = usize> + '_ {
    let mut before = None;
    text.char_indices().filter_map(move |(at, c)| {
        let kind = kind(c);
        let changed = before.replace(kind).is_some_and(|last| last != kind);
        changed.then_some(at)
    })
}

fn kind(c: char) -> u8 {
    match c {
        c if c.is_whitespace() => 0,
        c if c.is_numeric() => 1,
        c if c.is_ascii_alphabetic() => 2,
        c if c.is_alphabetic() => 3,
        _ => 4,
    }
}

/// The nearest character boundary at or before `at`.
fn boundary(text: &str, at: usize) -> usize {
    let at = at.min(text.len());
    (at.saturating_sub(3)..=at).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(at)
}
