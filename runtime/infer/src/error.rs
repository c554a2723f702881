//! What can go wrong between a request and its tokens.

/// Errors of this crate. `Display` never repeats a source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request can never be served by this model or cache.
    #[error("{field}: {message}")]
    Invalid {
        /// The request's field.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests wait already; try again later")]
    Busy {
        /// Length of the queue.
        waiting: usize,
    },
    /// The scheduler's thread has ended.
    #[error("the inference engine has stopped")]
    Stopped,
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The model's logits hold NaN or no finite value.
    #[error("the model's logits at position {position} of request {request} are not finite")]
    NonFinite {
        /// Index of the request in the call.
        request: usize,
        /// Position of the token that could not be chosen.
        position: usize,
    },
    /// The model or its cache refused a step; a bug, since requests are checked before.
    #[error("the model refused a step")]
    Model(#[source] dsv3_model::Error),
    /// The operating system refused a thread.
    #[error("cannot start the inference thread")]
    Thread(#[source] std::io::Error),
}

impl Error {
    pub(crate) fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { field, message: message.into() }
    }
}

impl From<Error> for dsv3_core::Error {
    fn from(error: Error) -> Self {
        use dsv3_core::ErrorKind;
        let kind = match &error {
            Error::Invalid { .. } => ErrorKind::Invalid,
            Error::Busy { .. } | Error::Stopped | Error::Thread(_) => ErrorKind::Unavailable,
            Error::Cancelled => return Self::cancelled(),
            Error::NonFinite { .. } => ErrorKind::Data,
            Error::Model(_) => ErrorKind::Internal,
        };
        let out = Self::new(kind, error.to_string());
        match error {
            Error::Model(source) => out.source(source),
            Error::Thread(source) => out.source(source),
            _ => out,
        }
    }
}
