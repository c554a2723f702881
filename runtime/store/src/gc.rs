//! Garbage collection: removes what no kept run names, and nothing else.
//!
//! Kept are: every run but those that are dropped, with plan, statuses and events; the stages that a kept run names, that
//! are held at the moment, or that are younger than the grace period; of their checkpoints what [`Retention`] keeps; and every
//! blob that a kept record names ([`marks`]), or that may yet come to be named. A blob that no record names is removed only
//! if it was last written before the grace period began, and before the oldest lease that still lives was taken, less
//! [`RENEWED_MS`]: whoever holds a lease may name what it wrote under it.
//!
//! A writer that finds its blob already there could name one that is older than that. So it writes an old one again
//! ([`Store::renew_blob`]), then waits for a collection that is under way, then looks whether the blob is there.
//!
//! Leases whose heartbeat is silent do not count, and are taken over and ended first: a holder that wakes later commits
//! nothing that was removed meanwhile.
//!
//! Order: records before the blobs they name, results before checkpoints, the plan of a run last. So an interrupted
//! collection leaves nothing that names what is gone, and the next one finishes it. Times are the store's own ([`time`]).

mod marks;
mod renew;
mod retire;
mod sweep;
mod time;
mod turn;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use dsv3_core::{Cancel, Clock, Digest};

use crate::{
    Holder, LeaseOptions, Retention, Store,
    error::{Result, StoreError},
    lease::{Last, Place, Watch},
};
use marks::Marks;
pub use retire::Retired;
use time::Object;
pub(crate) use time::StoreTime;
use turn::Turn;

/// A blob that a writer finds and that is older than this is written again.
pub(crate) const RENEW_AFTER_MS: i64 = 3_600_000;
/// What was last written this long before a lease was taken may have been found under it and kept.
const RENEWED_MS: i64 = RENEW_AFTER_MS + 600_000;

/// What a host knows of the runs it keeps.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    /// Ids of the kept runs.
    pub runs: BTreeSet<String>,
    /// Keys of the stages they name, each with the retention of every run that names it; `None` keeps all checkpoints.
    pub keys: BTreeMap<String, Vec<Option<Retention>>>,
    /// Ids of the runs to remove.
    pub dropped: BTreeSet<String>,
}

/// What a collection may do.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// Look and remove nothing.
    pub dry_run: bool,
    /// Unnamed objects younger than this are left alone.
    pub grace: Duration,
}

/// What kind of thing is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Removed {
    /// Records of a stage that no kept run names.
    Stage,
    /// Records of a checkpoint that is not kept.
    Checkpoint,
    /// Content that nothing names.
    Blob,
    /// A file that an interrupted write left behind.
    Temporary,
    /// A run.
    Run,
}

/// One thing that a collection removes.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Item {
    /// What it is.
    pub what: Removed,
    /// Path of the object or of the folder.
    pub path: String,
    /// Sum of the lengths of its objects.
    pub bytes: u64,
    /// The objects, in the order in which they go.
    #[serde(skip)]
    pub objects: Vec<String>,
}

/// What a collection found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// What goes or went.
    pub items: Vec<Item>,
    /// Leases that live, as `stage KEY: HOLDER`.
    pub live: Vec<String>,
    /// Bytes that no record names but that are too young to go, or that a living holder may be about to name.
    pub spared_bytes: u64,
}

/// A turn at collecting, taken before the runs are listed.
pub struct Collection {
    turn: Turn,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Collection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.turn.fmt(f)
    }
}

/// The listing of a store.
struct Listing {
    stages: BTreeMap<String, Vec<Object>>,
    runs: BTreeMap<String, Vec<Object>>,
    blobs: Vec<Object>,
    temporary: Vec<Object>,
}

/// Leases at the moment.
#[derive(Default)]
struct Leases {
    /// Keys that are held, with when the lease was taken by the store's clock.
    live: BTreeMap<String, i64>,
    names: Vec<String>,
    /// Runs that their holders work for, with the holder.
    runs: BTreeMap<String, String>,
    /// Keys whose lease is open and silent.
    silent: Vec<(String, Last)>,
}

impl Store {
    /// Waits for the turn to collect. List the runs only after this.
    ///
    /// # Errors
    /// [`crate::StoreError::Cancelled`] when `cancel` is set while waiting for another collection.
    pub async fn begin_collection(
        &self,
        clock: Arc<dyn Clock>,
        cancel: &Cancel,
        on_wait: impl Fn(&Holder),
    ) -> Result<Collection> {
        let turn = Turn::begin(self, clock.clone(), cancel, on_wait).await?;
        Ok(Collection { turn, clock })
    }
}

impl Collection {
    /// Collects, or says what would go. Ends the turn.
    ///
    /// # Errors
    /// Of the store; [`crate::StoreError::Fenced`] when this process was silent for too long. What was removed until then
    /// stays removed, and everything named is there.
    pub async fn collect(self, roots: &Roots, options: CollectOptions) -> Result<Collected> {
        let outcome = self.find(roots, options).await;
        let outcome = match outcome {
            Ok(collected) if !options.dry_run => match sweep::sweep(&self.turn, &collected.items).await {
                Ok(()) => Ok(collected),
                Err(error) => Err(error),
            },
            outcome => outcome,
        };
        let ended = self.turn.end().await;
        let collected = outcome?;
        ended?;
        Ok(collected)
    }

    /// Ends the turn with nothing done.
    ///
    /// # Errors
    /// Of the store.
    pub async fn give_up(self) -> Result<()> {
        self.turn.end().await
    }

    async fn find(&self, roots: &Roots, options: CollectOptions) -> Result<Collected> {
        let store = &self.turn.store;
        let now = store.ask_time().await?.now_ms();
        let young = now.saturating_sub(i64::try_from(options.grace.as_millis()).unwrap_or(i64::MAX));
        let leases = self.leases(!options.dry_run).await?;
        if let Some((run, holder)) = leases.runs.iter().find(|(run, _)| roots.dropped.contains(*run)) {
            return Err(StoreError::Held { holder: holder.clone(), run: run.clone(), silent_ms: 0 });
        }
        // Everything is listed after the leases: what is written later is younger than any of it.
        let listing = list(store).await?;
        let oldest = leases.live.values().min().map_or(i64::MAX, |taken| taken.saturating_sub(RENEWED_MS));
        // Times may be whole seconds, so what is as old as the bound counts as old; with a living lease the margin is wide.
        let may_go = |object: &Object| object.modified_ms <= young && object.modified_ms < oldest;
        let is_old = |object: &Object| object.modified_ms <= young;
        let mut collected = Collected { live: leases.names.clone(), ..Collected::default() };
        let mut marks = Marks::default();
        let mut paths: Vec<String> = Vec::new();
        let mut stages = Vec::new();
        for (key, objects) in &listing.stages {
            let kept = roots.keys.contains_key(key) || leases.live.contains_key(key) || !objects.iter().all(is_old);
            if !kept {
                stages.push(stage_item(key, objects));
                continue;
            }
            let unfinished = !objects.iter().any(|object| object.path.ends_with("/result.json"));
            let none = Vec::new();
            let policies = roots.keys.get(key).unwrap_or(&none);
            let superseded = store.superseded(key, policies, unfinished).await?;
            let gone: BTreeSet<u64> = superseded.iter().map(|checkpoint| checkpoint.seq).collect();
            for object in objects {
                match seq_of(&object.path) {
                    Some(seq) if gone.contains(&seq) => {}
                    _ if object.path.ends_with(".json") && !object.path.contains("/leases/") => {
                        paths.push(object.path.clone());
                    }
                    _ => {}
                }
            }
            collected.items.extend(gone.iter().map(|seq| checkpoint_item(key, *seq, objects)));
        }
        let (mut runs, is_dropped) = (Vec::new(), |run: &String| roots.dropped.contains(run));
        for (run, objects) in &listing.runs {
            let has_plan = objects.iter().any(|object| object.path.ends_with("/plan.json"));
            if is_dropped(run) || (!has_plan && !roots.runs.contains(run) && objects.iter().all(is_old)) {
                runs.push(run_item(run, objects));
            } else {
                paths.push(format!("runs/{run}/plan.json"));
            }
        }
        marks.records(store, paths).await?;
        marks.follow(store).await?;
        let items = &mut collected.items;
        drop(items.splice(0..0, stages));
        for blob in &listing.blobs {
            // A name that is no digest was not written by us.
            if digest_of(&blob.path).is_none_or(|digest| marks.named.contains(&digest)) {
                continue;
            }
            if may_go(blob) {
                items.push(item(Removed::Blob, &blob.path, std::slice::from_ref(blob)));
            } else {
                collected.spared_bytes += blob.bytes;
            }
        }
        let temporary = listing.temporary.iter().filter(|object| may_go(object));
        items.extend(temporary.map(|one| item(Removed::Temporary, &one.path, std::slice::from_ref(one))));
        items.extend(runs);
        Ok(collected)
    }

    /// Tells living leases from silent ones, which takes as long as a lease needs to expire if any is open; silent ones are
    /// taken over and ended if `fence` says so.
    async fn leases(&self, fence: bool) -> Result<Leases> {
        let store = &self.turn.store;
        let mut open: BTreeMap<String, Option<Watch>> = BTreeMap::new();
        for name in store.list("stages").await? {
            let Some(key) = name.strip_suffix('/') else { continue };
            let last = store.last_lease(&Place::stage(key)).await?;
            if last.is_some_and(|last| last.is_open() && !last.is_gone()) {
                open.insert(key.to_owned(), None);
            }
        }
        let mut leases = Leases::default();
        let expire = LeaseOptions::default().expire;
        while !open.is_empty() {
            let mut settled = Vec::new();
            for (key, watch) in &mut open {
                let asked = self.clock.monotonic();
                let last = store.last_lease(&Place::stage(key)).await?;
                let Some(last) = last.filter(|last| last.is_open() && !last.is_gone()) else {
                    settled.push(key.clone());
                    continue;
                };
                Watch::look(watch, &last, self.clock.monotonic());
                let Some(watch) = watch else { continue };
                if watch.alive {
                    let taken = store.modified_ms(&Place::stage(key).path(last.epoch, "json")).await?;
                    leases.live.insert(key.clone(), taken.unwrap_or(0));
                    leases.names.push(format!("stage {key}: {}", last.name()));
                    leases.runs.extend(last.holder.iter().map(|holder| (holder.run.clone(), holder.to_string())));
                    settled.push(key.clone());
                } else if watch.silence(&last, asked) >= last.expire.max(expire) {
                    leases.silent.push((key.clone(), last));
                    settled.push(key.clone());
                }
            }
            settled.iter().for_each(|key| drop(open.remove(key)));
            if !open.is_empty() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        for (key, last) in leases.silent.iter().filter(|_| fence) {
            let (place, holder) = (Place::stage(key), Holder::this_process("gc"));
            // If somebody was faster, that one waits for this collection before it looks at anything.
            match store.take(&place, Some(last), &holder, LeaseOptions::default()).await {
                Ok(Some(lease)) => lease.release().await?,
                Ok(None) | Err(StoreError::Fenced { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(leases)
    }
}

async fn list(store: &Store) -> Result<Listing> {
    let by_second = |objects: Vec<Object>| {
        let mut folders: BTreeMap<String, Vec<Object>> = BTreeMap::new();
        for object in objects {
            if let Some(name) = object.path.split('/').nth(1).filter(|_| object.path.matches('/').count() >= 2) {
                folders.entry(name.to_owned()).or_default().push(object.clone());
            }
        }
        folders
    };
    let stages = by_second(store.list_objects("stages").await?);
    let runs = by_second(store.list_objects("runs").await?);
    let temporary = match store.local_root() {
        Some(_) => store.list_objects("tmp").await?,
        None => Vec::new(),
    };
    Ok(Listing { stages, runs, blobs: store.list_objects("blobs").await?, temporary })
}

fn digest_of(path: &str) -> Option<Digest> {
    path.strip_prefix("blobs/")?.parse().ok()
}

/// Number of the checkpoint that an object belongs to: its record, or what stands beside it, such as a certificate.
fn seq_of(path: &str) -> Option<u64> {
    let (_, name) = path.split_once("/checkpoints/")?;
    name.split(['.', '/']).next()?.parse().ok()
}

fn item<'a>(what: Removed, path: &str, objects: impl IntoIterator<Item = &'a Object>) -> Item {
    let (mut bytes, mut paths) = (0, Vec::new());
    for object in objects {
        bytes += object.bytes;
        paths.push(object.path.clone());
    }
    Item { what, path: path.to_owned(), bytes, objects: paths }
}

fn checkpoint_item(key: &str, seq: u64, objects: &[Object]) -> Item {
    let path = format!("stages/{key}/checkpoints/{seq:08}.json");
    item(Removed::Checkpoint, &path, objects.iter().filter(|object| seq_of(&object.path) == Some(seq)))
}

/// The result goes first, the leases last: until then a holder finds its own.
fn stage_item(key: &str, objects: &[Object]) -> Item {
    let rank = |object: &&Object| {
        let path = object.path.as_str();
        (u8::from(!path.ends_with("/result.json")) + u8::from(path.contains("/leases/")), path.to_owned())
    };
    let mut ordered: Vec<&Object> = objects.iter().collect();
    ordered.sort_by_key(rank);
    item(Removed::Stage, &format!("stages/{key}"), ordered)
}

/// The plan goes last: until then the run is there.
fn run_item(run: &str, objects: &[Object]) -> Item {
    let mut ordered: Vec<&Object> = objects.iter().collect();
    ordered.sort_by_key(|object| object.path.ends_with("/plan.json"));
    item(Removed::Run, &format!("runs/{run}"), ordered)
}
