//! One error type for what crosses crate walls at run time, sorted by what the operator does next.

use std::fmt;

/// What the operator does next; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// Mend the configuration, the command line or the hook's world (exit 64).
    Invalid,
    /// Mend the data, the stored bytes or the hook (exit 65).
    Data,
    /// Make something available: a store, a disk, memory, a port (exit 69).
    Unavailable,
    /// Report a bug (exit 70).
    Internal,
    /// Run again; the stage stopped at a checkpoint because it was asked to (exit 75).
    Cancelled,
}

impl ErrorKind {
    /// Exit code of the command line.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Invalid => 64,
            Self::Data => 65,
            Self::Unavailable => 69,
            Self::Internal => 70,
            Self::Cancelled => 75,
        }
    }
}

/// An error with its kind, where it happened, and what to do about it.
#[derive(Debug)]
pub struct Error {
    /// What the operator does next.
    pub kind: ErrorKind,
    /// What happened and where.
    pub message: String,
    /// What to do next, when the message alone does not say.
    pub help: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), help: None, source: None }
    }

    /// [`ErrorKind::Invalid`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// [`ErrorKind::Data`].
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Data, message)
    }

    /// [`ErrorKind::Unavailable`].
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    /// [`ErrorKind::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// The stage stopped because it was asked to.
    pub fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "stopped at a checkpoint because it was asked to")
            .help("run the same command again to go on from there")
    }

    /// Adds what to do next.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds the cause.
    pub fn source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Puts `context` (stage, file, step) before the message.
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as _)
    }
}
