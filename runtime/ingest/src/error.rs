//! What can go wrong while documents become tokens.

use std::path::{Path, PathBuf};

use dsv3_core::{Error, ErrorKind};
use dsv3_data::{DataError, Location};
use dsv3_hooks::HookError;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// A file, record, tokenizer or shard.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Options that contradict each other or the tokenizer.
    #[error("{message}")]
    Options {
        /// What is wrong.
        message: String,
    },
    /// The filter failed.
    #[error("{at}: the document filter failed")]
    Filter {
        /// The document, or the first one of the batch when the fault lies with no single one.
        at: Box<Location>,
        /// Why.
        source: Box<HookError>,
    },
    /// A document cannot be tokenised.
    #[error("{at}: cannot be tokenised")]
    Document {
        /// The document.
        at: Box<Location>,
        /// Why.
        source: DataError,
    },
    /// The scratch folder refuses.
    #[error("{}: cannot be written or read back", path.display())]
    Scratch {
        /// The file in it.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Every document was dropped.
    #[error("no document is left of {read}: {dropped}")]
    Empty {
        /// Documents read.
        read: u64,
        /// What dropped them.
        dropped: String,
    },
    /// The caller asked to stop.
    #[error("stopped because it was asked to")]
    Cancelled,
}

impl IngestError {
    pub(crate) fn scratch(path: &Path, source: std::io::Error) -> Self {
        Self::Scratch { path: path.to_owned(), source }
    }
}

impl From<IngestError> for Error {
    fn from(error: IngestError) -> Self {
        let message = error.to_string();
        match error {
            IngestError::Data(inner) => inner.into(),
            IngestError::Options { .. } => Error::invalid(message),
            IngestError::Filter { source, .. } => {
                Error::new(source.kind(), message).help(source.help()).source(*source)
            }
            IngestError::Document { source, .. } => Error::new(source.kind(), message)
                .help("break the document up, or have a filter drop it; this tokenizer cannot take it as it is")
                .source(source),
            IngestError::Scratch { source, .. } => Error::unavailable(message)
                .help("make room in the folder for temporary files ($TMPDIR), then run again; nothing that was committed is lost")
                .source(source),
            IngestError::Empty { .. } => Error::data(message).help("check the filter's configuration and the inputs"),
            IngestError::Cancelled => Error::new(ErrorKind::Cancelled, message),
        }
    }
}
