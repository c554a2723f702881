//! Leases: one process at a time runs a stage key.
//!
//! `leases/<epoch>.json` is created by whoever takes the stage, one epoch after the last. The holder overwrites
//! `<epoch>.beat` every `beat`; it creates `<epoch>.end` when it is done. A contender takes the next epoch when the last
//! one has ended, when its holder is a process of this host that no longer exists, or when the beat has not changed for
//! `expire` on the contender's own monotonic clock: clocks of different hosts are never compared. Unless the last holder
//! ended by itself, a fence goes to the next checkpoint number before anything else.
//!
//! Invariant: a lease only saves work. What keeps two writers apart is the conditional create of each commit.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dsv3_core::{Cancel, Clock};
use serde::{Deserialize, Serialize};
use tokio::{runtime::Handle, task::JoinHandle};

use crate::{
    Create, Holder, Store,
    error::{Result, StoreError},
    record,
};

/// Digits of an epoch in a path.
const EPOCH_DIGITS: usize = 8;

/// How often a holder beats and when a contender gives it up.
#[derive(Clone, Copy, Debug)]
pub struct LeaseOptions {
    /// Time between heartbeats.
    pub beat: Duration,
    /// A beat unchanged for this long has ended.
    pub expire: Duration,
    /// How often a contender looks.
    pub poll: Duration,
}

impl Default for LeaseOptions {
    fn default() -> Self {
        Self { beat: Duration::from_secs(2), expire: Duration::from_secs(10), poll: Duration::from_millis(500) }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    key: String,
    epoch: u64,
    nonce: String,
    holder: Holder,
}

/// A held lease. Call [`Lease::release`] at the end; when it is only dropped, the release is attempted in the background.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    key: String,
    epoch: u64,
    lost: Cancel,
    beating: JoinHandle<()>,
    released: bool,
}

fn lease_path(key: &str, epoch: u64, suffix: &str) -> String {
    format!("stages/{key}/leases/{epoch:0width$}.{suffix}", width = EPOCH_DIGITS)
}

/// The last lease of a stage, as a contender sees it.
struct Last {
    epoch: u64,
    holder: Option<Holder>,
    beat: Option<Bytes>,
    ended: bool,
}

impl Store {
    /// Takes the lease of the stage `key`, waiting for another holder to end or expire. `on_wait` is told once per
    /// holder that is waited for.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`] when `cancel` is set while waiting.
    pub async fn acquire(
        &self,
        key: &str,
        holder: Holder,
        clock: Arc<dyn Clock>,
        options: LeaseOptions,
        cancel: &Cancel,
        on_wait: impl Fn(&Holder),
    ) -> Result<Lease> {
        // Epoch, beat and the moment we first saw this beat.
        let mut watched: Option<(u64, Option<Bytes>, Duration)> = None;
        loop {
            let last = self.last_lease(key).await?;
            let expired = match (&last, &watched) {
                (Some(last), Some((epoch, beat, since))) if last.epoch == *epoch && last.beat == *beat => {
                    clock.monotonic().saturating_sub(*since) >= options.expire
                }
                _ => false,
            };
            let free = last
                .as_ref()
                .is_none_or(|last| last.ended || expired || last.holder.as_ref().is_some_and(Holder::is_gone));
            if free {
                let epoch = last.as_ref().map_or(1, |last| last.epoch + 1);
                if self.create_lease(key, epoch, &holder).await? == Create::Created {
                    if last.is_some_and(|last| !last.ended) {
                        self.write_fence(key, epoch).await?;
                    }
                    return Ok(Lease::start(self.clone(), key, epoch, options));
                }
                continue;
            }
            if let Some(last) = last {
                let same_holder = watched.as_ref().is_some_and(|(epoch, ..)| *epoch == last.epoch);
                if !same_holder && let Some(holder) = &last.holder {
                    on_wait(holder);
                }
                if !watched.as_ref().is_some_and(|(epoch, beat, _)| *epoch == last.epoch && *beat == last.beat) {
                    watched = Some((last.epoch, last.beat, clock.monotonic()));
                }
                if cancel.is_cancelled() {
                    let holder = last.holder.map_or_else(|| "another process".into(), |holder| holder.to_string());
                    return Err(StoreError::Cancelled { holder, key: key.to_owned() });
                }
            }
            tokio::time::sleep(options.poll).await;
        }
    }

    async fn last_lease(&self, key: &str) -> Result<Option<Last>> {
        let names = self.list(&format!("stages/{key}/leases")).await?;
        let epochs = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse::<u64>().ok());
        let Some(epoch) = epochs.max() else {
            return Ok(None);
        };
        let path = lease_path(key, epoch, "json");
        // A lease that cannot be read has no known holder, but its beat still shows whether it lives.
        let record = record::unseal::<Record>(&path, &self.read(&path).await?);
        let beat = self.read_if_exists(&lease_path(key, epoch, "beat")).await?;
        let ended = self.length(&lease_path(key, epoch, "end")).await?.is_some();
        Ok(Some(Last { epoch, holder: record.ok().map(|record| record.holder), beat, ended }))
    }

    async fn create_lease(&self, key: &str, epoch: u64, holder: &Holder) -> Result<Create> {
        let path = lease_path(key, epoch, "json");
        let nonce = crate::nonce();
        let record = Record { format: record::FORMAT, key: key.to_owned(), epoch, nonce, holder: holder.clone() };
        if self.create(&path, record::seal(&path, &record)?).await? == Create::Created {
            return Ok(Create::Created);
        }
        let there = record::unseal::<Record>(&path, &self.read(&path).await?);
        let ours = there.is_ok_and(|there| there.nonce == record.nonce);
        Ok(if ours { Create::Created } else { Create::AlreadyExists })
    }

    /// Whether somebody who is not known to be gone holds the lease of the stage `key`.
    pub async fn lease_holder(&self, key: &str) -> Result<Option<Holder>> {
        let last = self.last_lease(key).await?.filter(|last| !last.ended);
        Ok(last.and_then(|last| last.holder).filter(|holder| !holder.is_gone()))
    }
}

impl Lease {
    fn start(store: Store, key: &str, epoch: u64, options: LeaseOptions) -> Self {
        let lost = Cancel::new();
        let beating = tokio::spawn(beat(store.clone(), key.to_owned(), epoch, options, lost.clone()));
        Self { store, key: key.to_owned(), epoch, lost, beating, released: false }
    }

    /// Its number: what this holder writes carries it.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether another process has taken over; the stage should stop, its commits would be refused.
    pub fn lost(&self) -> &Cancel {
        &self.lost
    }

    /// Ends the lease, so that the next holder need not wait.
    pub async fn release(mut self) -> Result<()> {
        self.released = true;
        self.beating.abort();
        end(&self.store, &self.key, self.epoch).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.beating.abort();
        if self.released {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let (store, key, epoch) = (self.store.clone(), self.key.clone(), self.epoch);
            runtime.spawn(async move {
                if let Err(error) = end(&store, &key, epoch).await {
                    tracing::warn!(%error, key, "the lease ends by expiry");
                }
            });
        }
    }
}

async fn end(store: &Store, key: &str, epoch: u64) -> Result<()> {
    store.create(&lease_path(key, epoch, "end"), Bytes::from_static(b"{}\n")).await?;
    store.delete(&lease_path(key, epoch, "beat")).await
}

/// Overwrites the beat until aborted. A beat that cannot be written is tried again at the next turn.
async fn beat(store: Store, key: String, epoch: u64, options: LeaseOptions, lost: Cancel) {
    let path = lease_path(&key, epoch, "beat");
    let start = Instant::now();
    let mut count = 0u64;
    loop {
        count += 1;
        if let Err(error) = store.overwrite(&path, Bytes::from(format!("{count}\n"))).await {
            tracing::warn!(%error, "no heartbeat for {:?}", start.elapsed());
        }
        match store.length(&lease_path(&key, epoch + 1, "json")).await {
            Ok(Some(_)) => lost.cancel(),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "cannot see whether the lease still holds"),
        }
        tokio::time::sleep(options.beat).await;
    }
}
