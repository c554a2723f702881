//! SIGTERM, SIGINT and SIGUSR1, or the time given by `--stop-after`, ask the run to checkpoint and stop (exit 75). A second
//! SIGINT ends the process at once; what was committed stays, the next run goes on from the last checkpoint. A second
//! SIGTERM or SIGUSR1 changes nothing: queues send several. SIGXFSZ does nothing, so that a file that may not grow is an
//! error of its writer (exit 69) and not the end of the process.
//!
//! The handlers stay to the end of the process, so a signal after the last stage does not change how it ends.

use std::time::Duration;

use crate::{
    common::{self, Failure},
    runner::Span,
};
use dsv3_core::{Cancel, Error, ErrorKind};
use tokio::signal::unix::{SignalKind, signal};

/// Number of SIGXFSZ on Linux and macOS.
const FILE_TOO_LARGE: i32 = 25;
/// How often a request to stop is looked at while the command waits for something that does not look itself.
const LOOK: Duration = Duration::from_millis(20);

/// Watches from now on, in the background.
pub(crate) fn watch(cancel: Cancel, stop_after: Option<Span>) -> Result<(), Error> {
    let refused = |error| Error::internal("cannot watch for signals").source(error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(refused)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(refused)?;
    let mut user = signal(SignalKind::user_defined1()).map_err(refused)?;
    let mut file_too_large = signal(SignalKind::from_raw(FILE_TOO_LARGE)).map_err(refused)?;
    if let Some(span) = stop_after {
        let cancel = cancel.clone();
        tokio::spawn(async move {
            tokio::time::sleep(span.0).await;
            ask(&cancel, &format!("{span} are over: "));
        });
    }
    tokio::spawn(async move {
        let mut interrupts = 0;
        loop {
            let why = tokio::select! {
                _ = interrupt.recv() => { interrupts += 1; "" }
                _ = terminate.recv() => "SIGTERM: ",
                _ = user.recv() => "SIGUSR1: ",
                _ = file_too_large.recv() => continue,
            };
            if interrupts > 1 {
                std::process::exit(i32::from(ErrorKind::Cancelled.exit_code()));
            }
            ask(&cancel, why);
        }
    });
    Ok(())
}

/// Asks once and says so.
fn ask(cancel: &Cancel, why: &str) {
    if !cancel.is_cancelled() {
        common::tell(format!("{why}stopping at the next checkpoint; interrupt again to stop at once"));
    }
    cancel.cancel();
}

/// What comes before the first stage, given up when a stop is asked for: it has committed nothing.
///
/// # Errors
/// Of the work itself, or Cancelled.
pub(crate) async fn unless_stopped<T, E: Into<Failure>>(
    cancel: &Cancel,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, Failure> {
    let stopped = async {
        while !cancel.is_cancelled() {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        done = work => done.map_err(Into::into),
        () = stopped => {
            let message = "stopped before the first stage, because it was asked to";
            Err(Error::new(ErrorKind::Cancelled, message).help("run the same command again").into())
        }
    }
}
