//! Leases under a clock that moves only when told.

use std::{sync::Arc, time::Duration};

use dsv3_core::{Cancel, VirtualClock};
use tokio::task::JoinHandle;

use crate::{Holder, Lease, LeaseOptions, Store, StoreError};

fn elsewhere() -> Holder {
    Holder { host: "elsewhere".into(), ..Holder::this_process("r1") }
}

fn options(beat: Duration) -> LeaseOptions {
    LeaseOptions { beat, expire: Duration::from_secs(10), poll: Duration::from_millis(1) }
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
