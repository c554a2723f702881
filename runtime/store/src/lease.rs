//! Leases: one process at a time runs a stage key.
//!
//! `leases/<epoch>.json` is created by whoever takes the stage, one epoch after the last. The holder overwrites
//! `<epoch>.beat` every `beat`; it creates `<epoch>.end` when it is done. A contender takes the next epoch when the last
//! one has ended, when its holder is a process of this host that no longer exists, or when the beat has not changed for
//! `expire` (the longer of its own and the holder's) on the contender's own monotonic clock. Unless the last holder ended
//! by itself, a fence goes to the next checkpoint number before anything else.
//!
//! Clocks: no time of another host or of the calendar is read, so a clock that jumps changes nothing. Silence is counted
//! from after the first look at a beat to before the last one, so a contender that was itself paused between two looks
//! takes nothing it has not seen to be silent. A monotonic clock that stands still while a laptop sleeps makes a contender
//! wait longer and a holder find its successor when it wakes.
//!
//! Invariant: a lease only saves work. What keeps two writers apart is the conditional create of each commit, and a holder
//! looks for a successor before each one ([`Store::check_lease`]).

mod hold;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use dsv3_core::{Cancel, Clock};
use serde::{Deserialize, Serialize};

pub use hold::Lease;

use crate::{
    Create, Holder, Store,
    error::{Result, StoreError},
    record,
};

/// Digits of an epoch in a path.
const EPOCH_DIGITS: usize = 8;

/// What a second runner does while another process holds a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IfHeld {
    /// It waits until the holder has ended or expired.
    #[default]
    Wait,
    /// It ends with an error as soon as the holder is seen to live; a holder that has expired is replaced all the same.
    Refuse,
}

/// How often a holder beats and when a contender gives it up.
#[derive(Clone, Copy, Debug)]
pub struct LeaseOptions {
    /// Time between heartbeats.
    pub beat: Duration,
    /// A beat unchanged for this long has ended.
    pub expire: Duration,
    /// How often a contender looks.
    pub poll: Duration,
    /// What a contender does about a living holder.
    pub if_held: IfHeld,
}

impl Default for LeaseOptions {
    fn default() -> Self {
        let (beat, expire, poll) = (Duration::from_secs(2), Duration::from_secs(10), Duration::from_millis(500));
        Self { beat, expire, poll, if_held: IfHeld::Wait }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    key: String,
    epoch: u64,
    nonce: String,
    holder: Holder,
    /// Silence after which the holder may be replaced, in milliseconds; absent from records of older builds.
    #[serde(default)]
    expire_ms: u64,
}

/// What leases are kept for: a folder that holds `leases/`.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    folder: String,
    /// Stage whose checkpoints are fenced at a takeover.
    key: Option<String>,
}

impl Place {
    pub(crate) fn stage(key: &str) -> Self {
        Self { folder: format!("stages/{key}/leases"), key: Some(key.to_owned()) }
    }

    /// A place without checkpoints, for work on the whole store.
    pub(crate) fn folder(folder: &str) -> Self {
        Self { folder: format!("{folder}/leases"), key: None }
    }

    pub(crate) fn path(&self, epoch: u64, suffix: &str) -> String {
        format!("{}/{epoch:0width$}.{suffix}", self.folder, width = EPOCH_DIGITS)
    }
}

/// The content of `<epoch>.end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct End {
    /// Whether something of the holder may still be under way, so that the next one has to fence it off.
    #[serde(default)]
    fence: bool,
}

/// The last lease of a place, as a contender sees it.
#[derive(Clone, Debug)]
pub(crate) struct Last {
    pub(crate) epoch: u64,
    pub(crate) holder: Option<Holder>,
    pub(crate) beat: Option<Bytes>,
    pub(crate) expire: Duration,
    end: Option<End>,
}

impl Last {
    /// Whether its holder has not ended it.
    pub(crate) fn is_open(&self) -> bool {
        self.end.is_none()
    }

    /// Whether its holder is known not to exist any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.holder.as_ref().is_some_and(Holder::is_gone)
    }

    pub(crate) fn name(&self) -> String {
        self.holder.as_ref().map_or_else(|| "another process".to_owned(), Holder::to_string)
    }
}

/// An open lease, for a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseSeen {
    /// Who holds it.
    pub holder: Holder,
    /// Milliseconds since 1970, by the store's clock, of its last heartbeat.
    pub beat_unix_millis: Option<u64>,
}

/// What a contender knows of the beat of the last lease.
pub(crate) struct Watch {
    epoch: u64,
    beat: Option<Bytes>,
    /// After the look that first saw this beat.
    since: Duration,
    /// Whether the beat of this epoch has been seen to change.
    pub(crate) alive: bool,
}

impl Watch {
    /// Takes in a look at `last` that began at `asked` and ended at `seen`; answers whether the holder is another one.
    pub(crate) fn look(watch: &mut Option<Self>, last: &Last, seen: Duration) -> bool {
        match watch {
            Some(watch) if watch.epoch == last.epoch => {
                if watch.beat != last.beat {
                    (watch.beat, watch.since, watch.alive) = (last.beat.clone(), seen, true);
                }
                false
            }
            _ => {
                *watch = Some(Self { epoch: last.epoch, beat: last.beat.clone(), since: seen, alive: false });
                true
            }
        }
    }

    /// How long the beat of `last` had been silent when the look that found it so was begun.
    pub(crate) fn silence(&self, last: &Last, asked: Duration) -> Duration {
        let same = self.epoch == last.epoch && self.beat == last.beat;
        if same { asked.saturating_sub(self.since) } else { Duration::ZERO }
    }
}

impl Store {
    /// Takes the lease of the stage `key`, waiting for another holder to end or expire. `on_wait` is told once per
    /// holder that is waited for.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`] when `cancel` is set while waiting, [`StoreError::Held`] when another process holds it and
    /// `options` say not to wait.
    pub async fn acquire(
        &self,
        key: &str,
        holder: Holder,
        clock: Arc<dyn Clock>,
        options: LeaseOptions,
        cancel: &Cancel,
        on_wait: impl Fn(&Holder),
    ) -> Result<Lease> {
        self.acquire_at(Place::stage(key), holder, clock, options, cancel, on_wait).await
    }

    pub(crate) async fn acquire_at(
        &self,
        place: Place,
        holder: Holder,
        clock: Arc<dyn Clock>,
        options: LeaseOptions,
        cancel: &Cancel,
        on_wait: impl Fn(&Holder),
    ) -> Result<Lease> {
        let mut watch: Option<Watch> = None;
        loop {
            let asked = clock.monotonic();
            let last = self.last_lease(&place).await?;
            let silence = match (&last, &watch) {
                (Some(last), Some(watch)) => watch.silence(last, asked),
                _ => Duration::ZERO,
            };
            let free = last.as_ref().is_none_or(|last| {
                !last.is_open()
                    || last.is_gone()
                    || (silence > Duration::ZERO && silence >= last.expire.max(options.expire))
            });
            if free {
                match self.take(&place, last.as_ref(), &holder, options).await {
                    Ok(Some(lease)) => return Ok(lease),
                    // Somebody was faster, or replaced this process before it was done.
                    Ok(None) | Err(StoreError::Fenced { .. }) => continue,
                    Err(error) => return Err(error),
                }
            }
            if let Some(last) = last {
                let new = Watch::look(&mut watch, &last, clock.monotonic());
                if let (true, Some(holder)) = (new && options.if_held == IfHeld::Wait, &last.holder) {
                    on_wait(holder);
                }
                if options.if_held == IfHeld::Refuse && watch.as_ref().is_some_and(|watch| watch.alive) {
                    let millis = silence.as_millis() as u64;
                    return Err(StoreError::Held { holder: last.name(), run: last.run(), silent_ms: millis });
                }
                if cancel.is_cancelled() {
                    let key = place.key.unwrap_or(place.folder);
                    return Err(StoreError::Cancelled { holder: last.name(), key });
                }
            }
            tokio::time::sleep(options.poll).await;
        }
    }

    /// Takes the epoch after `last` and fences its holder off unless it ended by itself; none when somebody was faster.
    pub(crate) async fn take(
        &self,
        place: &Place,
        last: Option<&Last>,
        holder: &Holder,
        options: LeaseOptions,
    ) -> Result<Option<Lease>> {
        let epoch = last.map_or(1, |last| last.epoch + 1);
        if self.create_lease(place, epoch, holder, options).await? == Create::AlreadyExists {
            return Ok(None);
        }
        let lease = Lease::start(self.clone(), place.clone(), epoch, options);
        let fence = last.is_some_and(|last| last.end.is_none_or(|end| end.fence));
        if let (true, Some(key)) = (fence, &place.key) {
            // On an error the lease is dropped, which tells the next contender to write the fence.
            self.write_fence(key, epoch).await?;
        }
        Ok(Some(lease))
    }

    pub(crate) async fn last_lease(&self, place: &Place) -> Result<Option<Last>> {
        let Some(epoch) = self.last_epoch(place).await? else { return Ok(None) };
        let path = place.path(epoch, "json");
        // A lease that cannot be read has no known holder, but its beat still shows whether it lives.
        let record = record::unseal::<Record>(&path, &self.read(&path).await?).ok();
        let beat = self.read_if_exists(&place.path(epoch, "beat")).await?;
        let end = self.read_if_exists(&place.path(epoch, "end")).await?;
        // An end that cannot be read is one all the same; the fence costs nothing.
        let end = end.map(|bytes| serde_json::from_slice(&bytes).unwrap_or(End { fence: true }));
        let expire = Duration::from_millis(record.as_ref().map_or(0, |record| record.expire_ms));
        Ok(Some(Last { epoch, holder: record.map(|record| record.holder), beat, expire, end }))
    }

    async fn last_epoch(&self, place: &Place) -> Result<Option<u64>> {
        let names = self.list(&place.folder).await?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".json")?.parse::<u64>().ok()).max())
    }

    async fn create_lease(&self, place: &Place, epoch: u64, holder: &Holder, options: LeaseOptions) -> Result<Create> {
        let path = place.path(epoch, "json");
        let (key, nonce) = (place.key.clone().unwrap_or_default(), crate::nonce());
        let expire_ms = options.expire.as_millis() as u64;
        let record = Record { format: record::FORMAT, key, epoch, nonce, holder: holder.clone(), expire_ms };
        if self.create(&path, record::seal(&path, &record)?).await? == Create::Created {
            return Ok(Create::Created);
        }
        let there = record::unseal::<Record>(&path, &self.read(&path).await?);
        let ours = there.is_ok_and(|there| there.nonce == record.nonce);
        Ok(if ours { Create::Created } else { Create::AlreadyExists })
    }

    /// Whether somebody who is not known to be gone holds the lease of the stage `key`.
    pub async fn lease_holder(&self, key: &str) -> Result<Option<Holder>> {
        let last = self.last_lease(&Place::stage(key)).await?.filter(|last| last.is_open() && !last.is_gone());
        Ok(last.and_then(|last| last.holder))
    }

    /// Who holds the stage `key`, unless it has ended or is known to be gone, and when it was last heard of.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn lease_seen(&self, key: &str) -> Result<Option<LeaseSeen>> {
        let place = Place::stage(key);
        let last = self.last_lease(&place).await?.filter(|last| last.is_open() && !last.is_gone());
        let Some((epoch, holder)) = last.and_then(|last| Some((last.epoch, last.holder?))) else { return Ok(None) };
        let modified = self.modified_ms(&place.path(epoch, "beat")).await?;
        Ok(Some(LeaseSeen { holder, beat_unix_millis: modified.and_then(|millis| millis.try_into().ok()) }))
    }

    /// Looks whether the lease `epoch` of the stage `key` still is the last one; called before every commit. Between this
    /// look and the commit the holder may be paused: then the commit's own conditional create meets the fence.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when another process has taken over.
    pub async fn check_lease(&self, key: &str, epoch: u64) -> Result<()> {
        self.check_at(&Place::stage(key), epoch).await
    }

    pub(crate) async fn check_at(&self, place: &Place, epoch: u64) -> Result<()> {
        match self.last_epoch(place).await? {
            Some(last) if last > epoch => {
                let path = place.path(last, "json");
                let record = self.read(&path).await.and_then(|bytes| record::unseal::<Record>(&path, &bytes));
                let holder = record.ok().map(|record| record.holder);
                let run = holder.as_ref().map(|holder| holder.run.clone()).unwrap_or_default();
                Err(StoreError::Fenced {
                    taker: holder.map_or_else(|| "another process".to_owned(), |h| h.to_string()),
                    run,
                })
            }
            _ => Ok(()),
        }
    }
}

impl Last {
    fn run(&self) -> String {
        self.holder.as_ref().map(|holder| holder.run.clone()).unwrap_or_default()
    }
}
