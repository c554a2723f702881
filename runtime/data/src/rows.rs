//! Rows of Parquet and JSONL files as JSON objects with their place, read in batches: for data sets of chats, prompts and
//! benchmarks, whose schemas vary. Texts of a large corpus take the typed path of `records` instead.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use arrow::{
    array::{
        Array, AsArray, BooleanArray, FixedSizeListArray, LargeListArray, LargeStringArray, ListArray, StringArray,
        StringViewArray, StructArray,
    },
    datatypes::{
        DataType, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
        UInt32Type, UInt64Type,
    },
    record_batch::RecordBatch,
};
use parquet::{
    arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    file::metadata::RowGroupMetaData,
};
use serde_json::{Map, Value};

use crate::error::{DataError, Location, Place, Result};

/// Rows decoded at a time ...
pub(crate) const BATCH_ROWS: usize = 1024;
/// ... or fewer, where rows are so long that they would have more bytes than this, about.
pub(crate) const BATCH_BYTES: usize = 64 << 20;

/// One row of a file.
#[derive(Clone, Debug)]
pub struct Row {
    /// Where it stands.
    pub at: Location,
    /// Its columns. A column that is null is there as `Value::Null`.
    pub values: Map<String, Value>,
}

impl Row {
    /// The column, unless it is missing or null.
    pub fn get(&self, column: &str) -> Option<&Value> {
        self.values.get(column).filter(|value| !value.is_null())
    }

    /// Whether the row has the column, null or not.
    pub fn has(&self, column: &str) -> bool {
        self.values.contains_key(column)
    }

    /// The text of a column.
    ///
    /// # Errors
    /// When it is missing, null, or no text.
    pub fn text(&self, column: &str) -> Result<&str> {
        let value = self.get(column).ok_or_else(|| self.error(column, "is missing or null, a text is expected"))?;
        value.as_str().ok_or_else(|| self.error(column, format!("is {}, a text is expected", name_of(value))))
    }

    /// The text of a column, or `None` when it is missing or null.
    ///
    /// # Errors
    /// When it is no text.
    pub fn optional_text(&self, column: &str) -> Result<Option<&str>> {
        self.get(column).map(|_| self.text(column)).transpose()
    }

    /// The texts of a list column; a single text counts as a list of one.
    ///
    /// # Errors
    /// When it is missing, null, or holds something else.
    pub fn texts(&self, column: &str) -> Result<Vec<&str>> {
        match self.get(column) {
            Some(Value::Array(list)) => list
                .iter()
                .enumerate()
                .map(|(i, v)| {
                    v.as_str()
                        .ok_or_else(|| self.error(column, format!("item {i} is {}, a text is expected", name_of(v))))
                })
                .collect(),
            _ => Ok(vec![self.text(column)?]),
        }
    }

    /// An error that names this row and `column`.
    pub fn error(&self, column: &str, message: impl Into<String>) -> DataError {
        DataError::Value { at: self.at.clone(), column: column.to_owned(), message: message.into() }
    }

    /// An error that names this row.
    pub fn refuse(&self, message: impl Into<String>) -> DataError {
        DataError::Record { at: self.at.clone(), message: message.into() }
    }
}

fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a struct",
    }
}

/// Iterator over the rows of one file, Parquet by its content's magic, JSONL otherwise.
pub struct Rows {
    path: PathBuf,
    inner: Inner,
}

enum Inner {
    Parquet { reader: ParquetReader, batch: Option<(RecordBatch, usize)> },
    Lines { reader: Box<dyn BufRead + Send>, line: u64 },
    Done,
}

impl Rows {
    /// Opens a file.
    ///
    /// # Errors
    /// When it cannot be opened, or is Parquet with an unreadable footer.
    pub fn open(path: &Path) -> Result<Self> {
        let inner = if is_parquet(path)? {
            Inner::Parquet { reader: ParquetReader::open(path, None)?, batch: None }
        } else {
            let file = File::open(path).map_err(|source| DataError::io(path, source))?;
            Inner::Lines { reader: Box::new(BufReader::new(file)), line: 0 }
        };
        Ok(Self { path: path.to_owned(), inner })
    }

    fn step(&mut self) -> Result<Option<Row>> {
        match &mut self.inner {
            Inner::Done => Ok(None),
            Inner::Lines { reader, line } => next_line(&self.path, reader.as_mut(), line),
            Inner::Parquet { reader, batch } => loop {
                if let Some((rows, index)) = batch
                    && *index < rows.num_rows()
                {
                    let at = reader.location(*index);
                    let values = json_row(rows, *index);
                    *index += 1;
                    return Ok(Some(Row { at, values }));
                }
                match reader.next_batch()? {
                    Some(rows) => *batch = Some((rows, 0)),
                    None => return Ok(None),
                }
            },
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if !matches!(step, Some(Ok(_))) {
            self.inner = Inner::Done;
        }
        step
    }
}

/// Whether the name or the first bytes say Parquet.
pub(crate) fn is_parquet(path: &Path) -> Result<bool> {
    use std::io::Read;
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("parquet")) {
        return Ok(true);
    }
    let mut magic = [0; 4];
    let mut file = File::open(path).map_err(|source| DataError::io(path, source))?;
    let is = file.read_exact(&mut magic).is_ok() && &magic == b"PAR1";
    Ok(is)
}

fn next_line(path: &Path, reader: &mut dyn BufRead, line: &mut u64) -> Result<Option<Row>> {
    loop {
        let mut bytes = Vec::new();
        let count = reader.read_until(b'\n', &mut bytes).map_err(|source| DataError::io(path, source))?;
        if count == 0 {
            return Ok(None);
        }
        *line += 1;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let at = Location { path: path.to_owned(), place: Place::Line(*line) };
        return match serde_json::from_slice(&bytes) {
            Ok(Value::Object(values)) => Ok(Some(Row { at, values })),
            Ok(other) => {
                Err(DataError::Record { at, message: format!("is {}, a JSON object is expected", name_of(&other)) })
            }
            Err(error) => Err(DataError::Record { at, message: format!("is not JSON: {error}") }),
        };
    }
}

/// Batches of a Parquet file that know their place.
pub(crate) struct ParquetReader {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    /// First row of each row group, and the number of rows at the end.
    group_starts: Vec<u64>,
    batch_start: u64,
    next_row: u64,
}

impl ParquetReader {
    /// Opens a file, reading only `columns` when given.
    pub(crate) fn open(path: &Path, columns: Option<&[&str]>) -> Result<Self> {
        let file = File::open(path).map_err(|source| DataError::io(path, source))?;
        let broken = |source: parquet::errors::ParquetError| damaged(path, None, source);
        let builder = guarded(path, None, || ParquetRecordBatchReaderBuilder::try_new(file).map_err(broken))?;
        let mut group_starts = vec![0];
        for group in builder.metadata().row_groups() {
            let end = group_starts.last().copied().unwrap_or(0) + group.num_rows().max(0) as u64;
            group_starts.push(end);
        }
        let row_bytes = builder.metadata().row_groups().iter().map(row_bytes).max().unwrap_or(0);
        let mut builder = builder.with_batch_size((BATCH_BYTES / row_bytes.max(1)).clamp(1, BATCH_ROWS));
        if let Some(columns) = columns {
            let mask = parquet::arrow::ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
            builder = builder.with_projection(mask);
        }
        let reader = builder.build().map_err(broken)?;
        Ok(Self { path: path.to_owned(), reader, group_starts, batch_start: 0, next_row: 0 })
    }

    /// The next batch.
    pub(crate) fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        let (path, row) = (self.path.clone(), Some(self.next_row));
        let reader = &mut self.reader;
        let batch = guarded(&path, row, || reader.next().transpose().map_err(|e| damaged(&path, row, e)))?;
        self.batch_start = self.next_row;
        self.next_row += batch.as_ref().map_or(0, |rows| rows.num_rows() as u64);
        Ok(batch)
    }

    /// Place of row `index` of the newest batch.
    pub(crate) fn location(&self, index: usize) -> Location {
        let row = self.batch_start + index as u64;
        let group = self.group_starts.partition_point(|start| *start <= row).saturating_sub(1) as u64;
        Location { path: self.path.clone(), place: Place::Row { group, row } }
    }

    /// Names and types of all columns.
    pub(crate) fn schema(&self) -> arrow::datatypes::SchemaRef {
        use arrow::record_batch::RecordBatchReader;
        self.reader.schema()
    }
}

/// Mean bytes of a row of a group, as the footer says.
fn row_bytes(group: &RowGroupMetaData) -> usize {
    usize::try_from(group.total_byte_size() / group.num_rows().max(1)).unwrap_or(0)
}

pub(crate) fn damaged(
    path: &Path,
    row: Option<u64>,
    source: impl std::error::Error + Send + Sync + 'static,
) -> DataError {
    DataError::Parquet { path: path.to_owned(), row, source: Box::new(source) }
}

/// The Parquet decoder panics on some damaged files; that, too, is one clear error.
pub(crate) fn guarded<T>(path: &Path, row: Option<u64>, read: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(damaged(path, row, std::io::Error::other("the decoder gave up on inconsistent pages"))))
}

fn json_row(batch: &RecordBatch, index: usize) -> Map<String, Value> {
    let schema = batch.schema();
    let columns = schema.fields().iter().zip(batch.columns());
    columns.map(|(field, column)| (field.name().clone(), json_value(column.as_ref(), index))).collect()
}

/// A cell as JSON; null for types that JSON cannot carry.
fn json_value(array: &dyn Array, index: usize) -> Value {
    if array.is_null(index) {
        return Value::Null;
    }
    let any = array.as_any();
    macro_rules! primitive {
        ($type:ty) => {
            Value::from(array.as_primitive::<$type>().value(index))
        };
    }
    match array.data_type() {
        DataType::Utf8 => any.downcast_ref::<StringArray>().map_or(Value::Null, |a| Value::from(a.value(index))),
        DataType::LargeUtf8 => {
            any.downcast_ref::<LargeStringArray>().map_or(Value::Null, |a| Value::from(a.value(index)))
        }
        DataType::Utf8View => {
            any.downcast_ref::<StringViewArray>().map_or(Value::Null, |a| Value::from(a.value(index)))
        }
        DataType::Boolean => any.downcast_ref::<BooleanArray>().map_or(Value::Null, |a| Value::from(a.value(index))),
        DataType::Int8 => primitive!(Int8Type),
        DataType::Int16 => primitive!(Int16Type),
        DataType::Int32 => primitive!(Int32Type),
        DataType::Int64 => primitive!(Int64Type),
        DataType::UInt8 => primitive!(UInt8Type),
        DataType::UInt16 => primitive!(UInt16Type),
        DataType::UInt32 => primitive!(UInt32Type),
        DataType::UInt64 => primitive!(UInt64Type),
        DataType::Float32 => primitive!(Float32Type),
        DataType::Float64 => primitive!(Float64Type),
        DataType::List(_) => any.downcast_ref::<ListArray>().map_or(Value::Null, |a| json_list(&a.value(index))),
        DataType::LargeList(_) => {
            any.downcast_ref::<LargeListArray>().map_or(Value::Null, |a| json_list(&a.value(index)))
        }
        DataType::FixedSizeList(..) => {
            any.downcast_ref::<FixedSizeListArray>().map_or(Value::Null, |a| json_list(&a.value(index)))
        }
        DataType::Struct(_) => any.downcast_ref::<StructArray>().map_or(Value::Null, |a| {
            let names = a.column_names().into_iter().map(str::to_owned);
            Value::Object(names.zip(a.columns()).map(|(n, c)| (n, json_value(c.as_ref(), index))).collect())
        }),
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = dictionary.normalized_keys().get(index).copied().unwrap_or(0);
            json_value(dictionary.values().as_ref(), key)
        }
        _ => Value::Null,
    }
}

fn json_list(items: &dyn Array) -> Value {
    Value::Array((0..items.len()).map(|i| json_value(items, i)).collect())
}
