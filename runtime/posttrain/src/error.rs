//! What can go wrong after pretraining.

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the posttrain crate. `Display` never repeats its `source`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A record cannot be turned into tokens.
    #[error("record {record}: cannot be turned into tokens")]
    Encode {
        /// Its number in the data, from 0, with its place when it has one.
        record: String,
        /// Why.
        source: Box<dsv3_data::DataError>,
    },
    /// No record is left to learn from.
    #[error("{what}")]
    Empty {
        /// What is missing and why.
        what: String,
    },
    /// A reward failed.
    #[error("reward")]
    Reward {
        /// Its error.
        source: dsv3_core::Error,
    },
    /// The model could not generate.
    #[error("generating with the model")]
    Generate {
        /// Its error.
        source: dsv3_infer::Error,
    },
}

impl From<Error> for dsv3_core::Error {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Encode { source, .. } => Self::from(*source).context(message),
            Error::Empty { .. } => Self::data(message),
            Error::Reward { source } => source.context(message),
            Error::Generate { source: dsv3_infer::Error::Cancelled } => Self::cancelled(),
            Error::Generate { source } => Self::from(source).context(message),
        }
    }
}
