//! A held lease: its heartbeat, its loss and its end.

use std::time::Instant;

use bytes::Bytes;
use dsv3_core::Cancel;
use tokio::{runtime::Handle, task::JoinHandle};

use super::{End, LeaseOptions, Place};
use crate::{Store, error::Result};

/// A held lease. Call [`Lease::release`] at the end. When it is only dropped, an end that asks for a fence is written in
/// the background, since whatever worked under the lease may not have stopped.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    place: Place,
    epoch: u64,
    lost: Cancel,
    beating: JoinHandle<()>,
    released: bool,
}

impl Lease {
    pub(super) fn start(store: Store, place: Place, epoch: u64, options: LeaseOptions) -> Self {
        let lost = Cancel::new();
        let beating = tokio::spawn(beat(store.clone(), place.clone(), epoch, options, lost.clone()));
        Self { store, place, epoch, lost, beating, released: false }
    }

    /// Its number: what this holder writes carries it.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Set once a heartbeat has seen that another process has taken over; the stage should stop, its commits would be
    /// refused.
    pub fn lost(&self) -> &Cancel {
        &self.lost
    }

    /// Looks now whether the lease still holds.
    ///
    /// # Errors
    /// [`crate::StoreError::Fenced`] when another process has taken over.
    pub async fn check(&self) -> Result<()> {
        self.store.check_at(&self.place, self.epoch).await
    }

    /// Ends the lease, so that the next holder need not wait. Nothing may be under way that still commits.
    pub async fn release(mut self) -> Result<()> {
        self.released = true;
        self.beating.abort();
        end(&self.store, &self.place, self.epoch, End { fence: false }).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.beating.abort();
        self.lost.cancel();
        if self.released {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let (store, place, epoch) = (self.store.clone(), self.place.clone(), self.epoch);
            runtime.spawn(async move {
                if let Err(error) = end(&store, &place, epoch, End { fence: true }).await {
                    tracing::warn!(%error, place = place.folder, "the lease ends by expiry");
                }
            });
        }
    }
}

async fn end(store: &Store, place: &Place, epoch: u64, end: End) -> Result<()> {
    let text = format!("{{\"fence\":{},\"format\":{}}}\n", end.fence, crate::record::FORMAT);
    store.create(&place.path(epoch, "end"), Bytes::from(text)).await?;
    store.delete(&place.path(epoch, "beat")).await
}

/// Overwrites the beat until aborted or replaced. A beat that cannot be written is tried again at the next turn; one that
/// hangs is given up in time for others.
async fn beat(store: Store, place: Place, epoch: u64, options: LeaseOptions, lost: Cancel) {
    let (path, next) = (place.path(epoch, "beat"), place.path(epoch + 1, "json"));
    let give_up = options.expire / 2;
    let mut count = 0u64;
    let mut beaten = Instant::now();
    loop {
        match tokio::time::timeout(give_up, store.length(&next)).await {
            Ok(Ok(Some(_))) => {
                lost.cancel();
                return;
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot see whether the lease still holds"),
            Err(_) => tracing::warn!("the store does not answer whether the lease still holds"),
        }
        count += 1;
        let beat = Bytes::from(format!("{{\"beat\":{count},\"format\":{}}}\n", crate::record::FORMAT));
        match tokio::time::timeout(give_up, store.overwrite(&path, beat)).await {
            Ok(Ok(())) => beaten = Instant::now(),
            Ok(Err(error)) => tracing::warn!(%error, "no heartbeat for {:?}", beaten.elapsed()),
            Err(_) => tracing::warn!("the store takes no heartbeat since {:?}", beaten.elapsed()),
        }
        tokio::time::sleep(options.beat).await;
    }
}
