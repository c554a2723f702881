//! From tokens to text with offsets, held back where a character or a stop string might still be incomplete.
//!
//! **Invariants.** The joined pieces of a transcript are the decoded tokens, cut before the first stop string. A token's
//! offset is the number of characters of text before it. Nothing of a stop string is ever released.

use dsv3_data::{Incremental, Tokenizer};
use dsv3_infer::Token;

/// A token as clients see it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shown {
    pub(crate) text: String,
    pub(crate) bytes: Vec<u8>,
    /// Characters of text before it.
    pub(crate) offset: usize,
    pub(crate) logprob: Option<f32>,
    /// Alternatives: text, bytes, log-probability.
    pub(crate) top: Vec<(String, Vec<u8>, f32)>,
}

/// Text that became certain, and the tokens it came from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Shown>,
}

/// One choice's growing text.
pub(crate) struct Transcript {
    incremental: Incremental,
    stops: Vec<String>,
    /// Leaves control tokens (bos, role marks) out of the text.
    visible_only: bool,
    held: String,
    held_tokens: Vec<Shown>,
    /// Characters released.
    released: usize,
    stopped: bool,
}

impl Transcript {
    /// An empty text. It begins with an echoed prompt if [`Self::push_prompt`] is called, else with the first new token.
    pub(crate) fn new(stops: Vec<String>, visible_only: bool) -> Self {
        let (held, held_tokens) = (String::new(), Vec::new());
        let incremental = Incremental::new();
        Self { incremental, stops, visible_only, held, held_tokens, released: 0, stopped: false }
    }

    /// Adds a token of an echoed prompt; `silent` tokens (a bos that the server added) have no text.
    pub(crate) fn push_prompt(&mut self, tokenizer: &Tokenizer, token: &Token, silent: bool) {
        let offset = self.released + self.held.chars().count();
        self.held_tokens.push(show(tokenizer, token, offset));
        if !silent {
            let text = self.incremental.push(tokenizer, token.id);
            self.held.push_str(&text);
        }
    }

    /// Releases the whole prompt, where stop strings do not count.
    pub(crate) fn end_prompt(&mut self) -> Piece {
        self.release(self.held.len())
    }

    /// Adds a new token; returns what became certain.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: &Token) -> Piece {
        if self.stopped {
            return Piece::default();
        }
        let offset = self.released + self.held.chars().count();
        self.held_tokens.push(show(tokenizer, token, offset));
        if !(self.visible_only && tokenizer.is_control(token.id)) {
            let text = self.incremental.push(tokenizer, token.id);
            self.held.push_str(&text);
        }
        self.settle()
    }

    /// The rest, once no token follows.
    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer) -> Piece {
        if self.stopped {
            return Piece::default();
        }
        let text = self.incremental.finish(tokenizer);
        self.held.push_str(&text);
        let mut piece = self.settle();
        if !self.stopped {
            let rest = self.release(self.held.len());
            piece.text.push_str(&rest.text);
            piece.tokens.extend(rest.tokens);
        }
        piece
    }

    /// Whether a stop string came.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    fn settle(&mut self) -> Piece {
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            let end_offset = self.released + self.held[..end].chars().count();
            self.held_tokens.retain(|token| token.offset < end_offset);
            return self.release(end);
        }
        let safe = self.held.len() - self.partial_stop();
        self.release(safe)
    }

    /// Bytes at the end of the held text that could be the start of a stop string.
    fn partial_stop(&self) -> usize {
        let longest = |stop: &String| {
            let starts = stop.char_indices().map(|(at, _)| at).filter(|at| *at > 0);
            starts.filter(|at| self.held.ends_with(&stop[..*at])).max().unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }

    /// Releases `end` bytes and the tokens that begin in them (all tokens, when everything is released).
    fn release(&mut self, end: usize) -> Piece {
        let all = end == self.held.len() || self.stopped;
        let rest = self.held.split_off(end);
        let text = std::mem::replace(&mut self.held, rest);
        self.released += text.chars().count();
        let count = match all {
            true => self.held_tokens.len(),
            false => self.held_tokens.iter().take_while(|token| token.offset < self.released).count(),
        };
        Piece { text, tokens: self.held_tokens.drain(..count).collect() }
    }
}

fn show(tokenizer: &Tokenizer, token: &Token, offset: usize) -> Shown {
    let (text, bytes) = spell(tokenizer, token.id);
    let top = token.top.iter().map(|(id, logprob)| {
        let (text, bytes) = spell(tokenizer, *id);
        (text, bytes, *logprob)
    });
    Shown { text, bytes, offset, logprob: token.logprob, top: top.collect() }
}

/// A token's text; for bytes that are no text alone, OpenAI's `bytes:\xNN` spelling.
fn spell(tokenizer: &Tokenizer, id: u32) -> (String, Vec<u8>) {
    let bytes = tokenizer.token_bytes(id);
    match std::str::from_utf8(&bytes) {
        Ok(text) => (text.to_owned(), bytes),
        Err(_) => {
            let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            (format!("bytes:{hex}"), bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let options = dsv3_data::TrainOptions::new(300);
        Tokenizer::train(["the cat sat on the mat, the end"; 20].iter(), &options).unwrap()
    }

    fn token(id: u32) -> Token {
        Token { id, logprob: Some(-1.0), top: vec![] }
    }

    fn run(text: &str, stops: &[&str]) -> (Vec<String>, Vec<Shown>, bool) {
        let tokenizer = tokenizer();
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut transcript = Transcript::new(stops, false);
        let (mut texts, mut tokens) = (Vec::new(), Vec::new());
        for id in tokenizer.encode(text).unwrap() {
            let piece = transcript.push(&tokenizer, &token(id));
            texts.push(piece.text);
            tokens.extend(piece.tokens);
        }
        let piece = transcript.finish(&tokenizer);
        texts.push(piece.text);
        tokens.extend(piece.tokens);
        (texts, tokens, transcript.is_stopped())
    }

    #[test]
    fn pieces_join_to_the_text_and_offsets_count_characters() {
        let (texts, tokens, stopped) = run("the é cat 🦀 end", &[]);
        assert_eq!(texts.concat(), "the é cat 🦀 end");
        assert!(!stopped && texts.iter().all(|text| !text.contains('\u{FFFD}')));
        assert_eq!(tokens[0].offset, 0);
        assert!(tokens.windows(2).all(|pair| pair[0].offset <= pair[1].offset));
        let crab: Vec<&Shown> = tokens.iter().filter(|token| token.text.starts_with("bytes:")).collect();
        assert!(crab.len() >= 2 && crab.iter().all(|token| token.text.starts_with("bytes:\\x")));
    }

    #[test]
    fn a_stop_string_over_several_tokens_never_shows() {
        for (stop, want) in
            [("cat sat", "the "), ("t", ""), ("mat", "the cat sat on the "), ("zzz", "the cat sat on the mat")]
        {
            let (texts, tokens, stopped) = run("the cat sat on the mat", &[stop]);
            assert_eq!(texts.concat(), want);
            assert_eq!(stopped, stop != "zzz");
            assert!(tokens.iter().all(|token| token.offset < want.chars().count()));
        }
    }

    #[test]
    fn the_first_of_several_stops_counts() {
        assert_eq!(run("the cat sat on the mat", &["on", "sat o", "mat"]).0.concat(), "the cat ");
    }

    #[test]
    fn an_echoed_prompt_ignores_stops() {
        let tokenizer = tokenizer();
        let mut transcript = Transcript::new(vec!["cat".to_owned()], false);
        transcript.push_prompt(&tokenizer, &token(0), true);
        for id in tokenizer.encode("the cat").unwrap() {
            transcript.push_prompt(&tokenizer, &token(id), false);
        }
        let piece = transcript.end_prompt();
        assert_eq!(piece.text, "the cat");
        assert_eq!((piece.tokens[0].offset, piece.tokens[1].offset), (0, 0));
        let next = transcript.push(&tokenizer, &token(tokenizer.encode(" sat").unwrap()[0]));
        assert_eq!(next.tokens[0].offset, 7);
    }
}
