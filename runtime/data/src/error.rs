//! What can be wrong with data, always with the place: file, row (counted from 0 in its file, with the row group where
//! the format has them) or line (counted from 1), and column.

use std::{fmt, path::PathBuf};

use dsv3_core::{Error, ErrorKind};

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub path: PathBuf,
    /// Where in it.
    pub place: Place,
}

/// A position inside a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Of a Parquet file.
    Row {
        /// Row group, counted from 0.
        group: u64,
        /// Row of the file, counted from 0.
        row: u64,
    },
    /// Of a JSONL file, counted from 1.
    Line(u64),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Row { group, row } => write!(f, "{}: row {row} (row group {group})", self.path.display()),
            Place::Line(line) => write!(f, "{}: line {line}", self.path.display()),
        }
    }
}

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be opened, read or written.
    #[error("{}: cannot be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bytes are not the Parquet file they should be.
    #[error("{}: not a readable Parquet file{}", path.display(), near(*row))]
    Parquet {
        /// The file.
        path: PathBuf,
        /// How many rows were read before the fault, when it is not in the footer.
        row: Option<u64>,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A needed column is missing or has a type that cannot be used.
    #[error("{}: column {column:?}: {message}", path.display())]
    Column {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// What is wrong.
        message: String,
    },
    /// One value is missing or of the wrong type.
    #[error("{at}: column {column:?}: {message}")]
    Value {
        /// Where.
        at: Location,
        /// The column.
        column: String,
        /// What is wrong.
        message: String,
    },
    /// A line or row that cannot be used as a whole.
    #[error("{at}: {message}")]
    Record {
        /// Where.
        at: Location,
        /// What is wrong.
        message: String,
    },
    /// A file whose content is not what its port takes.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A tokenizer that cannot be read, trained or used.
    #[error("tokenizer: {message}")]
    Tokenizer {
        /// What is wrong.
        message: String,
    },
    /// A chat template that cannot be read or applied.
    #[error("chat template: {message}")]
    Template {
        /// What is wrong.
        message: String,
    },
    /// Options that fit no data.
    #[error("{message}")]
    Options {
        /// What is wrong.
        message: String,
    },
    /// A file of an artifact could not be handed on.
    #[error("{name}: cannot be stored")]
    Sink {
        /// Name of the file in its artifact.
        name: String,
        /// Why.
        source: Error,
    },
}

fn near(row: Option<u64>) -> String {
    row.map(|row| format!(" (after {row} rows)")).unwrap_or_default()
}

/// Result of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

impl DataError {
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    pub(crate) fn tokenizer(message: impl fmt::Display) -> Self {
        Self::Tokenizer { message: message.to_string() }
    }

    pub(crate) fn template(message: impl fmt::Display) -> Self {
        Self::Template { message: message.to_string() }
    }

    pub(crate) fn options(message: impl Into<String>) -> Self {
        Self::Options { message: message.into() }
    }

    /// What the operator does next.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Template { .. } | Self::Options { .. } => ErrorKind::Invalid,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => ErrorKind::Unavailable,
            Self::Sink { source, .. } => source.kind,
            _ => ErrorKind::Data,
        }
    }

    fn help(&self) -> Option<&'static str> {
        match self {
            Self::Parquet { .. } => Some("the file is damaged or cut short: write or download it again"),
            Self::Column { .. } => Some(
                "name the column in the stage's config (`columns: { text: NAME }` in ingest), or rename it in the file",
            ),
            Self::Value { .. } | Self::Record { .. } => Some("mend or remove this row"),
            _ => None,
        }
    }
}

impl From<DataError> for Error {
    fn from(error: DataError) -> Self {
        if let DataError::Sink { name, source } = error {
            return source.context(name);
        }
        let (kind, help) = (error.kind(), error.help());
        let mut out = Error::new(kind, error.to_string());
        if let Some(help) = help {
            out = out.help(help);
        }
        match error {
            DataError::Io { source, .. } => out.source(source),
            DataError::Parquet { source, .. } => out.source(Cause(source)),
            _ => out,
        }
    }
}

/// A boxed error as an error.
#[derive(Debug)]
struct Cause(Box<dyn std::error::Error + Send + Sync>);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}
