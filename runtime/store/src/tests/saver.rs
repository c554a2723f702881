//! Saves in the background: what a stage waits for, their order, their errors, and rewinds.

use std::sync::{Arc, Mutex, mpsc};

use bytes::Bytes;
use dsv3_core::{Digest, Event, Events};
use serde_json::json;
use tokio::runtime::{Builder, Runtime};

use crate::{
    Buffers, CheckpointRecord, Store, StoreError, TensorEntry, TensorRole, TensorSlice, TensorType,
    blocking::{Checkpoints, Save},
    faults::{Fault, Faults},
};

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn save(step: u64) -> Save {
    let bytes = Bytes::from(vec![step as u8; 24]);
    let (offsets, lengths) = (vec![0, 0], vec![2, 3]);
    let slices = vec![TensorSlice { file: "weights".into(), offsets, lengths, bytes: [0, 24], digest: None }];
    let (role, dtype, shape) = (TensorRole::Master, TensorType::F32, vec![2, 3]);
    let tensors = vec![TensorEntry { name: "w".into(), role, dtype, shape, slices }];
    Save { step, files: vec![("weights".into(), bytes)], tensors, state: json!({ "cursor": step }) }
}

fn saver(store: &Store, runtime: &Runtime, events: Events) -> Checkpoints {
    Checkpoints::new(store.clone(), runtime.handle().clone(), "key", 1, "base", events)
}

fn saver_at(store: &Store, runtime: &Runtime, seq: u64) -> crate::Checkpoint {
    saver(store, runtime, Events::none()).at(Some(seq)).latest().unwrap().unwrap()
}

/// Keeps the only worker of `runtime` busy until the sender is dropped.
fn busy(runtime: &Runtime) -> mpsc::Sender<()> {
    let (sender, receiver) = mpsc::channel::<()>();
    let (started, wait) = mpsc::channel();
    runtime.spawn(async move {
        started.send(()).unwrap();
        let _ = receiver.recv();
    });
    wait.recv().unwrap();
    sender
}

/// The next copy is made while the save before is still in flight, into other memory; after that save its memory is used
/// again where the store does not hold it itself.
#[test]
fn a_copy_made_beside_a_save_does_not_reach_it() {
    // On the heap and in a mapping of its own.
    for length in [4096, 5 << 20] {
        let folder = tempfile::tempdir().unwrap();
        for (store, gives_back) in
            [(Store::open(&folder.path().display().to_string()).unwrap(), true), (Store::with_memory(), false)]
        {
            let (runtime, buffers) = (runtime(), Buffers::new(vec![length]));
            let saver = saver(&store, &runtime, Events::none());
            let copy = |fill: u8| {
                let mut buffer = buffers.take(length).unwrap();
                buffer.fill(fill);
                Bytes::from(buffer)
            };
            let save = |step: u64, bytes: Bytes| Save { step, files: vec![("a".into(), bytes)], ..Save::default() };
            let gate = busy(&runtime);
            let first = copy(1);
            let at = first.as_ptr();
            saver.start(save(1, first)).unwrap();
            let second = copy(2);
            assert_ne!(second.as_ptr(), at);
            drop(gate);
            saver.finish().unwrap();
            let third = copy(3);
            assert_eq!(third.as_ptr() == at, gives_back);
            saver.start(save(2, second)).unwrap();
            saver.start(save(3, third)).unwrap();
            saver.finish().unwrap();
            for seq in 1..=3 {
                let found = saver_at(&store, &runtime, seq);
                let bytes = saver.read(&found.files[0]).unwrap();
                assert!(bytes.len() == length && bytes.iter().all(|byte| u64::from(*byte) == seq), "{seq}");
            }
        }
    }
}

#[test]
fn a_step_does_not_wait_for_the_commit_and_the_end_does() {
    let (runtime, looking, store) = (runtime(), runtime(), Store::with_memory());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    let saver = saver(&store, &runtime, Events::new(move |event| sink.lock().unwrap().push(event)));
    let gate = busy(&runtime);
    // The save cannot go on, and the step does.
    saver.start(save(1)).unwrap();
    saver.poll().unwrap();
    assert!(looking.block_on(store.checkpoint_seqs("key")).unwrap().is_empty());
    assert_eq!(saver.last_seq(), 0);
    drop(gate);
    saver.finish().unwrap();
    assert_eq!(saver.last_seq(), 1);
    let found = saver.latest().unwrap().unwrap();
    assert_eq!((found.step, &found.state), (1, &json!({ "cursor": 1 })));
    // Every slice has its digest, and the files are those that were handed over.
    assert_eq!(found.tensors[0].slices[0].digest, Some(Digest::of(&[1; 24])));
    assert_eq!(found.files[0].digest, Digest::of(&[1; 24]));
    assert_eq!(saver.read_rows(&found, "w", 1..2).unwrap(), [1; 12]);
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0], Event::Checkpoint { stage: "base".into(), seq: 1, step: 1 });
    assert!(matches!(&seen[1], Event::Metric { name, step: 1, .. } if name == "checkpoint_save_seconds"));
}

#[test]
fn saves_keep_their_order_and_one_is_in_flight() {
    let (runtime, store) = (runtime(), Store::with_memory());
    let saver = saver(&store, &runtime, Events::none());
    for step in 1..=5 {
        saver.start(save(step)).unwrap();
        // The one before is committed once the next is taken.
        assert!(saver.last_seq() >= step - 1);
    }
    assert_eq!(saver.latest().unwrap().unwrap().step, 5);
    for seq in 1..=5 {
        let record = runtime.block_on(store.checkpoint_record("key", seq)).unwrap();
        assert!(matches!(record, CheckpointRecord::Checkpoint(checkpoint) if checkpoint.step == seq));
    }
}

#[test]
fn the_error_of_a_save_is_told_once_and_the_next_save_takes_its_number() {
    let (runtime, faults) = (runtime(), Faults::default());
    let store = faults.memory();
    let saver = saver(&store, &runtime, Events::none());
    saver.start(save(1)).unwrap();
    saver.finish().unwrap();
    faults.plan("checkpoints", Fault::Full, 1);
    saver.start(save(2)).unwrap();
    while saver.poll().is_ok() {
        std::thread::yield_now();
    }
    saver.finish().unwrap();
    faults.plan("checkpoints", Fault::Full, 1);
    saver.start(save(3)).unwrap();
    assert!(matches!(saver.start(save(4)), Err(StoreError::Unavailable { .. })));
    saver.start(save(4)).unwrap();
    saver.finish().unwrap();
    let found = saver.latest().unwrap().unwrap();
    assert_eq!((found.seq, found.step), (2, 4));
}

#[test]
fn a_fence_stops_a_save_in_flight() {
    let (runtime, looking, store) = (runtime(), runtime(), Store::with_memory());
    let saver = saver(&store, &runtime, Events::none());
    saver.start(save(1)).unwrap();
    saver.finish().unwrap();
    let gate = busy(&runtime);
    saver.start(save(2)).unwrap();
    looking.block_on(store.write_fence("key", 2)).unwrap();
    drop(gate);
    assert!(matches!(saver.finish(), Err(StoreError::Taken { .. })));
    assert_eq!(saver.latest().unwrap().unwrap().step, 1);
}

/// The fence of a holder that was replaced while it wrote it stands in nobody's way but its own.
#[test]
fn a_fence_of_an_earlier_holder_is_stepped_over() {
    let (runtime, looking, store) = (runtime(), runtime(), Store::with_memory());
    let saver = saver(&store, &runtime, Events::none());
    saver.start(save(1)).unwrap();
    saver.finish().unwrap();
    let gate = busy(&runtime);
    saver.start(save(2)).unwrap();
    assert_eq!(looking.block_on(store.write_fence("key", 0)).unwrap(), 2);
    drop(gate);
    saver.finish().unwrap();
    assert_eq!((saver.last_seq(), saver.latest().unwrap().unwrap().step), (3, 2));
}

/// What was committed after the number gone back to stays in the store; readers pass it by.
#[test]
fn a_rewind_sends_readers_back_and_loses_nothing() {
    let (runtime, store) = (runtime(), Store::with_memory());
    let first = saver(&store, &runtime, Events::none());
    for step in 1..=4 {
        first.start(save(step)).unwrap();
    }
    first.finish().unwrap();
    assert_eq!(runtime.block_on(store.rewind_checkpoints("key", 1, 2, "run")).unwrap(), 5);
    let second = saver(&store, &runtime, Events::none());
    assert_eq!(second.latest().unwrap().unwrap().seq, 2);
    second.start(save(3)).unwrap();
    second.finish().unwrap();
    assert_eq!(second.latest().unwrap().unwrap().seq, 6);
    // Back once more, past the first rewind; and what was passed by can still be asked for.
    assert_eq!(runtime.block_on(store.rewind_checkpoints("key", 1, 4, "run")).unwrap(), 7);
    assert_eq!(second.latest().unwrap().unwrap().seq, 4);
    assert_eq!(saver(&store, &runtime, Events::none()).at(Some(6)).latest().unwrap().unwrap().seq, 6);
    let at = |seq| saver(&store, &runtime, Events::none()).at(Some(seq)).latest().unwrap_err();
    for seq in [5, 9] {
        assert_eq!(at(seq).to_string(), format!("this stage has no checkpoint {seq}; it has 1, 2, 3, 4, 6"));
    }
    let error = runtime.block_on(store.rewind_checkpoints("key", 1, 5, "run")).unwrap_err();
    assert!(error.to_string().contains("no checkpoint"), "{error}");
    assert_eq!(runtime.block_on(store.checkpoint_seqs("key")).unwrap(), [1, 2, 3, 4, 5, 6, 7]);
}
