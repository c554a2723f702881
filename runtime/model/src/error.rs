//! What can go wrong between this crate and the disk or its caller.

use std::path::PathBuf;

use crate::Problem;

/// An error of the model crate. `Display` never repeats its `source`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{path}: cannot be read")]
    Read {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `config.json` is not JSON, or a field has the wrong type.
    #[error("config.json cannot be understood")]
    Json {
        /// Where and why.
        source: serde_json::Error,
    },
    /// `config.json` describes something that is not a DeepSeek-V3-class model, or sizes that do not fit together.
    #[error("the model's configuration is wrong: {}", listed(.problems))]
    Config {
        /// Every problem.
        problems: Vec<Problem>,
    },
    /// A weights file or index is damaged.
    #[error("{path}: {what}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor is missing.
    #[error("{folder}: no tensor {name}")]
    Missing {
        /// The model's folder.
        folder: PathBuf,
        /// Published name.
        name: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("{name}: stored as {found:?}, the configuration asks for {wanted:?}")]
    Shape {
        /// Published name.
        name: String,
        /// In the file.
        found: Vec<usize>,
        /// By the configuration.
        wanted: Vec<usize>,
    },
    /// A tensor has an element type this place cannot take.
    #[error("{name}: stored as {found}, which cannot be read as {wanted}")]
    Type {
        /// Published name.
        name: String,
        /// In the file.
        found: String,
        /// What was expected.
        wanted: &'static str,
    },
    /// Writing failed in the caller's sink.
    #[error("{name}: cannot be written")]
    Write {
        /// Which file.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// A sequence of the cache is unknown, too long, or the pool has no free page.
    #[error("latent cache: {what}")]
    Cache {
        /// What and which.
        what: String,
    },
    /// An input does not suit the model.
    #[error("{what}")]
    Input {
        /// What and why.
        what: String,
    },
}

fn listed(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(|p| format!("{}: {}", p.field, p.message)).collect();
    lines.join("; ")
}

impl From<Error> for dsv3_core::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Read { .. } | Error::Write { .. } => dsv3_core::ErrorKind::Unavailable,
            Error::Cache { .. } => dsv3_core::ErrorKind::Internal,
            Error::Input { .. } | Error::Config { .. } => dsv3_core::ErrorKind::Invalid,
            _ => dsv3_core::ErrorKind::Data,
        };
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        dsv3_core::Error::new(kind, message)
    }
}
