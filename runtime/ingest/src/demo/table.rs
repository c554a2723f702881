//! Small tables written as Parquet, so that equal content is equal bytes under one version of the writer.

use std::{path::Path, sync::Arc};

use arrow::{
    array::{ArrayRef, Float64Array, Int64Array, ListBuilder, RecordBatch, StringArray, StringBuilder},
    datatypes::{Field, Schema},
};
use dsv3_data::DataError;
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::properties::WriterProperties,
};

use crate::error::IngestError;

/// A column.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// One text per row.
    Text(Vec<String>),
    /// Several texts per row.
    Texts(Vec<Vec<String>>),
    /// One whole number per row.
    Integer(Vec<i64>),
    /// One number per row.
    Number(Vec<f64>),
}

impl Column {
    fn len(&self) -> usize {
        match self {
            Self::Text(rows) => rows.len(),
            Self::Texts(rows) => rows.len(),
            Self::Integer(rows) => rows.len(),
            Self::Number(rows) => rows.len(),
        }
    }

    fn array(&self) -> ArrayRef {
        match self {
            Self::Text(rows) => Arc::new(StringArray::from_iter_values(rows)),
            Self::Integer(rows) => Arc::new(Int64Array::from(rows.clone())),
            Self::Number(rows) => Arc::new(Float64Array::from(rows.clone())),
            Self::Texts(rows) => {
                let mut list = ListBuilder::new(StringBuilder::new());
                rows.iter().for_each(|row| list.append_value(row.iter().map(Some)));
                Arc::new(list.finish())
            }
        }
    }
}

/// Named columns of equal length.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    columns: Vec<(&'static str, Column)>,
}

impl Table {
    /// A table.
    pub fn new(columns: Vec<(&'static str, Column)>) -> Self {
        Self { columns }
    }

    /// Rows of the table.
    pub fn rows(&self) -> usize {
        self.columns.first().map_or(0, |(_, column)| column.len())
    }

    fn batch(&self) -> Result<RecordBatch, ParquetError> {
        let arrays: Vec<ArrayRef> = self.columns.iter().map(|(_, column)| column.array()).collect();
        let field = |(name, array): (&'static str, &ArrayRef)| Field::new(name, array.data_type().clone(), false);
        let names = self.columns.iter().map(|(name, _)| *name);
        let fields: Vec<Field> = names.zip(&arrays).map(field).collect();
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
    }

    /// The table as one Parquet file.
    ///
    /// # Errors
    /// When columns differ in length.
    pub fn to_parquet(&self) -> Result<Vec<u8>, IngestError> {
        self.batch().and_then(|batch| encode(&batch)).map_err(unwritten)
    }

    /// The table in as few files of at most `bytes_max` bytes as a split into equal parts gives: `NAME-0.parquet` and on.
    ///
    /// # Errors
    /// When columns differ in length, or one row alone is larger.
    pub fn split(&self, name: &str, bytes_max: usize) -> Result<Vec<(String, Vec<u8>)>, IngestError> {
        let batch = self.batch().map_err(unwritten)?;
        let rows = batch.num_rows();
        for parts in 1..=rows.max(1) {
            let part = |i: usize| {
                let (start, end) = (rows * i / parts, rows * (i + 1) / parts);
                encode(&batch.slice(start, end - start)).map(|bytes| (format!("{name}-{i}.parquet"), bytes))
            };
            let files = (0..parts).map(part).collect::<Result<Vec<_>, _>>().map_err(unwritten)?;
            if files.iter().all(|(_, bytes)| bytes.len() <= bytes_max) {
                return Ok(files);
            }
        }
        Err(IngestError::Options { message: format!("one row of {name} is larger than {bytes_max} bytes") })
    }
}

fn encode(batch: &RecordBatch) -> Result<Vec<u8>, ParquetError> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(19)?))
        .set_dictionary_enabled(false)
        .set_data_page_size_limit(1 << 23)
        .set_data_page_row_count_limit(usize::MAX)
        .set_created_by("dsv3-pipeline generate".to_owned())
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties))?;
    writer.write(batch)?;
    writer.into_inner()
}

fn unwritten(source: ParquetError) -> IngestError {
    let path = Path::new("table").to_owned();
    DataError::Parquet { path, row: None, source: Box::new(source) }.into()
}
