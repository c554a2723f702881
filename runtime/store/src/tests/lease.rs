//! Leases under a clock that moves only when told.

use std::{sync::Arc, time::Duration};

use dsv3_core::{Cancel, VirtualClock};
use tokio::task::JoinHandle;

use crate::{Checkpoint, Holder, IfHeld, Lease, LeaseOptions, Store, StoreError};

fn elsewhere() -> Holder {
    Holder { host: "elsewhere".into(), ..Holder::this_process("r1") }
}

fn options(beat: Duration) -> LeaseOptions {
    LeaseOptions { beat, expire: Duration::from_secs(10), poll: Duration::from_millis(1), ..LeaseOptions::default() }
}

const NEVER: Duration = Duration::from_secs(3600);

async fn take(store: &Store, holder: Holder, beat: Duration) -> Lease {
    let clock = Arc::new(VirtualClock::default());
    store.acquire("key", holder, clock, options(beat), &Cancel::new(), |_| {}).await.unwrap()
}

fn contend(store: &Store, clock: &VirtualClock, cancel: &Cancel) -> JoinHandle<crate::Result<Lease>> {
    let (store, clock, cancel) = (store.clone(), Arc::new(clock.clone()), cancel.clone());
    let holder = Holder { host: "here".into(), ..Holder::this_process("r2") };
    tokio::spawn(async move { store.acquire("key", holder, clock, options(NEVER), &cancel, |_| {}).await })
}

async fn pass_real_time() {
    tokio::time::sleep(Duration::from_millis(60)).await;
}

#[tokio::test]
async fn a_silent_holder_is_replaced_after_ten_seconds_on_the_contenders_clock() {
    let store = Store::with_memory();
    let first = take(&store, elsewhere(), NEVER).await;
    pass_real_time().await;
    let clock = VirtualClock::default();
    let contender = contend(&store, &clock, &Cancel::new());
    for _ in 0..3 {
        pass_real_time().await;
        assert!(!contender.is_finished());
        clock.advance(Duration::from_millis(3300));
    }
    pass_real_time().await;
    assert!(!contender.is_finished());
    clock.advance(Duration::from_millis(200));
    let second = contender.await.unwrap().unwrap();
    assert_eq!((first.epoch(), second.epoch()), (1, 2));
    // The fence is at the next number.
    assert_eq!(store.find_checkpoint("key").await.unwrap().last_seq, 1);
    assert_eq!(store.lease_holder("key").await.unwrap().unwrap().run, "r2");
}

#[tokio::test]
async fn a_beating_holder_keeps_its_lease() {
    let store = Store::with_memory();
    let first = take(&store, elsewhere(), Duration::from_millis(2)).await;
    let clock = VirtualClock::default();
    let cancel = Cancel::new();
    let contender = contend(&store, &clock, &cancel);
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(25)).await;
        clock.advance(Duration::from_secs(2));
    }
    assert!(!contender.is_finished());
    cancel.cancel();
    let error = contender.await.unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Cancelled { .. }) && error.to_string().contains("elsewhere"), "{error}");
    assert!(!first.lost().is_cancelled());
}

#[tokio::test]
async fn an_ended_lease_is_free_at_once_and_needs_no_fence() {
    let store = Store::with_memory();
    take(&store, elsewhere(), NEVER).await.release().await.unwrap();
    assert!(store.lease_holder("key").await.unwrap().is_none());
    assert_eq!(take(&store, elsewhere(), NEVER).await.epoch(), 2);
    assert_eq!(store.find_checkpoint("key").await.unwrap().last_seq, 0);
}

#[tokio::test]
async fn a_process_of_this_host_that_is_gone_is_replaced_at_once() {
    let here = Holder::this_process("r1");
    if here.boot_id.is_empty() {
        return;
    }
    let store = Store::with_memory();
    let gone = Holder { process_start: here.process_start + 1, ..here.clone() };
    let first = take(&store, gone, Duration::from_millis(2)).await;
    let second = take(&store, here, NEVER).await;
    assert_eq!(second.epoch(), 2);
    assert_eq!(store.find_checkpoint("key").await.unwrap().last_seq, 1);
    // The replaced holder sees it at its next beat.
    pass_real_time().await;
    assert!(first.lost().is_cancelled());
}

fn checkpoint(seq: u64) -> Checkpoint {
    Checkpoint { seq, step: seq, state: serde_json::Value::Null, files: Vec::new(), tensors: Vec::new() }
}

/// The holder finds its successor before a commit, also when its number is free and it has not beaten since.
#[tokio::test]
async fn a_replaced_holder_commits_nothing_more() {
    let store = Store::with_memory();
    let clock = VirtualClock::default();
    let first = take(&store, elsewhere(), NEVER).await;
    store.commit_checkpoint("key", first.epoch(), &checkpoint(1)).await.unwrap();
    let contender = contend(&store, &clock, &Cancel::new());
    pass_real_time().await;
    clock.advance(Duration::from_secs(11));
    let second = contender.await.unwrap().unwrap();
    for seq in [2, 3, 9] {
        let error = store.commit_checkpoint("key", first.epoch(), &checkpoint(seq)).await.unwrap_err();
        assert!(matches!(&error, StoreError::Fenced { run, .. } if run == "r2"), "{error}");
        assert_eq!(error.kind().exit_code(), 75);
    }
    assert!(first.check().await.is_err());
    // Behind the fence the new one goes on.
    store.commit_checkpoint("key", second.epoch(), &checkpoint(3)).await.unwrap();
    assert_eq!(store.find_checkpoint("key").await.unwrap().last_seq, 3);
}

/// One that is replaced before it has written its fence writes none: it would only stop its successor.
#[tokio::test]
async fn a_holder_that_was_replaced_writes_no_fence() {
    let store = Store::with_memory();
    let first = take(&store, elsewhere(), NEVER).await;
    first.release().await.unwrap();
    let second = take(&store, elsewhere(), NEVER).await;
    let error = store.write_fence("key", second.epoch() - 1).await.unwrap_err();
    assert!(matches!(error, StoreError::Fenced { .. }), "{error}");
    assert_eq!(store.find_checkpoint("key").await.unwrap().last_seq, 0);
}

/// Dropped in the middle, a lease is free at once, and whatever its holder still sends meets a fence.
#[tokio::test]
async fn a_dropped_lease_is_fenced_off_without_waiting() {
    let store = Store::with_memory();
    let first = take(&store, elsewhere(), NEVER).await;
    let lost = first.lost().clone();
    drop(first);
    assert!(lost.is_cancelled());
    pass_real_time().await;
    assert_eq!(take(&store, elsewhere(), NEVER).await.epoch(), 2);
    assert_eq!(store.find_checkpoint("key").await.unwrap().last_seq, 1);
}

#[tokio::test]
async fn a_second_runner_refuses_a_living_holder_and_replaces_a_silent_one() {
    let store = Store::with_memory();
    let refuse = |clock: &VirtualClock| {
        let (store, clock) = (store.clone(), Arc::new(clock.clone()));
        let options = LeaseOptions { if_held: IfHeld::Refuse, ..options(NEVER) };
        let holder = Holder { host: "here".into(), ..Holder::this_process("r2") };
        let told = |_: &Holder| panic!("it does not wait");
        tokio::spawn(async move { store.acquire("key", holder, clock, options, &Cancel::new(), told).await })
    };
    let living = take(&store, elsewhere(), Duration::from_millis(20)).await;
    let error = refuse(&VirtualClock::default()).await.unwrap().unwrap_err();
    assert!(matches!(&error, StoreError::Held { run, .. } if run == "r1"), "{error}");
    assert!(error.to_string().contains("elsewhere") && error.kind().exit_code() == 75, "{error}");
    living.release().await.unwrap();
    let silent = take(&store, elsewhere(), NEVER).await;
    pass_real_time().await;
    let clock = VirtualClock::default();
    let contender = refuse(&clock);
    pass_real_time().await;
    assert!(!contender.is_finished());
    clock.advance(Duration::from_secs(11));
    assert_eq!(contender.await.unwrap().unwrap().epoch(), silent.epoch() + 1);
}

/// The holder's own patience counts when it is longer than the contender's: two settings never fight.
#[tokio::test]
async fn an_impatient_contender_waits_as_long_as_the_holder_asks() {
    let store = Store::with_memory();
    let _first = take(&store, elsewhere(), NEVER).await;
    pass_real_time().await;
    let clock = VirtualClock::default();
    let (other, at) = (store.clone(), Arc::new(clock.clone()));
    let impatient = LeaseOptions { expire: Duration::from_millis(100), ..options(NEVER) };
    let holder = Holder { host: "here".into(), ..Holder::this_process("r2") };
    let contender =
        tokio::spawn(async move { other.acquire("key", holder, at, impatient, &Cancel::new(), |_| {}).await });
    pass_real_time().await;
    clock.advance(Duration::from_secs(9));
    pass_real_time().await;
    assert!(!contender.is_finished());
    clock.advance(Duration::from_secs(2));
    assert_eq!(contender.await.unwrap().unwrap().epoch(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_contenders_one_holds_it_at_a_time() {
    let store = Store::with_memory();
    let held = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (store, held) = (store.clone(), held.clone());
            tokio::spawn(async move {
                let lease = take(&store, elsewhere(), NEVER).await;
                assert_eq!(held.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                tokio::time::sleep(Duration::from_millis(2)).await;
                held.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                let epoch = lease.epoch();
                lease.release().await.unwrap();
                epoch
            })
        })
        .collect();
    let mut epochs = Vec::new();
    for task in tasks {
        epochs.push(task.await.unwrap());
    }
    epochs.sort_unstable();
    assert_eq!(epochs, (1..=16).collect::<Vec<u64>>());
}
