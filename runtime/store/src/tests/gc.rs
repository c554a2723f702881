//! Collections beside writers, sleepers and crashes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use dsv3_core::{Cancel, Clock, Digest, FileEntry, Manifest, Rng, SystemClock};
use serde_json::{Value, json};

use super::{TempFolder, each};
use crate::{
    Best, Checkpoint, CollectOptions, Collected, Holder, Lease, LeaseOptions, OutputEntry, Removed, Retention, Roots,
    StageResult, Store, StoreError,
    blobs::blob_path,
    error::Result,
    faults::{Fault, Faults, OperationKind},
};

const DAY: Duration = Duration::from_secs(86_400);
const NONE: Duration = Duration::ZERO;

fn clock() -> Arc<SystemClock> {
    Arc::new(SystemClock::default())
}

fn here() -> Holder {
    Holder::this_process("r1")
}

async fn hold(store: &Store, key: &str) -> Lease {
    let beat = LeaseOptions { beat: Duration::from_millis(5), ..LeaseOptions::default() };
    store.acquire(key, here(), clock(), beat, &Cancel::new(), |_| {}).await.unwrap()
}

/// A clock on which a lease expires within a tenth of a second.
struct Fast(SystemClock);

impl Clock for Fast {
    fn monotonic(&self) -> Duration {
        self.0.monotonic() * 100
    }

    fn unix_millis(&self) -> u64 {
        self.0.unix_millis()
    }
}

async fn collect(store: &Store, roots: &Roots, grace: Duration, dry_run: bool) -> Result<Collected> {
    collect_by(clock(), store, roots, grace, dry_run).await
}

async fn collect_by(
    clock: Arc<dyn Clock>,
    store: &Store,
    roots: &Roots,
    grace: Duration,
    dry_run: bool,
) -> Result<Collected> {
    let collection = store.begin_collection(clock, &Cancel::new(), |_| {}).await?;
    collection.collect(roots, CollectOptions { dry_run, grace }).await
}

fn roots(keys: &[(&str, Option<Retention>)]) -> Roots {
    let keys = keys.iter().map(|(key, policy)| ((*key).to_owned(), vec![policy.clone()])).collect();
    Roots { runs: BTreeSet::from(["r1".to_owned()]), keys, dropped: BTreeSet::new() }
}

fn content(name: &str) -> Bytes {
    Bytes::from(name.repeat(50))
}

async fn put(store: &Store, name: &str) -> FileEntry {
    let bytes = content(name);
    let length = bytes.len() as u64;
    FileEntry { path: name.to_owned(), digest: store.put_blob(bytes).await.unwrap(), bytes: length }
}

fn checkpoint(seq: u64, files: Vec<FileEntry>, loss: f64) -> Checkpoint {
    let state = json!({ "state": { "figures": { "loss": { "first": 1.0, "last": loss } } } });
    Checkpoint { seq, step: seq, state, files, tensors: Vec::new() }
}

/// A finished stage with one artifact of one file.
async fn finish(store: &Store, key: &str, name: &str) -> Digest {
    let file = put(store, name).await;
    let manifest = Manifest { format: Manifest::FORMAT, kind: "x".into(), files: vec![file], meta: Value::Null };
    let digest = store.put_manifest(&manifest).await.unwrap();
    let output = OutputEntry { name: "out".into(), kind: "x".into(), digest, bytes: manifest.bytes() };
    let result = StageResult {
        format: StageResult::FORMAT,
        key: key.to_owned(),
        stage_type: "t".into(),
        outputs: vec![output],
        metrics: BTreeMap::new(),
        last_seq: 0,
        lineage: json!({}),
        profile: json!({}),
    };
    store.commit_result(key, &result).await.unwrap();
    digest
}

async fn digests(store: &Store) -> BTreeSet<Digest> {
    store.list("blobs").await.unwrap().iter().map(|name| name.parse().unwrap()).collect()
}

fn what(collected: &Collected) -> Vec<(Removed, String)> {
    collected.items.iter().map(|item| (item.what, item.path.clone())).collect()
}

/// Every checkpoint that is there has its files, and so has every result.
async fn nothing_is_missing(store: &Store) {
    for path in store.list_all("stages").await.unwrap() {
        let Some((key, name)) = path.strip_prefix("stages/").and_then(|path| path.split_once('/')) else { continue };
        if name.starts_with("checkpoints/") {
            let found = store.find_checkpoint(key).await.unwrap();
            assert!(found.damaged.is_empty(), "{:?}", found.damaged);
        }
        if name == "result.json" {
            for output in store.read_result(key).await.unwrap().unwrap().outputs {
                for file in store.manifest(output.digest).await.unwrap().files {
                    store.verify_blob(file.digest, file.bytes).await.unwrap();
                }
            }
        }
    }
}

#[tokio::test]
async fn what_a_kept_record_names_stays_and_the_rest_goes() {
    let folder = TempFolder::new();
    for store in each(&folder) {
        store.create_run("r1", Bytes::from_static(b"{}")).await.unwrap();
        let kept = finish(&store, "kept", "kept").await;
        let gone = finish(&store, "gone", "gone").await;
        let shared = put(&store, "shared").await;
        let orphan = put(&store, "orphan").await;
        for key in ["kept", "gone"] {
            store.commit_checkpoint(key, 1, &checkpoint(1, vec![shared.clone()], 1.0)).await.unwrap();
        }
        let roots = roots(&[("kept", None)]);
        let young = collect(&store, &roots, DAY, false).await.unwrap();
        assert!(young.items.is_empty() && young.spared_bytes > 0);
        let before = digests(&store).await;
        let dry = collect(&store, &roots, NONE, true).await.unwrap();
        assert_eq!(digests(&store).await, before);
        let real = collect(&store, &roots, NONE, false).await.unwrap();
        assert_eq!(what(&dry), what(&real));
        assert_eq!(real.items[0].path, "stages/gone");
        let left = digests(&store).await;
        assert!(left.contains(&kept) && left.contains(&shared.digest));
        assert!(!left.contains(&gone) && !left.contains(&orphan.digest));
        assert_eq!(left.len(), 3);
        assert!(store.read_result("gone").await.unwrap().is_none());
        nothing_is_missing(&store).await;
        assert!(collect(&store, &roots, NONE, false).await.unwrap().items.is_empty());
    }
}

#[tokio::test]
async fn retention_is_applied_to_kept_stages_and_fences_stay() {
    let store = Store::with_memory();
    store.write_fence("s", 1).await.unwrap();
    for seq in 2..=7u64 {
        let files = vec![put(&store, &format!("file{seq}")).await, put(&store, "same").await];
        store.commit_checkpoint("s", 1, &checkpoint(seq, files, (seq as f64 - 3.0).abs())).await.unwrap();
    }
    let best = Best { metric: "loss".into(), count: 1, higher: false };
    let policy = Retention { last: 1, every_steps: None, best: Some(best) };
    // Two runs name it, and one of them keeps all.
    let both = Roots { keys: BTreeMap::from([("s".into(), vec![None, Some(policy.clone())])]), ..Roots::default() };
    assert!(collect(&store, &both, NONE, false).await.unwrap().items.is_empty());
    collect(&store, &roots(&[("s", Some(policy))]), NONE, false).await.unwrap();
    // Unfinished: the two newest, and the best.
    assert_eq!(store.checkpoint_seqs("s").await.unwrap(), [1, 3, 6, 7]);
    assert_eq!(digests(&store).await.len(), 4);
    nothing_is_missing(&store).await;
}

/// A damaged newest one does not count as one of the two.
#[tokio::test]
async fn a_damaged_checkpoint_supersedes_nothing() {
    let store = Store::with_memory();
    let mut files = Vec::new();
    for seq in 1..=4u64 {
        files.push(put(&store, &format!("file{seq}")).await);
        store.commit_checkpoint("s", 1, &checkpoint(seq, vec![files[seq as usize - 1].clone()], 1.0)).await.unwrap();
    }
    store.overwrite(&blob_path(files[3].digest), Bytes::from("x".repeat(250))).await.unwrap();
    let one = Retention { last: 1, ..Retention::default() };
    collect(&store, &roots(&[("s", Some(one))]), NONE, false).await.unwrap();
    assert_eq!(store.checkpoint_seqs("s").await.unwrap(), [2, 3, 4]);
    assert_eq!(store.find_checkpoint("s").await.unwrap().checkpoint.unwrap().seq, 3);
}

#[tokio::test]
async fn a_living_holder_keeps_what_it_may_name_and_a_silent_one_is_fenced_off() {
    let store = Store::with_memory();
    let lease = hold(&store, "live").await;
    let file = put(&store, "unnamed").await;
    let live = collect(&store, &roots(&[]), NONE, false).await.unwrap();
    assert!(live.items.is_empty() && live.live[0].contains("stage live"), "{live:?}");
    store.commit_checkpoint("live", lease.epoch(), &checkpoint(1, vec![file], 1.0)).await.unwrap();
    lease.release().await.unwrap();
    // It sleeps with its last look behind it: what it still sends meets the fence.
    let quiet = LeaseOptions { beat: DAY, ..LeaseOptions::default() };
    let other = Holder { host: "elsewhere".into(), ..here() };
    let sleeper = store.acquire("asleep", other, clock(), quiet, &Cancel::new(), |_| {}).await.unwrap();
    // Its first beat is its last one.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let file = put(&store, "of the sleeper").await;
    let keys = roots(&[("live", None), ("asleep", None)]);
    let fast = Arc::new(Fast(SystemClock::default()));
    let collected = collect_by(fast, &store, &keys, NONE, false).await.unwrap();
    assert_eq!(what(&collected), [(Removed::Blob, blob_path(file.digest))]);
    let late = store.commit_checkpoint("asleep", sleeper.epoch(), &checkpoint(1, vec![file], 1.0)).await;
    assert!(matches!(late, Err(StoreError::Fenced { .. })));
    nothing_is_missing(&store).await;
}

/// A crash before any of its operations leaves a store in which nothing named is missing, and the next collection ends where
/// one that was not disturbed does.
#[tokio::test]
async fn an_interrupted_collection_is_harmless() {
    let build = async || {
        let store = Store::with_memory();
        store.create_run("r1", Bytes::from_static(b"{}")).await.unwrap();
        store.create_run("r2", Bytes::from_static(b"{}")).await.unwrap();
        finish(&store, "kept", "kept").await;
        finish(&store, "gone", "gone").await;
        for seq in 1..=4u64 {
            let file = put(&store, &format!("file{seq}")).await;
            store.commit_checkpoint("kept", 1, &checkpoint(seq, vec![file], 1.0)).await.unwrap();
        }
        store
    };
    let one = Retention { last: 1, ..Retention::default() };
    let roots = Roots { dropped: BTreeSet::from(["r2".to_owned()]), ..roots(&[("kept", Some(one))]) };
    let calm = build().await;
    let faults = Faults::default();
    collect(&faults.wrap(&calm), &roots, NONE, false).await.unwrap();
    let left: Vec<String> = calm.list_all("").await.unwrap();
    let left: Vec<&String> = left.iter().filter(|path| !path.starts_with("gc/")).collect();
    let deletes: Vec<_> = faults.operations().into_iter().filter(|at| at.kind == OperationKind::Delete).collect();
    assert!(deletes.len() > 8, "{deletes:?}");
    for delete in deletes {
        for fault in [Fault::CrashBefore, Fault::CrashAfter] {
            let store = build().await;
            let faults = Faults::default();
            faults.plan_at(delete.clone(), fault);
            let outcome = collect(&faults.wrap(&store), &roots, NONE, false).await;
            assert!(outcome.is_err() || delete.path.starts_with("gc/"), "{delete}");
            nothing_is_missing(&store).await;
            // The dead process is of this host, but alive: its turn is ended by hand.
            for path in store.list_all("gc").await.unwrap() {
                store.delete(&path).await.unwrap();
            }
            collect(&store, &roots, NONE, false).await.unwrap();
            let now = store.list_all("").await.unwrap();
            let now: Vec<&String> = now.iter().filter(|path| !path.starts_with("gc/")).collect();
            assert_eq!(now, left, "{delete} {fault:?}");
        }
    }
}

/// Writers that find old content of nobody while collections run all the time: every checkpoint they commit has its files.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_writer_of_old_content_never_names_what_a_collection_removed() {
    let folder = TempFolder::new();
    let store = folder.store();
    let old = SystemTime::now() - 3 * DAY;
    let stop = Cancel::new();
    let collector = {
        let (store, stop) = (folder.store(), stop.clone());
        tokio::spawn(async move {
            let mut removed = 0;
            while !stop.is_cancelled() {
                removed += collect(&store, &roots(&[]), DAY, false).await.unwrap().items.len();
            }
            removed
        })
    };
    let mut rng = Rng::new(3).key("gc race");
    for round in 0..15u64 {
        let names: Vec<String> = (0..6).map(|i| format!("content {round} {i}")).collect();
        for name in &names {
            // Left behind by somebody three days ago; it may go as soon as it looks so.
            let path = folder.0.join(blob_path(store.put_blob(content(name)).await.unwrap()));
            File::open(&path).unwrap().set_modified(old).unwrap();
        }
        tokio::time::sleep(Duration::from_micros(rng.below(3000))).await;
        let key = format!("round{round}");
        let lease = hold(&store, &key).await;
        store.wait_for_collection(&*clock(), &Cancel::new(), |_| {}).await.unwrap();
        let mut files = Vec::new();
        for name in &names {
            files.push(put(&store, name).await);
            tokio::time::sleep(Duration::from_micros(rng.below(500))).await;
        }
        store.commit_checkpoint(&key, lease.epoch(), &checkpoint(1, files.clone(), 1.0)).await.unwrap();
        for file in &files {
            assert!(store.blob_exists(file.digest).await.unwrap(), "round {round}: {} is gone", file.path);
        }
        lease.release().await.unwrap();
    }
    nothing_is_missing(&store).await;
    stop.cancel();
    assert!(collector.await.unwrap() > 0, "collections removed something on the way");
}

/// A running stage's own retention: blobs that something else names stay, and those another holder may have met.
#[tokio::test]
async fn superseded_checkpoints_go_with_what_only_they_name() {
    let store = Store::with_memory();
    let lease = hold(&store, "s").await;
    let policy = Retention { last: 2, ..Retention::default() };
    let retire = async |epoch| store.retire_checkpoints("s", epoch, &policy, clock()).await;
    finish(&store, "other", "file1").await;
    for seq in 1..=3u64 {
        let files = vec![put(&store, &format!("file{seq}")).await, put(&store, "same").await];
        store.commit_checkpoint("s", lease.epoch(), &checkpoint(seq, files, 1.0)).await.unwrap();
    }
    assert_eq!(retire(lease.epoch()).await.unwrap().seqs, [1]);
    // Named by the other stage.
    assert!(store.blob_exists(Digest::of(&content("file1"))).await.unwrap());
    let files = vec![put(&store, "file4").await];
    store.commit_checkpoint("s", lease.epoch(), &checkpoint(4, files, 1.0)).await.unwrap();
    assert_eq!(retire(lease.epoch()).await.unwrap().seqs, [2]);
    assert!(!store.blob_exists(Digest::of(&content("file2"))).await.unwrap());
    assert!(store.blob_exists(Digest::of(&content("same"))).await.unwrap());
    let other = hold(&store, "held by another").await;
    let files = vec![put(&store, "file5").await];
    store.commit_checkpoint("s", lease.epoch(), &checkpoint(5, files, 1.0)).await.unwrap();
    assert_eq!(retire(lease.epoch()).await.unwrap().seqs, [3]);
    assert!(store.blob_exists(Digest::of(&content("file3"))).await.unwrap(), "another holder may have found it");
    other.release().await.unwrap();
    nothing_is_missing(&store).await;
}
