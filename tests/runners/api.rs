//! Races at the level of the store: two processes take a stage from each other as fast as they can and commit checkpoints
//! all the while. Leases expire within milliseconds; some holders beat, some are silent and are replaced in the middle of
//! their commits, and the parent pauses either at random (SIGSTOP). Each writes down every commit that it was told to have
//! succeeded.
//!
//! Invariant: no number was told to two of them, every number told is in the store under the epoch of whoever was told, and
//! no number is missing.

use std::{
    collections::BTreeMap,
    io::Read,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use dsv3_core::{Cancel, Rng, SystemClock};
use dsv3_store::{Checkpoint, Holder, LeaseOptions, Store, StoreError};
use serde_json::Value;

use super::shop::Shop;
use crate::tiny::{self, Place};

/// Set in the processes that race: `URL SEED NAME`.
const VARIABLE: &str = "DSV3_TEST_RACE";
const KEY: &str = "contested";
/// Records after which a race is over.
const RECORDS: u64 = 60;
/// A holder that does not beat within a race.
const SILENT: Duration = Duration::from_secs(600);

/// One of the processes: the parent starts this test alone with the variable set.
#[test]
fn racer() {
    let Ok(words) = std::env::var(VARIABLE) else { return };
    let words: Vec<&str> = words.split(' ').collect();
    let [url, seed, name] = words[..] else { panic!("three words") };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let mut rng = Rng::new(seed.parse().expect("a number")).key("race").key(name);
    let store = Store::open(url).expect("a store");
    runtime.block_on(async { while once(&store, name, &mut rng).await < RECORDS {} });
}

/// Takes the stage once and commits until it is replaced or has had enough; answers the highest number it saw.
async fn once(store: &Store, name: &str, rng: &mut Rng) -> u64 {
    let expire = Duration::from_millis(40 + rng.below(40));
    let beat = if rng.below(2) == 0 { SILENT } else { Duration::from_millis(10) };
    let options = LeaseOptions { beat, expire, poll: Duration::from_millis(3), ..LeaseOptions::default() };
    // Of another host as far as the other one can tell, so that only silence ends it.
    let holder = Holder { host: name.to_owned(), ..Holder::this_process(name) };
    let clock = Arc::new(SystemClock::default());
    let lease = store.acquire(KEY, holder, clock, options, &Cancel::new(), |_| {}).await.expect("a lease");
    let mut last = store.find_checkpoint(KEY).await.expect("a look").last_seq;
    for _ in 0..2 + rng.below(20) {
        if last >= RECORDS {
            break;
        }
        let checkpoint = Checkpoint {
            seq: last + 1,
            step: last + 1,
            state: Value::from(name),
            files: Vec::new(),
            tensors: Vec::new(),
        };
        match store.commit_checkpoint(KEY, lease.epoch(), &checkpoint).await {
            Ok(()) => {
                last += 1;
                println!("committed {last} {}", lease.epoch());
            }
            Err(StoreError::Fenced { .. } | StoreError::Taken { .. }) => {
                println!("stopped {last} {}", lease.epoch());
                // It would stop here; a next life of it begins.
                return last;
            }
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_micros(rng.below(9000))).await;
    }
    if beat == SILENT && rng.below(2) == 0 {
        // It goes away without a word: only its silence tells.
        std::mem::forget(lease);
    } else {
        lease.release().await.expect("an end");
    }
    last
}

/// What one race showed.
#[derive(Default)]
pub(super) struct Shown {
    commits: u64,
    takeovers: u64,
    refused: u64,
}

fn race(shop: &Shop, seed: u64) -> Shown {
    let mut rng = Rng::new(seed).key("race").key("pauses");
    let start = |name: &str| {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        let url = match shop.url() {
            url if url.starts_with("file:") => format!("file://{}", shop.folder().display()),
            url => url,
        };
        command.args(["--exact", "runners::api::racer", "--nocapture"]);
        command.env(VARIABLE, format!("{url} {seed} {name}")).envs(shop.env());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a process")
    };
    let mut children = [start("one"), start("two")];
    for _ in 0..4 {
        let paused = children[rng.below(2) as usize].id();
        thread::sleep(Duration::from_millis(20 + rng.below(120)));
        tiny::kill(paused, libc::SIGSTOP);
        thread::sleep(Duration::from_millis(rng.below(200)));
        tiny::kill(paused, libc::SIGCONT);
    }
    let mut told: BTreeMap<u64, u64> = BTreeMap::new();
    let mut shown = Shown::default();
    for child in &mut children {
        let (mut out, mut errors) = (String::new(), String::new());
        child.stdout.take().expect("piped").read_to_string(&mut out).expect("text");
        child.stderr.take().expect("piped").read_to_string(&mut errors).expect("text");
        assert!(child.wait().expect("an end").success(), "seed {seed}: {out}\n{errors}");
        for line in out.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            // The harness prints the test's name on the line of the first word.
            let from = words.iter().position(|word| ["committed", "stopped"].contains(word));
            let Some([what, seq, epoch, ..]) = from.map(|from| &words[from..]) else { continue };
            if *what == "stopped" {
                shown.refused += 1;
                continue;
            }
            let (seq, epoch) = (seq.parse().expect("a number"), epoch.parse().expect("a number"));
            let before = told.insert(seq, epoch);
            assert_eq!(before, None, "seed {seed}: {seq} was committed twice, by epochs {before:?} and {epoch}");
        }
    }
    let records = shop.records(KEY);
    for (seq, epoch) in &told {
        assert_eq!(records.get(seq), Some(&("checkpoint".to_owned(), *epoch)), "seed {seed}: number {seq}");
    }
    let mut fence = 0;
    for (seq, expected) in records.keys().zip(1..) {
        assert_eq!(*seq, expected, "seed {seed}: a number is missing");
        let (kind, epoch) = &records[seq];
        match kind.as_str() {
            // One that was paused while it wrote its own fence may leave it behind its successor's.
            "fence" => (fence, shown.takeovers) = (fence.max(*epoch), shown.takeovers + 1),
            _ => {
                assert!(*epoch >= fence, "seed {seed}: {seq} of epoch {epoch} behind a fence of {fence}");
                assert!(told.contains_key(seq), "seed {seed}: nobody was told of {seq}");
            }
        }
    }
    shown.commits = told.len() as u64;
    shown
}

/// Runs `count` races on each kind of store and prints a row for each.
#[test]
fn no_number_is_committed_twice_in_races_of_the_store() {
    let count = super::races::wanted(3);
    for kind in ["local disk", "S3"] {
        let mut all = Shown::default();
        for seed in 0..count {
            let empty = Place::new();
            let shop = if kind == "S3" { Shop::on_s3(&empty) } else { Shop::on_disk(&empty) };
            let shown = race(&shop, seed);
            all.commits += shown.commits;
            all.takeovers += shown.takeovers;
            all.refused += shown.refused;
        }
        assert!(all.takeovers >= count, "{kind}: only {} takeovers", all.takeovers);
        let Shown { commits, takeovers, refused } = all;
        println!("| store API, {kind} | {count} | {commits} | {takeovers} | {refused} | 0 |");
    }
}
