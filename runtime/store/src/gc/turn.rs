//! Collections take turns with each other, and with runners that look before they trust what lies in the store.
//!
//! A collection holds a lease at `gc/leases`, with a heartbeat as a stage's. A runner waits for the end of the
//! collection it meets before it looks for a finished stage, after it has taken a stage's lease, and after it has renewed
//! an old blob: whatever it finds then is what that collection left. A collection begins by listing runs and leases, so
//! those that begin later know of the runner. One whose heartbeat has been silent for `expire` is ended by whoever waits;
//! it finds that before its next deletions and stops.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use dsv3_core::{Cancel, Clock};

use crate::{
    Holder, IfHeld, Lease, LeaseOptions, Store,
    error::{Result, StoreError},
    lease::{Place, Watch},
};

/// Folder of the lease.
const FOLDER: &str = "gc";

/// Patience with a collection.
fn options(if_held: IfHeld) -> LeaseOptions {
    LeaseOptions { poll: Duration::from_millis(100), if_held, ..LeaseOptions::default() }
}

/// The right to remove things.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) store: Store,
    lease: Lease,
}

impl Turn {
    /// Waits for its turn.
    pub(crate) async fn begin(
        store: &Store,
        clock: Arc<dyn Clock>,
        cancel: &Cancel,
        on_wait: impl Fn(&Holder),
    ) -> Result<Self> {
        let holder = Holder::this_process("gc");
        let lease =
            store.acquire_at(Place::folder(FOLDER), holder, clock, options(IfHeld::Wait), cancel, on_wait).await?;
        Ok(Self { store: store.clone(), lease })
    }

    /// Takes a turn if nobody is at it.
    pub(crate) async fn begin_if_free(store: &Store, clock: Arc<dyn Clock>) -> Result<Option<Self>> {
        let place = Place::folder(FOLDER);
        if store.last_lease(&place).await?.is_some_and(|last| last.is_open() && !last.is_gone()) {
            return Ok(None);
        }
        let holder = Holder::this_process("retention");
        match store.acquire_at(place, holder, clock, options(IfHeld::Refuse), &Cancel::new(), |_| {}).await {
            Ok(lease) => Ok(Some(Self { store: store.clone(), lease })),
            Err(StoreError::Held { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Looks whether this still is its turn; called before deletions.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when somebody has ended it or taken the next.
    pub(crate) async fn check(&self) -> Result<()> {
        self.lease.check().await?;
        let end = format!("{FOLDER}/leases/{:08}.end", self.lease.epoch());
        if self.store.length(&end).await?.is_some() {
            let taker = "another process, which found no heartbeat of this one,".to_owned();
            return Err(StoreError::Fenced { taker, run: String::new() });
        }
        Ok(())
    }

    /// Ends the turn. Records of turns before this one are not needed any more.
    pub(crate) async fn end(self) -> Result<()> {
        let Self { store, lease } = self;
        let epoch = lease.epoch();
        lease.release().await?;
        for name in store.list(&format!("{FOLDER}/leases")).await? {
            let number = name.split_once('.').and_then(|(number, _)| number.parse::<u64>().ok());
            if number.is_some_and(|number| number < epoch) {
                store.delete(&format!("{FOLDER}/leases/{name}")).await?;
            }
        }
        Ok(())
    }
}

impl Store {
    /// Waits for the end of the collection that is under way, if one is; `on_wait` is told once who is waited for.
    /// One that begins after that is not waited for: it lists runs, leases and times that were there before this call.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`] when `cancel` is set while waiting.
    pub async fn wait_for_collection(&self, clock: &dyn Clock, cancel: &Cancel, on_wait: impl Fn(&str)) -> Result<()> {
        let place = Place::folder(FOLDER);
        let options = options(IfHeld::Wait);
        let mut watch: Option<Watch> = None;
        let mut met = None;
        loop {
            let asked = clock.monotonic();
            let Some(last) = self.last_lease(&place).await? else { return Ok(()) };
            if !last.is_open() || last.is_gone() || *met.get_or_insert(last.epoch) != last.epoch {
                return Ok(());
            }
            if Watch::look(&mut watch, &last, clock.monotonic()) {
                on_wait(&last.name());
            } else if watch.as_ref().is_some_and(|watch| watch.silence(&last, asked) >= options.expire) {
                let end = format!("{{\"fence\":true,\"format\":{}}}\n", crate::record::FORMAT);
                self.create(&format!("{FOLDER}/leases/{:08}.end", last.epoch), Bytes::from(end)).await?;
                return Ok(());
            }
            if cancel.is_cancelled() {
                return Err(StoreError::Cancelled { holder: last.name(), key: "gc".to_owned() });
            }
            tokio::time::sleep(options.poll).await;
        }
    }
}
