//! What can go wrong between a run and its store.

use std::io;

use dsv3_core::{Digest, Error, ErrorKind};

/// Result of the store.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// An error of the store. Paths are relative to the store's URL unless absolute.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL names no store.
    #[error("{url:?} is not a store: {problem}")]
    Url {
        /// As written.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Two creates of one object both succeeded.
    #[error("{url} does not honour conditional create: of two writers of one object both would win")]
    Unconditional {
        /// The store.
        url: String,
    },
    /// There is no such object.
    #[error("cannot {op} {path}: it does not exist")]
    Missing {
        /// What was tried.
        op: &'static str,
        /// Which object.
        path: String,
    },
    /// The store refuses or cannot be reached.
    #[error("cannot {op} {path}: {cause}")]
    Unavailable {
        /// What was tried.
        op: &'static str,
        /// Which object.
        path: String,
        /// The store's own words.
        cause: String,
    },
    /// The store is there and lets this user not do it: a read-only mount, a right that is missing.
    #[error("cannot {op} {path}: {cause}")]
    Denied {
        /// What was tried.
        op: &'static str,
        /// Which object.
        path: String,
        /// The system's or the store's own words.
        cause: String,
    },
    /// A local file refuses.
    #[error("cannot {op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// Which file.
        path: String,
        /// The system's error.
        source: io::Error,
    },
    /// Stored bytes are not what was written.
    #[error("{path} is damaged: {problem}")]
    Damaged {
        /// Which object.
        path: String,
        /// How it shows.
        problem: String,
    },
    /// A record of a newer build.
    #[error(
        "{path} is of format {format}, written by {}; this build ({}) reads up to {newest}",
        build.as_ref().map_or_else(|| "a newer dsv3-pipeline".to_owned(), |build| format!("dsv3-pipeline {build}")),
        env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// Which object.
        path: String,
        /// Its format.
        format: u64,
        /// The newest that this build reads.
        newest: u64,
        /// Version of the program that wrote it, if it says.
        build: Option<String>,
    },
    /// A checkpoint whose slices do not tile its tensors was to be written.
    #[error("the checkpoint of step {step} is not whole: {problem}")]
    Table {
        /// Step of the checkpoint.
        step: u64,
        /// What is wrong with its table.
        problem: String,
    },
    /// A number was asked for at which there is no checkpoint.
    #[error(
        "this stage has no checkpoint {seq}; {}",
        if there.is_empty() { "it has none at all".to_owned() } else { format!("it has {}", numbers(there)) }
    )]
    NoCheckpoint {
        /// The number.
        seq: u64,
        /// The numbers at which there is one, damaged ones included.
        there: Vec<u64>,
    },
    /// A file outside the store is gone.
    #[error("input file {path} does not exist any more")]
    SourceMissing {
        /// Which file.
        path: String,
    },
    /// A file outside the store is no longer what the plan saw.
    #[error("input file {path} has changed since the plan was made")]
    SourceChanged {
        /// Which file.
        path: String,
    },
    /// An artifact of another kind.
    #[error("artifact {} is of kind {found}, {expected} is expected", digest.short())]
    Kind {
        /// Its manifest.
        digest: Digest,
        /// The kind the port wants.
        expected: String,
        /// The kind it has.
        found: String,
    },
    /// An artifact lacks a file.
    #[error("artifact of kind {kind} has no file {path}; it has: {files}")]
    NoSuchFile {
        /// Kind of the artifact.
        kind: String,
        /// The file that was asked for.
        path: String,
        /// The files it has.
        files: String,
    },
    /// A path inside an artifact that would leave its folder.
    #[error("{path:?} is not a path inside an artifact")]
    BadPath {
        /// As given.
        path: String,
    },
    /// Another process committed at this sequence number.
    #[error("{path} was written by another process, which has taken over this stage")]
    Taken {
        /// The record that was in the way.
        path: String,
    },
    /// A value that JSON cannot hold.
    #[error("cannot encode {path} as JSON")]
    Encode {
        /// Where it was to go.
        path: String,
        /// The encoder's error.
        source: serde_json::Error,
    },
    /// Asked to stop while waiting for a lease.
    #[error("stopped while waiting for {holder} to finish stage {key}")]
    Cancelled {
        /// Who holds it.
        holder: String,
        /// The stage's key.
        key: String,
    },
    /// Another process holds the stage and the caller does not wait.
    #[error("{holder} holds this stage; its heartbeat changed {:.1} s ago", seconds(.silent_ms))]
    Held {
        /// Who holds it.
        holder: String,
        /// The run it works for.
        run: String,
        /// Milliseconds since its heartbeat was last seen to change, on this process's clock.
        silent_ms: u64,
    },
    /// Another process has taken over the stage from this one.
    #[error("{taker} has taken over this stage; this process commits nothing more")]
    Fenced {
        /// Who holds it now.
        taker: String,
        /// The run it works for.
        run: String,
    },
    /// A task of this process died.
    #[error("a task of the store ended early: {cause}")]
    Task {
        /// Its panic or cancellation.
        cause: String,
    },
}

/// Whether a disk that takes no writes is behind the error.
fn is_refusal(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied);
        }
        cause = error.source();
    }
    false
}

/// Milliseconds as seconds; `thiserror` hands fields by reference.
fn seconds(millis: &u64) -> f64 {
    *millis as f64 / 1000.0
}

/// Numbers as a list.
fn numbers(numbers: &[u64]) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

impl StoreError {
    /// What the operator does next.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Url { .. } | Self::Unconditional { .. } => ErrorKind::Invalid,
            Self::Missing { .. }
            | Self::Damaged { .. }
            | Self::Newer { .. }
            | Self::NoCheckpoint { .. }
            | Self::SourceChanged { .. }
            | Self::Kind { .. }
            | Self::NoSuchFile { .. } => ErrorKind::Data,
            Self::SourceMissing { .. } | Self::Unavailable { .. } | Self::Denied { .. } | Self::Io { .. } => {
                ErrorKind::Unavailable
            }
            Self::Cancelled { .. } | Self::Taken { .. } | Self::Held { .. } | Self::Fenced { .. } => {
                ErrorKind::Cancelled
            }
            Self::BadPath { .. } | Self::Encode { .. } | Self::Table { .. } | Self::Task { .. } => ErrorKind::Internal,
        }
    }

    fn help(&self) -> Option<&'static str> {
        Some(match self {
            Self::Url { .. } => "use file://./FOLDER, file:///FOLDER, memory://, s3://BUCKET/PREFIX, gs:// or az://",
            Self::Unconditional { .. } => {
                "use a store that honours `If-None-Match: *`; or, if you promise that never two processes work on this one \
                 at the same time, write `store: { url: .., conditional_create: single_writer }`"
            }
            Self::Missing { .. } => "restore the file, or run again without --from or --only so that it is made anew",
            Self::Newer { .. } => {
                "use that version of dsv3-pipeline, or a newer one; nothing was changed, and every format up to its own is \
                 read by each version"
            }
            Self::NoCheckpoint { .. } => {
                "give a number that is there; `dsv3-pipeline inspect RUN STAGE` tells the step of each"
            }
            Self::Damaged { .. } => "delete the damaged object and run again: what made it is made anew",
            Self::SourceMissing { .. } => "restore the file and run again; what was finished stays finished",
            Self::SourceChanged { .. } => "run the pipeline again: a new plan takes the new content",
            Self::Denied { op: "create" | "write" | "store" | "delete" | "open the store", .. } => {
                "give write access or name another store with --store; what this one holds is untouched and can be read \
                 (plan, explain, runs, inspect, get)"
            }
            Self::Denied { .. } => "give read access, then run again",
            Self::Unavailable { .. } | Self::Io { .. } => {
                "make room or give access, then run again; nothing that was committed is lost"
            }
            Self::Taken { .. } | Self::Fenced { .. } => {
                "nothing is lost: the other process goes on from the last checkpoint; run the same command again to wait \
                 for its result"
            }
            Self::Held { .. } => "run again when it has ended, or wait for it with --if-held wait",
            Self::Cancelled { .. } => "run the same command again",
            _ => return None,
        })
    }

    pub(crate) fn io(op: &'static str, path: impl AsRef<std::path::Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().display().to_string();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { op, path },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::Denied { op, path, cause: source.to_string() }
            }
            _ => Self::Io { op, path, source },
        }
    }

    pub(crate) fn object(op: &'static str, path: &str, error: object_store::Error) -> Self {
        let path = path.to_owned();
        match &error {
            object_store::Error::NotFound { .. } => Self::Missing { op, path },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Self::Denied { op, path, cause: error.to_string() }
            }
            _ if is_refusal(&error) => Self::Denied { op, path, cause: error.to_string() },
            _ => Self::Unavailable { op, path, cause: error.to_string() },
        }
    }

    pub(crate) fn damaged(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), problem: problem.into() }
    }
}

impl From<tokio::task::JoinError> for StoreError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::Task { cause: error.to_string() }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let mut folded = Error::new(error.kind(), error.to_string());
        if let Some(help) = error.help() {
            folded = folded.help(help);
        }
        match error {
            StoreError::Io { source, .. } => folded.source(source),
            StoreError::Encode { source, .. } => folded.source(source),
            _ => folded,
        }
    }
}
