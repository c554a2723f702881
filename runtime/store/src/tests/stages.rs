//! Checkpoints, results and runs.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use dsv3_core::{Event, Events, Figure, Level};
use serde_json::json;
use tokio::runtime::Runtime;

use super::TempFolder;
use crate::{EventLog, OutputEntry, RunStatus, StageResult, Store, StoreError, blocking::Checkpoints};

fn files(step: u64) -> Vec<(String, Vec<u8>)> {
    vec![("weights".into(), vec![step as u8; 1000]), ("moments".into(), vec![255 - step as u8; 500])]
}

fn recorder() -> (Events, Arc<Mutex<Vec<Event>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    (Events::new(move |event| sink.lock().unwrap().push(event)), seen)
}

fn checkpoints(store: &Store, runtime: &Runtime, events: Events) -> Checkpoints {
    Checkpoints::new(store.clone(), runtime.handle().clone(), "key", 1, "base", events)
}

#[test]
fn checkpoints_count_on_and_the_newest_is_found() {
    let runtime = Runtime::new().unwrap();
    let store = Store::with_memory();
    let (events, seen) = recorder();
    let first = checkpoints(&store, &runtime, events);
    assert_eq!(first.latest().unwrap(), None);
    assert_eq!(first.save(10, files(10), json!({"cursor": 10})).unwrap(), 1);
    assert_eq!(first.save(20, files(20), json!({"cursor": 20})).unwrap(), 2);
    assert_eq!(seen.lock().unwrap().last(), Some(&Event::Checkpoint { stage: "base".into(), seq: 2, step: 20 }));
    let second = checkpoints(&store, &runtime, Events::none());
    let found = second.latest().unwrap().unwrap();
    assert_eq!((found.seq, found.step, &found.state), (2, 20, &json!({"cursor": 20})));
    assert_eq!(second.read(found.file("weights").unwrap()).unwrap(), vec![20; 1000]);
    assert_eq!(second.save(30, files(30), json!(null)).unwrap(), 3);
    assert_eq!(second.last_seq(), 3);
}

#[test]
fn damaged_newest_checkpoints_are_named_and_an_older_one_serves() {
    let runtime = Runtime::new().unwrap();
    let folder = TempFolder::new();
    let writer = checkpoints(&folder.store(), &runtime, Events::none());
    for step in 1..=4 {
        writer.save(step, files(step), json!({"step": step})).unwrap();
    }
    let record = |seq: u64| folder.0.join(format!("stages/key/checkpoints/{seq:08}.json"));
    // The newest record is cut, the next has one changed digit, the third lacks bytes of a file.
    let text = fs::read_to_string(record(4)).unwrap();
    fs::write(record(4), &text[..text.len() / 2]).unwrap();
    let text = fs::read_to_string(record(3)).unwrap();
    fs::write(record(3), text.replace("\"step\":3", "\"step\":5")).unwrap();
    let store = folder.store();
    let weights = store.local_blob(dsv3_core::Digest::of(&[2; 1000])).unwrap();
    fs::write(&weights, [2; 999]).unwrap();
    let (events, seen) = recorder();
    let reader = checkpoints(&store, &runtime, events);
    assert_eq!(reader.latest().unwrap().unwrap().step, 1);
    let warnings: Vec<String> = seen
        .lock()
        .unwrap()
        .iter()
        .filter_map(|event| match event {
            Event::Log { level: Level::Warn, message, .. } => Some(message.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[0].contains("00000004.json") && warnings[1].contains("00000003.json"), "{warnings:?}");
    assert!(warnings[2].contains("weights") && warnings[2].contains("999 bytes instead of 1000"), "{warnings:?}");
    // The next commit goes behind the damaged ones, and writing the same content heals the blob.
    assert_eq!(reader.save(2, files(2), json!({"step": 2})).unwrap(), 5);
    assert_eq!(checkpoints(&folder.store(), &runtime, Events::none()).latest().unwrap().unwrap().seq, 5);
}

#[test]
fn a_writer_whose_number_is_taken_stops() {
    let runtime = Runtime::new().unwrap();
    let store = Store::with_memory();
    let paused = checkpoints(&store, &runtime, Events::none());
    assert_eq!(paused.save(1, files(1), json!(null)).unwrap(), 1);
    assert_eq!(runtime.block_on(store.write_fence("key", 2)).unwrap(), 2);
    for _ in 0..2 {
        assert!(matches!(paused.save(2, files(2), json!(null)), Err(StoreError::Taken { .. })));
    }
    let next = checkpoints(&store, &runtime, Events::none());
    assert_eq!(next.latest().unwrap().unwrap().step, 1);
    assert_eq!(next.save(2, files(2), json!(null)).unwrap(), 3);
}

#[tokio::test]
async fn the_first_result_counts() {
    let store = Store::with_memory();
    assert!(store.read_result("key").await.unwrap().is_none());
    let digest = dsv3_core::Digest::of(b"m");
    let output = OutputEntry { name: "model".into(), kind: "model".into(), digest, bytes: 1 };
    let mut result = StageResult {
        format: StageResult::FORMAT,
        key: "key".into(),
        stage_type: "pretrain".into(),
        outputs: vec![output],
        metrics: BTreeMap::from([("loss".into(), Figure::new(f64::NAN)), ("rate".into(), Figure::new(0.1))]),
        last_seq: 3,
        lineage: json!({"skipped": [7]}),
        profile: json!({}),
    };
    store.commit_result("key", &result).await.unwrap();
    result.last_seq = 4;
    assert_eq!(store.commit_result("key", &result).await.unwrap().last_seq, 3);
    let found = store.read_result("key").await.unwrap().unwrap();
    assert!(found.metrics["loss"].value.is_nan());
    assert_eq!((found.metrics["rate"].value, &found.outputs), (0.1, &result.outputs));
    let text = store.read("stages/key/result.json").await.unwrap();
    let text: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!((&text["type"], &text["outputs"][0]["kind"]), (&json!("pretrain"), &json!("model")));
    // A damaged result is refused, and replaced by the next commit.
    store.delete("stages/key/result.json").await.unwrap();
    store.create("stages/key/result.json", Bytes::from_static(b"{\"format\":1}")).await.unwrap();
    assert!(matches!(store.read_result("key").await, Err(StoreError::Damaged { .. })));
    store.commit_result("key", &result).await.unwrap();
    assert_eq!(store.read_result("key").await.unwrap().unwrap().last_seq, 4);
}

#[tokio::test]
async fn runs_keep_plan_status_and_events() {
    let store = Store::with_memory();
    store.create_run("r1", Bytes::from_static(b"{}")).await.unwrap();
    assert!(store.create_run("r1", Bytes::from_static(b"{}")).await.is_err());
    assert_eq!(store.list_runs().await.unwrap(), ["r1"]);
    assert_eq!(store.read_status("r1").await.unwrap(), None);
    for (i, state) in ["running", "done"].into_iter().enumerate() {
        let status = RunStatus { format: 1, state: state.into(), unix_millis: i as u64, detail: json!(null) };
        store.write_status("r1", &status).await.unwrap();
    }
    assert_eq!(store.read_status("r1").await.unwrap().unwrap().state, "done");
    for attempt in 0..2 {
        let log = EventLog::start(store.clone(), "r1");
        let sink = log.sink();
        for seq in 0..1500 {
            sink.emit(Event::Checkpoint { stage: "s".into(), seq, step: attempt });
            sink.emit(Event::Progress { stage: "s".into(), done: seq, total: None, unit: "steps".into() });
        }
        log.close().await.unwrap();
    }
    let events = store.read_events("r1").await.unwrap();
    assert_eq!(events.len(), 3000);
    for segment in store.read_event_segments("r1").await.unwrap() {
        assert_eq!(crate::segment_problem(&segment), None);
        let mut changed = segment.to_vec();
        let at = changed.len() - 4;
        changed[at] ^= 1;
        assert_eq!(crate::segment_problem(&changed).as_deref(), Some("its check digest does not match"));
    }
    assert_eq!(events[2999], Event::Checkpoint { stage: "s".into(), seq: 1499, step: 1 });
}
