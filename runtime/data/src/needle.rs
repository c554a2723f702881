//! Needles: a statement hidden at a depth of filler text and asked for at the end, cut to an exact number of tokens.
//!
//! Layout: `bos filler[..c] \n statement \n filler[c..] \n question`, answer ` words`; prompt and answer together hold exactly
//! the asked number of tokens, c = depth x filler tokens.

use std::path::PathBuf;

use crate::{
    error::{DataError, Result},
    rows::Rows,
    tokenizer::Tokenizer,
};

/// A needle and its hay, as text.
#[derive(Clone, Debug, PartialEq)]
pub struct NeedleRecord {
    /// Text to hide the statement in, at least as long as needed.
    pub filler: String,
    /// What is hidden: `The passkey is white crow.`
    pub statement: String,
    /// What is asked, the start of a sentence: `The passkey is`.
    pub question: String,
    /// What completes it, without the leading space: `white crow`.
    pub answer: String,
    /// Where in the filler, 0 to 1.
    pub depth: f64,
    /// Tokens that prompt and answer hold together.
    pub length_tokens: usize,
}

/// Token ids of a needle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeedleIds {
    /// What the model reads.
    pub prompt: Vec<u32>,
    /// What it should say.
    pub answer: Vec<u32>,
}

impl NeedleRecord {
    /// Ids at the record's own length.
    ///
    /// # Errors
    /// When the filler is too short or the length holds no filler at all.
    pub fn ids(&self, tokenizer: &Tokenizer) -> Result<NeedleIds> {
        self.ids_at(tokenizer, self.length_tokens)
    }

    /// Ids at `length_tokens`.
    ///
    /// # Errors
    /// As [`NeedleRecord::ids`].
    pub fn ids_at(&self, tokenizer: &Tokenizer, length_tokens: usize) -> Result<NeedleIds> {
        let statement = tokenizer.encode(&format!("\n{}\n", self.statement))?;
        let question = tokenizer.encode(&format!("\n{}", self.question))?;
        let answer = tokenizer.encode(&format!(" {}", self.answer))?;
        let mut prompt: Vec<u32> = tokenizer.specials().bos.into_iter().collect();
        let fixed = prompt.len() + statement.len() + question.len() + answer.len();
        let filler = tokenizer.encode(&self.filler)?;
        let room = length_tokens.saturating_sub(fixed);
        if room == 0 || filler.len() < room {
            return Err(DataError::options(format!(
                "a needle of {length_tokens} tokens needs {room} tokens of filler, it has {}",
                filler.len()
            )));
        }
        let cut = ((self.depth.clamp(0.0, 1.0) * room as f64) as usize).min(room);
        prompt.extend_from_slice(&filler[..cut]);
        prompt.extend(statement);
        prompt.extend_from_slice(&filler[cut..room]);
        prompt.extend(question);
        Ok(NeedleIds { prompt, answer })
    }
}

/// Reads needles: `filler`, `statement`, `question`, `answer`, `depth`, `length_tokens`.
///
/// # Errors
/// At the first file, row or column that cannot be used, with its place.
pub fn read_needles(paths: &[PathBuf]) -> Result<Vec<NeedleRecord>> {
    let mut all = Vec::new();
    for path in paths {
        for row in Rows::open(path)? {
            let row = row?;
            let text = |column: &str| row.text(column).map(str::to_owned);
            let number = |column: &str| {
                let value = row.get(column).and_then(serde_json::Value::as_f64).filter(|value| *value >= 0.0);
                value.ok_or_else(|| row.error(column, "is missing or negative, a number is expected"))
            };
            all.push(NeedleRecord {
                filler: text("filler")?,
                statement: text("statement")?,
                question: text("question")?,
                answer: text("answer")?,
                depth: number("depth")?,
                length_tokens: number("length_tokens")? as usize,
            });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::TrainOptions;

    #[test]
    fn lengths_are_exact_at_every_depth() {
        let tokenizer = Tokenizer::train(["some words of filler"].iter(), &TrainOptions::new(280)).unwrap();
        let record = |depth| NeedleRecord {
            filler: "some words of filler ".repeat(40),
            statement: "The key is red wolf.".to_owned(),
            question: "The key is".to_owned(),
            answer: "red wolf".to_owned(),
            depth,
            length_tokens: 200,
        };
        for depth in [0.0, 0.1, 0.5, 1.0] {
            let ids = record(depth).ids(&tokenizer).unwrap();
            assert_eq!(ids.prompt.len() + ids.answer.len(), 200);
            let text = tokenizer.decode(&ids.prompt);
            assert_eq!(text.matches("The key is red wolf.").count(), 1);
            assert!(text.ends_with("\nThe key is") && ids.prompt[0] == tokenizer.specials().bos.unwrap());
        }
        assert!(record(0.5).ids_at(&tokenizer, 20).is_err() && record(0.5).ids_at(&tokenizer, 20_000).is_err());
    }
}
