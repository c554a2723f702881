//! Real text: tinyshakespeare (public domain) and GSM8K (MIT), as Parquet beside the recipes, and how those files are made
//! from what their authors publish.

use std::path::Path;

use dsv3_core::Rng;
use dsv3_data::{Row, Rows};

use super::{
    boundary,
    table::{Column, Table},
};
use crate::error::IngestError;

/// Rows of GSM8K's training set that ship: as many as the recipe reads.
pub const GSM8K_TRAIN_ROWS: usize = 800;

/// A half of Shakespeare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The first nine tenths.
    Train,
    /// The last tenth, in no training text.
    HeldOut,
}

/// A question and its published answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The question.
    pub question: String,
    /// Working with `<<…>>` marks, then `#### answer`.
    pub answer: String,
}

impl Question {
    /// What follows `####`.
    pub fn final_answer(&self) -> &str {
        self.answer.rsplit("####").next().unwrap_or_default().trim()
    }

    /// Question and working as a document, without the `<<…>>` marks.
    pub fn document(&self) -> String {
        let mut text = format!("{}\n", self.question);
        let mut rest = self.answer.as_str();
        while let Some((before, marked)) = rest.split_once("<<") {
            text += before;
            rest = marked.split_once(">>").map_or("", |(_, after)| after);
        }
        text + rest
    }
}

/// The real text, in memory.
#[derive(Debug)]
pub struct RealText {
    shakespeare: String,
    cut: usize,
    /// GSM8K's training questions that ship.
    pub gsm8k_train: Vec<Question>,
    /// GSM8K's test questions.
    pub gsm8k_test: Vec<Question>,
}

impl RealText {
    /// Reads the three shipped files.
    ///
    /// # Errors
    /// When one is missing or damaged.
    pub fn read(folder: &Path) -> Result<Self, IngestError> {
        let speeches = rows(&folder.join("tinyshakespeare.parquet"), |row| Ok(row.text("text")?.to_owned()))?;
        let question = |row: &Row| {
            Ok(Question { question: row.text("question")?.to_owned(), answer: row.text("answer")?.to_owned() })
        };
        let shakespeare = speeches.join("\n\n");
        let cut = boundary(&shakespeare, shakespeare.len() / 10 * 9);
        Ok(Self {
            shakespeare,
            cut,
            gsm8k_train: rows(&folder.join("gsm8k-train.parquet"), question)?,
            gsm8k_test: rows(&folder.join("gsm8k-test.parquet"), question)?,
        })
    }

    /// The text of a part.
    pub fn shakespeare(&self, part: Part) -> &str {
        match part {
            Part::Train => &self.shakespeare[..self.cut],
            Part::HeldOut => &self.shakespeare[self.cut..],
        }
    }

    /// `length` bytes (fewer at the end of the part) from the beginning of a line drawn from `rng`.
    pub fn passage(&self, rng: &mut Rng, length: usize, part: Part) -> &str {
        let text = self.shakespeare(part);
        let room = text.len().saturating_sub(length + 200).max(1);
        let at = boundary(text, rng.below(room as u64) as usize);
        let start = text[at..].find('\n').map_or(at, |newline| at + newline + 1);
        &text[start..boundary(text, start + length)]
    }
}

fn rows<T>(path: &Path, read: impl Fn(&Row) -> dsv3_data::Result<T>) -> Result<Vec<T>, IngestError> {
    let mut all = Vec::new();
    for row in Rows::open(path)? {
        all.push(read(&row?)?);
    }
    Ok(all)
}

/// Makes the three shipped files from the published ones: `tinyshakespeare/input.txt`, `gsm8k/train.jsonl` and
/// `gsm8k/test.jsonl` below `raw`.
///
/// # Errors
/// When a published file cannot be read.
pub fn import(raw: &Path) -> Result<Vec<(String, Vec<u8>)>, IngestError> {
    let path = raw.join("tinyshakespeare/input.txt");
    let text =
        std::fs::read_to_string(&path).map_err(|source| dsv3_data::DataError::Io { path: path.clone(), source })?;
    let speeches: Vec<String> = text.split("\n\n").map(str::to_owned).collect();
    let sources = vec!["tinyshakespeare".to_owned(); speeches.len()];
    let shakespeare = Table::new(vec![("text", Column::Text(speeches)), ("source", Column::Text(sources))]);
    let questions = |name: &str, limit: usize| -> Result<Table, IngestError> {
        let mut all = rows(&raw.join("gsm8k").join(name), |row| {
            Ok((row.text("question")?.to_owned(), row.text("answer")?.to_owned()))
        })?;
        all.truncate(limit);
        let (questions, answers) = all.into_iter().unzip();
        Ok(Table::new(vec![("question", Column::Text(questions)), ("answer", Column::Text(answers))]))
    };
    Ok(vec![
        ("tinyshakespeare.parquet".to_owned(), shakespeare.to_parquet()?),
        ("gsm8k-train.parquet".to_owned(), questions("train.jsonl", GSM8K_TRAIN_ROWS)?.to_parquet()?),
        ("gsm8k-test.parquet".to_owned(), questions("test.jsonl", usize::MAX)?.to_parquet()?),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_removed_from_the_working() {
        let question = Question { question: "Q".to_owned(), answer: "48/2 = <<48/2=24>>24.\n#### 1,024".to_owned() };
        assert_eq!(question.document(), "Q\n48/2 = 24.\n#### 1,024");
        assert_eq!(question.final_answer(), "1,024");
    }
}
