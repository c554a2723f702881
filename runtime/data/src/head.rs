//! The first rows of a Parquet or JSONL file as a file of its own, for runs where little data will do.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use parquet::{
    arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
    errors::ParquetError,
};

use crate::error::{DataError, Result};

/// The bytes of a file of the same format with the first `rows` rows; none when `path` ends in neither `.parquet` nor
/// `.jsonl`.
///
/// # Errors
/// When the file cannot be read or is damaged.
pub fn head(path: &Path, rows: usize) -> Result<Option<Vec<u8>>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("parquet") => parquet_head(path, rows).map(Some),
        Some("jsonl") => lines(path, rows).map(Some),
        _ => Ok(None),
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|source| DataError::Io { path: path.to_owned(), source })
}

fn lines(path: &Path, rows: usize) -> Result<Vec<u8>> {
    let mut reader = BufReader::new(open(path)?);
    let mut bytes = Vec::new();
    for _ in 0..rows {
        let read = reader.by_ref().read_until(b'\n', &mut bytes);
        if read.map_err(|source| DataError::Io { path: path.to_owned(), source })? == 0 {
            break;
        }
    }
    Ok(bytes)
}

fn parquet_head(path: &Path, rows: usize) -> Result<Vec<u8>> {
    let refused =
        |error: ParquetError| DataError::Parquet { path: path.to_owned(), row: None, source: Box::new(error) };
    let builder = ParquetRecordBatchReaderBuilder::try_new(open(path)?).map_err(refused)?;
    let schema = builder.schema().clone();
    let reader = builder.with_limit(rows).build().map_err(refused)?;
    let mut writer = ArrowWriter::try_new(Vec::new(), schema, None).map_err(refused)?;
    for batch in reader {
        writer.write(&batch.map_err(|error| refused(error.into()))?).map_err(refused)?;
    }
    writer.into_inner().map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rows;

    fn rows(path: &Path) -> Vec<String> {
        Rows::open(path).unwrap().map(|row| row.unwrap().text("text").unwrap().to_owned()).collect()
    }

    #[test]
    fn the_first_rows_are_a_file_of_the_same_format() {
        let folder = tempfile::tempdir().unwrap();
        let all = folder.path().join("all.jsonl");
        let text: String = (0..9).map(|i| format!("{{\"text\": \"line {i}\"}}\n")).collect();
        std::fs::write(&all, text).unwrap();
        let cut = folder.path().join("cut.jsonl");
        std::fs::write(&cut, head(&all, 3).unwrap().unwrap()).unwrap();
        assert_eq!(rows(&cut), ["line 0", "line 1", "line 2"]);
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../pipelines/data/validation.parquet");
        let cut = folder.path().join("cut.parquet");
        std::fs::write(&cut, head(&shipped, 5).unwrap().unwrap()).unwrap();
        assert_eq!(rows(&cut), rows(&shipped)[..5]);
        assert!(head(Path::new("model.safetensors"), 3).unwrap().is_none());
        assert!(head(&folder.path().join("none.jsonl"), 3).is_err());
    }
}
