//! What can go wrong in training.

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the train crate. `Display` never repeats its `source`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model has no FP32 masters.
    #[error("the model was loaded for inference: parameter {name} has no FP32 master")]
    NotTrainable {
        /// Which parameter.
        name: String,
    },
    /// A batch does not suit the model.
    #[error("step {step}: the model cannot take the batch")]
    Batch {
        /// Number of the step, from 1.
        step: u64,
        /// The model's words.
        source: dsv3_model::Error,
    },
    /// A step was given nothing to learn from.
    #[error("step {step}: no position of the batch has a target")]
    NoTargets {
        /// Number of the step, from 1.
        step: u64,
    },
    /// Too many steps in a row were not finite.
    #[error("step {step}: the loss or the gradient was not finite {count} times in a row")]
    NotFinite {
        /// Number of the last one, from 1.
        step: u64,
        /// How many.
        count: u32,
    },
    /// Rewinding did not help.
    #[error("step {step}: the loss spiked again after {count} rewinds")]
    Spikes {
        /// Number of the step, from 1.
        step: u64,
        /// Rewinds so far.
        count: u32,
    },
    /// A checkpoint does not fit the run that reads it.
    #[error("checkpoint file {file}: {problem}")]
    Checkpoint {
        /// Which file of the checkpoint.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A value that JSON cannot hold, or JSON that is not the state of a trainer.
    #[error("the state of the trainer cannot be read or written as JSON")]
    State {
        /// Where and why.
        source: serde_json::Error,
    },
    /// There is no memory for the copy that a checkpoint is written from.
    #[error("no memory for a checkpoint")]
    Memory {
        /// The system's words.
        source: std::io::Error,
    },
    /// The checkpoint store refused.
    #[error("checkpoints")]
    Store {
        /// The store's error.
        source: dsv3_core::Error,
    },
    /// The data source or a hook failed.
    #[error("step {step}: the data of the step")]
    Source {
        /// Number of the step, from 1.
        step: u64,
        /// Its error.
        source: dsv3_core::Error,
    },
    /// The run stopped at a checkpoint because it was asked to.
    #[error("stopped at a checkpoint because it was asked to")]
    Cancelled,
}

impl From<Error> for dsv3_core::Error {
    fn from(error: Error) -> Self {
        use dsv3_core::ErrorKind;
        let message = error.to_string();
        match error {
            Error::Cancelled => Self::cancelled(),
            // These carry a kind and a help of their own.
            Error::Store { source } | Error::Source { source, .. } => source.context(message),
            Error::Batch { source, .. } => Self::from(source).context(message),
            Error::NotFinite { .. } | Error::Spikes { .. } => Self::new(ErrorKind::Data, message)
                .help("lower the learning rate, or look at the samples that the warnings before name"),
            Error::Checkpoint { .. } => Self::new(ErrorKind::Data, message),
            Error::State { source } => Self::new(ErrorKind::Data, message).source(source),
            Error::Memory { source } => Self::unavailable(message).source(source),
            Error::NotTrainable { .. } => Self::new(ErrorKind::Internal, message),
            Error::NoTargets { .. } => Self::new(ErrorKind::Data, message),
        }
    }
}
