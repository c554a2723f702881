//! `kill -9` of a writer at arbitrary moments, on a local disk: what it reported as committed is there and whole.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use dsv3_core::{Cancel, Events, SystemClock};
use serde_json::json;
use tokio::runtime::Runtime;

use super::TempFolder;
use crate::{Holder, LeaseOptions, Store, blocking::Checkpoints};

const URL_VARIABLE: &str = "DSV3_TEST_KILL_URL";

fn content(step: u64) -> Vec<u8> {
    (0..200_000u64).map(|i| (i.wrapping_mul(step + 3) >> 3) as u8).collect()
}

/// The process that is killed: the parent starts this test alone with the variable set.
#[test]
fn writer() {
    let Ok(url) = std::env::var(URL_VARIABLE) else { return };
    let runtime = Runtime::new().unwrap();
    let store = Store::open(&url).unwrap();
    let holder = Holder::this_process("r");
    let clock = std::sync::Arc::new(SystemClock::default());
    let cancel = Cancel::new();
    let lease = store.acquire("key", holder, clock, LeaseOptions::default(), &cancel, |_| {});
    let lease = runtime.block_on(lease).unwrap();
    let checkpoints = Checkpoints::new(store, runtime.handle().clone(), "key", lease.epoch(), "s", Events::none());
    let mut step = checkpoints.latest().unwrap().map_or(0, |found| found.step);
    loop {
        step += 1;
        checkpoints.save(step, vec![("a".into(), content(step))], json!({ "step": step })).unwrap();
        println!("committed {step}");
    }
}

fn start(url: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "tests::kill::writer", "--nocapture"]).env(URL_VARIABLE, url);
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_writer_loses_nothing_it_committed() {
    let folder = TempFolder::new();
    let url = folder.0.display().to_string();
    let mut step_before = 0;
    for round in 0..4u64 {
        let mut child = start(&url);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let committed =
            |line: String| line.rsplit_once("committed ").and_then(|(_, step)| step.trim().parse::<u64>().ok());
        let first = lines.by_ref().find_map(committed).unwrap();
        assert_eq!(first, step_before + 1, "the next process goes on from the last checkpoint, without waiting");
        std::thread::sleep(Duration::from_micros(7_300 * round + 900));
        child.kill().unwrap();
        child.wait().unwrap();
        let last = lines.filter_map(committed).last().unwrap_or(first);
        let store = folder.store();
        let found = Runtime::new().unwrap().block_on(store.find_checkpoint("key")).unwrap();
        assert!(found.damaged.is_empty(), "{:?}", found.damaged);
        let checkpoint = found.checkpoint.unwrap();
        // One more may have been committed than was reported.
        assert!(checkpoint.step == last || checkpoint.step == last + 1, "{} after {last}", checkpoint.step);
        assert_eq!(checkpoint.files[0].digest, dsv3_core::Digest::of(&content(checkpoint.step)));
        step_before = checkpoint.step;
    }
}
