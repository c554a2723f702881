//! What can go wrong in an evaluation.

/// Errors of this crate. `Display` never repeats a source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of questions cannot be used.
    #[error("the questions cannot be used")]
    Data(#[from] dsv3_data::DataError),
    /// The model could not answer.
    #[error("the model could not answer")]
    Infer(#[from] dsv3_infer::Error),
    /// An item does not fit the model.
    #[error("{item}: {message}")]
    Item {
        /// Which item.
        item: String,
        /// Why not.
        message: String,
    },
}

impl From<Error> for dsv3_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Data(error) => error.into(),
            Error::Infer(error) => error.into(),
            Error::Item { .. } => Self::data(error.to_string()),
        }
    }
}
