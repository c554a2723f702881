//! The first record of a file, read before anything runs: a wrong column is found by `validate`, not hours later.
//!
//! The same code reads it as later reads them all, so that both say the same of the same file.

use std::path::Path;

use crate::{
    error::{DataError, Result},
    records::{DocumentColumns, DocumentFile, chat_record, prompt_record, trace_record},
    rows::{Rows, is_parquet},
};

/// What the rows of a file are to be.
#[derive(Clone, Copy, Debug)]
pub enum RecordKind<'a> {
    /// Documents of a corpus, see [`crate::read_documents`].
    Documents(&'a DocumentColumns),
    /// Conversations, see [`crate::read_chat`].
    Chat,
    /// Prompts with answers, see [`crate::read_prompts`].
    Prompts,
    /// Distillation traces, see [`crate::read_traces`].
    Traces,
}

/// Whether the file at `path` has the columns of this kind. Of a corpus in Parquet the schema is read and no text. What
/// else is wrong with the file (damage, nulls) is for the reading to say.
///
/// # Errors
/// A missing column, or a corpus's text column of a wrong type.
pub fn check_columns(path: &Path, kind: RecordKind<'_>) -> Result<()> {
    match first(path, kind) {
        Err(error @ DataError::Column { .. }) => Err(error),
        _ => Ok(()),
    }
}

fn first(path: &Path, kind: RecordKind<'_>) -> Result<()> {
    if let RecordKind::Documents(columns) = kind
        && is_parquet(path)?
    {
        return DocumentFile::open(path, columns).map(|_| ());
    }
    let Some(row) = Rows::open(path)?.next().transpose()? else { return Ok(()) };
    let result = match kind {
        RecordKind::Documents(columns) => row.text(&columns.text).map(|_| ()),
        RecordKind::Chat => chat_record(&row).map(|_| ()),
        RecordKind::Prompts => prompt_record(&row).map(|_| ()),
        RecordKind::Traces => trace_record(&row).map(|_| ()),
    };
    match result {
        Err(DataError::Value { column, .. }) if !row.has(&column) => {
            let names: Vec<&str> = row.values.keys().map(String::as_str).collect();
            let message = format!("is missing; the file has {}", names.join(", "));
            Err(DataError::Column { path: path.to_owned(), column, message })
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_column_is_found_in_the_first_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, "{\"question\": \"1 + 1\", \"answer\": 2}\n{}\n").unwrap();
        let columns = DocumentColumns::default();
        check_columns(&path, RecordKind::Prompts).unwrap();
        for (kind, column) in [(RecordKind::Documents(&columns), "text"), (RecordKind::Traces, "generations")] {
            let error = check_columns(&path, kind).unwrap_err().to_string();
            for part in ["rows.jsonl", column, "is missing; the file has", "question"] {
                assert!(error.contains(part), "{part} in {error}");
            }
        }
        // Nulls, damage and missing files are found where they are read.
        std::fs::write(&path, "{\"text\": null}\n").unwrap();
        check_columns(&path, RecordKind::Documents(&columns)).unwrap();
        std::fs::write(&path, "{").unwrap();
        check_columns(&path, RecordKind::Traces).unwrap();
        check_columns(&folder.path().join("none.jsonl"), RecordKind::Chat).unwrap();
    }
}
