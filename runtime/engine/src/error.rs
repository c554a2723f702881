//! The one error type of this crate.

use dsv3_core::{Error, ErrorKind};
use dsv3_store::StoreError;

use crate::diagnostics::Diagnostics;

/// Why a pipeline was refused or a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The pipeline has problems; all of them are here, with their places.
    #[error("{0}")]
    Refused(Diagnostics),
    /// Something failed while planning or running.
    #[error("{0}")]
    Failed(Error),
}

impl EngineError {
    /// What the operator does next.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused(_) => ErrorKind::Invalid,
            Self::Failed(error) => error.kind,
        }
    }

    /// The message and its causes, one per element.
    pub fn chain(&self) -> Vec<String> {
        match self {
            Self::Refused(diagnostics) => diagnostics.problems.iter().map(|problem| problem.message.clone()).collect(),
            Self::Failed(error) => chain(error),
        }
    }

    /// What to do next, when the messages alone do not say.
    pub fn help(&self) -> Option<&str> {
        match self {
            Self::Refused(_) => None,
            Self::Failed(error) => error.help.as_deref(),
        }
    }
}

/// An error and its causes, one per element.
pub(crate) fn chain(error: &Error) -> Vec<String> {
    let mut messages = vec![error.to_string()];
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        messages.push(error.to_string());
        cause = error.source();
    }
    messages
}

impl From<Diagnostics> for EngineError {
    fn from(diagnostics: Diagnostics) -> Self {
        Self::Refused(diagnostics)
    }
}

impl From<Error> for EngineError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}
