//! Every fault at every store operation of every act of the protocol: the act succeeds and a clean reader sees what it
//! should, or it ends with an error of the right kind (69 or 65) and succeeds when it is done again; never a wrong answer,
//! never two commits of one number.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use dsv3_core::{Cancel, Digest, ErrorKind, Event, Events, SystemClock};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::{
    EventLog, Holder, LeaseOptions, OutputEntry, Result, RunStatus, StageResult, Store,
    blocking::Checkpoints,
    faults::{Fault, Faults, Ground},
};

/// An act, and what a clean reader must see afterwards.
#[derive(Clone, Copy, Debug)]
enum Act {
    PutBlob,
    Checkpoint,
    Fence,
    Lease,
    Beat,
    Result,
    Plan,
    Status,
    Events,
    GetBlob,
    FindCheckpoint,
    ListRuns,
}

const ACTS: [Act; 12] = [
    Act::PutBlob,
    Act::Checkpoint,
    Act::Fence,
    Act::Lease,
    Act::Beat,
    Act::Result,
    Act::Plan,
    Act::Status,
    Act::Events,
    Act::GetBlob,
    Act::FindCheckpoint,
    Act::ListRuns,
];

const CONTENT: &[u8] = b"the content of a blob";

fn result() -> StageResult {
    let digest = Digest::of(b"m");
    StageResult {
        format: StageResult::FORMAT,
        key: "key".into(),
        stage_type: "pretrain".into(),
        outputs: vec![OutputEntry { name: "model".into(), kind: "model".into(), digest, bytes: 1 }],
        metrics: BTreeMap::new(),
        last_seq: 1,
        lineage: json!({}),
        profile: json!({}),
    }
}

fn status(state: &str) -> RunStatus {
    RunStatus { format: 1, state: state.into(), unix_millis: 1, detail: json!(null) }
}

fn files(step: u8) -> Vec<(String, Vec<u8>)> {
    vec![("weights".into(), vec![step; 300]), ("moments".into(), vec![255 - step; 200])]
}

fn checkpoints(runtime: &Runtime, store: &Store) -> Checkpoints {
    Checkpoints::new(store.clone(), runtime.handle().clone(), "key", 1, "s", Events::none())
}

/// What lies in the store before each act: a blob, a checkpoint, a run with a status.
fn before(runtime: &Runtime, ground: &Ground) {
    let store = ground.store().unwrap();
    checkpoints(runtime, &store).save(1, files(1), json!({ "at": 1 })).unwrap();
    runtime.block_on(async {
        store.put_blob(Bytes::from_static(b"there before")).await.unwrap();
        store.create_run("a", Bytes::from_static(b"{}")).await.unwrap();
        store.update_status("a", |_| status("running")).await.unwrap();
    });
}

impl Act {
    /// Does it; the text is what it found, where it is one that looks for something.
    fn run(self, runtime: &Runtime, store: &Store) -> Result<String> {
        let nothing = |()| String::new();
        match self {
            Self::Checkpoint => {
                let checkpoints = checkpoints(runtime, store);
                let found = checkpoints.latest()?;
                // As a trainer does: a checkpoint that is there already is not written again.
                match found.map(|found| found.step) {
                    Some(2) => Ok(String::new()),
                    _ => checkpoints.save(2, files(2), json!({ "at": 2 })).map(|_| String::new()),
                }
            }
            Self::FindCheckpoint => {
                let found = checkpoints(runtime, store).latest()?;
                Ok(found.map_or_else(String::new, |found| found.step.to_string()))
            }
            _ => runtime.block_on(async {
                match self {
                    Self::PutBlob => store.put_blob(Bytes::from_static(CONTENT)).await.map(|digest| digest.to_string()),
                    Self::Fence => store.write_fence("key", 2).await.map(|_| String::new()),
                    Self::Lease => {
                        let options = LeaseOptions { poll: std::time::Duration::from_millis(1), ..Default::default() };
                        let clock = Arc::new(SystemClock::default());
                        let here = Holder::this_process("r");
                        // A process that has ended, so that the next one need not wait for it.
                        let holder = Holder { process_start: here.process_start + 1, ..here };
                        let lease = store.acquire("key", holder, clock, options, &Cancel::new(), |_| {}).await?;
                        lease.release().await.map(nothing)
                    }
                    Self::Beat => {
                        store.overwrite("stages/key/leases/1.beat", Bytes::from_static(b"1")).await.map(nothing)
                    }
                    Self::Result => store.commit_result("key", &result()).await.map(|r| r.last_seq.to_string()),
                    Self::Plan => match store.create_run("b", Bytes::from_static(b"{\"plan\": 1}")).await {
                        // A run whose plan is there already was made by the attempt before.
                        Err(crate::StoreError::Taken { .. }) => Ok(String::new()),
                        done => done.map(nothing),
                    },
                    Self::Status => store.update_status("a", |_| status("done")).await.map(nothing),
                    Self::Events => {
                        let log = EventLog::start(store.clone(), "a");
                        log.sink().emit(Event::Checkpoint { stage: "s".into(), seq: 1, step: 7 });
                        log.close().await.map(nothing)
                    }
                    Self::GetBlob => {
                        let bytes = store.get_blob(Digest::of(b"there before")).await?;
                        Ok(String::from_utf8_lossy(&bytes).into_owned())
                    }
                    _ => Ok(store.list_runs().await?.join(",")),
                }
            }),
        }
    }

    /// What a clean reader sees.
    fn seen(self, runtime: &Runtime, store: &Store) -> String {
        runtime.block_on(async {
            match self {
                Self::PutBlob => format!("{:?}", store.get_blob(Digest::of(CONTENT)).await),
                Self::Checkpoint | Self::Fence | Self::FindCheckpoint => {
                    let found = store.find_checkpoint("key").await.unwrap();
                    let step = found.checkpoint.map(|checkpoint| checkpoint.step);
                    format!(
                        "{step:?} of {} damaged {}",
                        store.list("stages/key/checkpoints").await.unwrap().len(),
                        found.damaged.len()
                    )
                }
                Self::Lease => format!("{:?}", store.lease_holder("key").await),
                Self::Beat => format!("{:?}", store.read("stages/key/leases/1.beat").await),
                Self::Result => format!("{:?}", store.read_result("key").await),
                Self::Plan => format!("{:?}", store.read_plan("b").await),
                Self::Status => format!("{:?}", store.read_status("a").await.unwrap().map(|status| status.state)),
                Self::Events => {
                    let mut events = store.read_events("a").await.unwrap();
                    events.dedup();
                    format!("{events:?}")
                }
                Self::GetBlob | Self::ListRuns => format!("{:?}", store.list_runs().await),
            }
        })
    }

    /// Whether doing it twice leaves two objects, so that a reader may see one more than after doing it once.
    fn may_repeat(self) -> bool {
        matches!(self, Self::Fence)
    }
}

#[test]
fn every_fault_at_every_operation_of_every_act() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut tried = 0;
    for act in ACTS {
        let base = Ground::new(None).unwrap();
        before(&runtime, &base);
        let calm = base.fork().unwrap();
        let log = Faults::default();
        let answer = act.run(&runtime, &log.wrap(&calm.store().unwrap())).unwrap();
        let seen = act.seen(&runtime, &calm.store().unwrap());
        for operation in log.operations() {
            for fault in Fault::TROUBLES.into_iter().filter(|fault| fault.meets(operation.kind)) {
                let place = format!("{act:?}, {operation}, {fault}");
                let ground = base.fork().unwrap();
                let faults = Faults::default();
                faults.plan_at(operation.clone(), fault);
                let first = act.run(&runtime, &faults.wrap(&ground.store().unwrap()));
                tried += 1;
                let again = match &first {
                    Ok(found) => {
                        // A checkpoint that reads as damaged is passed over for the one before, here for none.
                        let passed_over =
                            matches!((act, fault), (Act::FindCheckpoint, Fault::Flip)) && found.is_empty();
                        assert!(found == &answer || passed_over, "{place}: {found}");
                        false
                    }
                    Err(error) => {
                        let kind = error.kind();
                        assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::Data), "{place}: {error:?}");
                        assert_eq!(act.run(&runtime, &ground.store().unwrap()).unwrap(), answer, "{place}");
                        true
                    }
                };
                let found = act.seen(&runtime, &ground.store().unwrap());
                let twice = again && act.may_repeat();
                assert!(found == seen || twice, "{place}: {found} instead of {seen}, {first:?}");
                let damaged = runtime.block_on(ground.damaged_blobs()).unwrap();
                assert!(damaged.is_empty(), "{place}: {damaged:?}");
            }
        }
    }
    println!("{tried} faults");
    assert!(tried > 150, "{tried}");
}
