//! Passkeys: two code words said somewhere in a text and asked for later. One key per document, because two in one window
//! teach a model to copy the nearest.

use dsv3_core::Rng;
use dsv3_data::Tokenizer;

use super::{
    boundary,
    real::{Part, RealText},
    table::{Column, Table},
};
use crate::error::IngestError;

/// First words of keys.
pub const COLOURS: [&str; 12] =
    ["red", "blue", "gold", "pink", "gray", "green", "white", "black", "brown", "amber", "ivory", "coral"];
/// Second words of keys.
pub const ANIMALS: [&str; 12] =
    ["wolf", "bear", "deer", "frog", "hawk", "lion", "crow", "swan", "crab", "moth", "goat", "seal"];

/// Depths of the needle sets.
pub const DEPTHS: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];

/// A passkey, by the positions of its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    colour: usize,
    animal: usize,
}

impl Key {
    /// Draws one of the held-out keys, or one of the others.
    pub fn draw(rng: &mut Rng, held_out: bool) -> Self {
        loop {
            let key = Self { colour: rng.below(12) as usize, animal: rng.below(12) as usize };
            if key.held_out() == held_out {
                return key;
            }
        }
    }

    /// One key in four is in no training text. Each word is held out with exactly three partners, so that all words are
    /// learned.
    pub fn held_out(&self) -> bool {
        (self.colour + 3 * self.animal).is_multiple_of(4)
    }

    /// Reads `white crow` back.
    pub fn parse(words: &str) -> Option<Self> {
        let (colour, animal) = words.split_once(' ')?;
        let at = |list: &[&str], word: &str| list.iter().position(|known| *known == word);
        Some(Self { colour: at(&COLOURS, colour)?, animal: at(&ANIMALS, animal)? })
    }

    /// `white crow`.
    pub fn words(&self) -> String {
        format!("{} {}", COLOURS[self.colour], ANIMALS[self.animal])
    }

    /// `The passkey is white crow.`
    pub fn statement(&self) -> String {
        format!("The passkey is {}.", self.words())
    }
}

/// A key said again and again over 400 to 800 characters; between mentions nothing (60%) or 4 to 240 characters of
/// Shakespeare, log-uniform.
pub fn passkeys_document(real: &RealText, rng: &mut Rng, held_out: bool) -> String {
    let part = if held_out { Part::HeldOut } else { Part::Train };
    let said = Key::draw(rng, held_out).statement();
    let length = 400 + rng.below(401) as usize;
    let mut text = said.clone();
    while text.len() < length {
        text.push('\n');
        if rng.uniform() < 0.4 {
            let gap = (4.0 * 60f64.powf(rng.uniform())) as usize;
            text += real.passage(rng, gap, part);
            text.push('\n');
        }
        text += &said;
    }
    text
}

/// Most tokens that a long document stays below its length: the tokenizer of a run may differ by a merge or two.
const SLACK_TOKENS: usize = 3;

/// A document of just under `tokens` tokens, bos and eos included: Shakespeare with a key early (at depth u squared), again
/// at the end and, in half of the documents, once between.
///
/// # Errors
/// When the tokenizer fails.
pub fn long_document(
    real: &RealText,
    tokenizer: &Tokenizer,
    rng: &mut Rng,
    tokens: usize,
) -> Result<String, IngestError> {
    let said = format!("\n{}\n", Key::draw(rng, false).statement());
    let twice = rng.uniform() < 0.5;
    let (early, between) = (rng.uniform().powi(2), rng.uniform());
    let filler = real.passage(rng, tokens * 4, Part::Train);
    let build = |length: usize| {
        let cut = word_boundary(filler, (early * length as f64) as usize);
        let middle = word_boundary(filler, cut + (between * (length - cut) as f64) as usize).max(cut);
        let end = boundary(filler, length).max(middle);
        let again = if twice { said.as_str() } else { "" };
        format!("{}{said}{}{again}{}{said}", &filler[..cut], &filler[cut..middle], &filler[middle..end])
    };
    let (mut low, mut high) = (0, filler.len());
    let goal = tokens - 2 - SLACK_TOKENS;
    // Longest filler that fits: token counts grow with length but for a token or two, which the slack covers.
    while high - low > 1 {
        let half = (low + high) / 2;
        if tokenizer.encode(&build(half))?.len() <= goal {
            low = half;
        } else {
            high = half;
        }
    }
    Ok(build(low))
}

/// The last position at or before `at` that begins a word.
fn word_boundary(text: &str, at: usize) -> usize {
    let at = boundary(text, at);
    text[..at].rfind([' ', '\n']).map_or(0, |space| space + 1)
}

/// `count` needles of `tokens` tokens, spread evenly over [`DEPTHS`]: filler from the held-out part, long enough to be cut to
/// the exact count by whoever asks.
pub fn needle_table(real: &RealText, rng: Rng, tokens: usize, count: usize) -> Table {
    let mut rng = rng;
    let mut columns: [Vec<String>; 4] = Default::default();
    let (mut depths, mut lengths) = (Vec::new(), Vec::new());
    for index in 0..count {
        let key = Key::draw(&mut rng, true);
        let filler = real.passage(&mut rng, tokens * 3, Part::HeldOut).to_owned();
        let row = [filler, key.statement(), "The passkey is".to_owned(), key.words()];
        columns.iter_mut().zip(row).for_each(|(column, value)| column.push(value));
        depths.push(DEPTHS[index % DEPTHS.len()]);
        lengths.push(tokens as i64);
    }
    let [filler, statement, question, answer] = columns;
    Table::new(vec![
        ("filler", Column::Text(filler)),
        ("statement", Column::Text(statement)),
        ("question", Column::Text(question)),
        ("answer", Column::Text(answer)),
        ("depth", Column::Number(depths)),
        ("length_tokens", Column::Integer(lengths)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_keys_is_held_out_evenly() {
        let held = |colour, animal| Key { colour, animal }.held_out();
        for i in 0..12 {
            assert_eq!((0..12).filter(|j| held(i, *j)).count(), 3);
            assert_eq!((0..12).filter(|j| held(*j, i)).count(), 3);
        }
    }
}
