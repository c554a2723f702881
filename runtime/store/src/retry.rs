//! Which failures pass by themselves, and how often something is tried again: `attempts` times, with waits that double up
//! to a longest one. Number and waits are fixed by the options, without chance.
//!
//! The cloud clients' own retries are switched off. They count a connection that was cut before the answer as "not sent"
//! and send a conditional create again without a word, so that we could not tell an object of ours from another's.

use std::{error::Error as StdError, io, time::Duration};

use futures::future::BoxFuture;
use object_store::{Error, client::HttpError};

use crate::StoreOptions;

/// How often and when something is tried again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retry {
    attempts: u32,
    wait: Duration,
    wait_max: Duration,
}

/// What is left of the attempts of one operation.
#[derive(Debug)]
pub(crate) struct Tries {
    left: u32,
    wait: Duration,
    wait_max: Duration,
}

impl Retry {
    pub(crate) fn new(options: &StoreOptions) -> Self {
        Self {
            attempts: options.attempts,
            wait: Duration::from_millis(options.backoff_ms),
            wait_max: Duration::from_millis(options.backoff_ms_max),
        }
    }

    pub(crate) fn tries(&self) -> Tries {
        Tries { left: self.attempts.saturating_sub(1), wait: self.wait.min(self.wait_max), wait_max: self.wait_max }
    }

    /// Tries `attempt` again while it fails in a way that passes by itself.
    pub(crate) async fn run<'a, T>(
        &self,
        attempt: impl Fn() -> BoxFuture<'a, object_store::Result<T>>,
    ) -> object_store::Result<T> {
        let mut tries = self.tries();
        loop {
            match attempt().await {
                Err(error) if is_transient(&error) && tries.wait(&error).await => {}
                outcome => return outcome,
            }
        }
    }
}

impl Tries {
    /// Waits for the next attempt; false when there is none left.
    pub(crate) async fn wait(&mut self, error: &Error) -> bool {
        let Some(wait) = self.next_wait() else { return false };
        tracing::warn!(%error, "trying again in {wait:?}");
        tokio::time::sleep(wait).await;
        true
    }

    fn next_wait(&mut self) -> Option<Duration> {
        self.left = self.left.checked_sub(1)?;
        let wait = self.wait;
        self.wait = (wait * 2).min(self.wait_max);
        Some(wait)
    }
}

/// A body that ended early.
pub(crate) fn short_body(store: &'static str, bytes: u64, expected: u64) -> Error {
    let text = format!("{bytes} bytes arrived instead of {expected}");
    Error::Generic { store, source: Box::new(io::Error::new(io::ErrorKind::UnexpectedEof, text)) }
}

/// Whether the same request may end otherwise a little later: the network, a server that is busy or restarts, bytes that
/// did not all arrive.
pub(crate) fn is_transient(error: &Error) -> bool {
    let Error::Generic { source, .. } = error else {
        return false;
    };
    let mut cause: Option<&(dyn StdError + 'static)> = Some(source.as_ref());
    while let Some(error) = cause {
        if error.is::<HttpError>() {
            return true;
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return passes(error.kind());
        }
        cause = error.source();
    }
    // The crate keeps the type that holds the status to itself; `tests/conformance` holds us to its words.
    let text = source.to_string();
    let status = text.split("status code: ").nth(1).and_then(|rest| rest.get(..3)?.parse::<u16>().ok());
    match status {
        Some(status) => status >= 500 || status == 429 || status == 408,
        // A success whose body says that it was none.
        None => text.contains("InternalError") || text.contains("SlowDown"),
    }
}

fn passes(kind: io::ErrorKind) -> bool {
    use io::ErrorKind as K;
    matches!(
        kind,
        K::Interrupted
            | K::TimedOut
            | K::WouldBlock
            | K::ConnectionReset
            | K::ConnectionAborted
            | K::ConnectionRefused
            | K::BrokenPipe
            | K::UnexpectedEof
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        Error::Generic { store: "s", source: source.into() }
    }

    #[test]
    fn statuses_and_cut_bodies_pass_and_full_disks_do_not() {
        for status in [500, 502, 503, 504, 429, 408] {
            assert!(is_transient(&generic(format!("Server returned non-2xx status code: {status} Oh: <Error/>"))));
        }
        for status in [400, 403, 404, 411, 416] {
            assert!(!is_transient(&generic(format!("Server returned non-2xx status code: {status} Oh: 503"))));
        }
        assert!(is_transient(&generic("Server returned error response: <Code>InternalError</Code>")));
        assert!(is_transient(&short_body("s", 1, 2)));
        assert!(!is_transient(&generic(io::Error::from(io::ErrorKind::StorageFull))));
        assert!(!is_transient(&Error::NotImplemented { operation: "o".into(), implementer: "i".into() }));
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let options = StoreOptions { attempts: 5, backoff_ms: 100, backoff_ms_max: 300, ..StoreOptions::default() };
        let mut tries = Retry::new(&options).tries();
        let waits: Vec<u128> = std::iter::from_fn(|| tries.next_wait()).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [100, 200, 300, 300]);
    }
}
