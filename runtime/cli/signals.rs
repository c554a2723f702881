//! SIGTERM, SIGINT and SIGUSR1 ask the run to checkpoint and stop (exit 75). A second SIGINT ends the process at once;
//! what was committed stays, the next run goes on from the last checkpoint. SIGXFSZ does nothing, so that a file that may
//! not grow is an error of its writer (exit 69) and not the end of the process.

use crate::common;
use dsv3_core::{Cancel, Error, ErrorKind};
use tokio::signal::unix::{SignalKind, signal};

/// Number of SIGXFSZ on Linux and macOS.
const FILE_TOO_LARGE: i32 = 25;

/// Watches from now on, in the background.
pub(crate) fn watch(cancel: Cancel) -> Result<(), Error> {
    let refused = |error| Error::internal("cannot watch for signals").source(error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(refused)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(refused)?;
    let mut user = signal(SignalKind::user_defined1()).map_err(refused)?;
    let mut file_too_large = signal(SignalKind::from_raw(FILE_TOO_LARGE)).map_err(refused)?;
    tokio::spawn(async move {
        let mut interrupts = 0;
        loop {
            tokio::select! {
                _ = interrupt.recv() => interrupts += 1,
                _ = terminate.recv() => {}
                _ = user.recv() => {}
                _ = file_too_large.recv() => continue,
            }
            if interrupts > 1 {
                std::process::exit(i32::from(ErrorKind::Cancelled.exit_code()));
            }
            if !cancel.is_cancelled() {
                common::tell("stopping at the next checkpoint; interrupt again to stop at once");
            }
            cancel.cancel();
        }
    });
    Ok(())
}
