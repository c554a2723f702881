//! The faults themselves: each does what its name says, and what follows a crash is silence.

use std::sync::Arc;

use bytes::Bytes;
use object_store::memory::InMemory;

use super::*;
use crate::{Create, Store, StoreError, tests::TempFolder};

fn wrapped() -> (Store, Store, Faults) {
    let below = Store::with_objects("memory://", Arc::new(InMemory::new()));
    let faults = Faults::default();
    (faults.wrap(&below), below, faults)
}

fn operation(text: &str) -> Operation {
    text.parse().unwrap()
}

#[tokio::test]
async fn operations_are_logged_by_name() {
    let (store, _, faults) = wrapped();
    store.create("runs/one/plan.json", Bytes::from_static(b"1")).await.unwrap();
    store.create("runs/two/plan.json", Bytes::from_static(b"1")).await.unwrap();
    store.read("runs/one/plan.json").await.unwrap();
    store.list("runs").await.unwrap();
    store.length("x").await.unwrap();
    store.delete("x").await.unwrap();
    let names: Vec<String> = faults.operations().iter().map(ToString::to_string).collect();
    let expected = [
        "create runs/RUN/plan.json #1",
        "create runs/RUN/plan.json #2",
        "get runs/RUN/plan.json #1",
        "list runs #1",
        "head x #1",
        "delete x #1",
    ];
    assert_eq!(names, expected);
}

#[tokio::test]
async fn after_a_crash_nothing_reaches_the_store() {
    for (fault, arrives) in [(Fault::CrashBefore, false), (Fault::CrashAfter, true)] {
        let (store, below, faults) = wrapped();
        faults.plan_at(operation("create b #1"), fault);
        store.create("a", Bytes::from_static(b"1")).await.unwrap();
        let error = store.create("b", Bytes::from_static(b"1")).await.unwrap_err();
        assert!(error.to_string().contains("died here"), "{error}");
        assert!(faults.crashed());
        assert_eq!(faults.struck(), [(operation("create b #1"), fault)]);
        for failed in [
            store.create("c", Bytes::from_static(b"1")).await.map(drop),
            store.overwrite("a", Bytes::from_static(b"2")).await,
            store.read("a").await.map(drop),
            store.length("a").await.map(drop),
            store.list("").await.map(drop),
            store.delete("a").await,
        ] {
            assert!(matches!(failed, Err(StoreError::Unavailable { .. })), "{failed:?}");
        }
        // The next process.
        let next = Faults::default().wrap(&below);
        assert_eq!(next.read("a").await.unwrap(), "1");
        assert_eq!(next.read_if_exists("b").await.unwrap().is_some(), arrives);
        assert!(next.read_if_exists("c").await.unwrap().is_none());
    }
}

#[tokio::test]
async fn a_crash_in_any_step_of_a_local_create_leaves_a_whole_object_or_none() {
    let steps = [
        ("stage", Fault::CrashBefore, false, 0),
        ("sync", Fault::CrashBefore, false, 1),
        ("sync", Fault::Torn, false, 1),
        ("link", Fault::CrashBefore, false, 1),
        ("sync-folder", Fault::CrashBefore, true, 1),
        ("answer", Fault::CrashBefore, true, 1),
    ];
    for (step, fault, arrives, left) in steps {
        let folder = TempFolder::new();
        let below = folder.store();
        let faults = Faults::default();
        let store = faults.wrap(&below);
        faults.plan_at(operation(&format!("{step} a/b #1")), fault);
        store.create("a/b", Bytes::from_static(b"0123456789")).await.unwrap_err();
        assert!(faults.crashed(), "{step}");
        store.create("a/c", Bytes::from_static(b"0")).await.unwrap_err();
        assert_eq!(std::fs::read_dir(folder.0.join("tmp")).map_or(0, Iterator::count), left, "{step}");
        assert_eq!(below.read_if_exists("a/b").await.unwrap().is_some(), arrives, "{step}");
        let again = below.create("a/b", Bytes::from_static(b"0123456789")).await.unwrap();
        assert_eq!(again == Create::AlreadyExists, arrives, "{step}");
        assert_eq!(below.read("a/b").await.unwrap(), "0123456789");
    }
}

#[tokio::test]
async fn reads_are_cut_flipped_and_late_and_lists_break() {
    let (store, _, faults) = wrapped();
    let digest = store.put_blob(Bytes::from_static(b"0123456789")).await.unwrap();
    faults.plan("blobs", Fault::Flip, 1);
    assert!(matches!(store.get_blob(digest).await, Err(StoreError::Damaged { .. })));
    // What is short of what was promised is read again.
    faults.plan("blobs", Fault::Short, 2);
    assert_eq!(store.get_blob(digest).await.unwrap(), "0123456789");
    faults.plan("", Fault::Stall, 2);
    assert_eq!(store.get_blob(digest).await.unwrap(), "0123456789");
    // Both kinds of listing are tried again.
    faults.plan("", Fault::BrokenList, 1);
    assert_eq!(store.list("blobs").await.unwrap().len(), 1);
    faults.plan("", Fault::BrokenList, 1);
    assert_eq!(store.list_all("").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_store_of_few_bytes_is_full_in_the_end() {
    let (store, _, faults) = wrapped();
    faults.capacity(10);
    store.create("a", Bytes::from_static(b"12345678")).await.unwrap();
    let error = store.create("b", Bytes::from_static(b"12345678")).await.unwrap_err();
    assert!(error.to_string().contains("no storage space"), "{error}");
    assert_eq!(store.read("a").await.unwrap(), "12345678");
    faults.clear();
    store.create("b", Bytes::from_static(b"12345678")).await.unwrap();
}

#[tokio::test]
async fn a_storm_is_a_function_of_its_seed() {
    let mut seen = Vec::new();
    for seed in [1, 1, 2] {
        let (store, _, faults) = wrapped();
        faults.storm(seed, 300, &[Fault::Timeout, Fault::LostAnswer, Fault::Short, Fault::BrokenList]);
        for i in 0..40 {
            let path = format!("a/{i}");
            // Four tries may all fail; then it is an error, and never a wrong answer.
            match store.create(&path, Bytes::from_static(b"one")).await {
                Ok(created) => assert_eq!(created, Create::Created),
                Err(error) => assert!(matches!(error, StoreError::Unavailable { .. }), "{error}"),
            }
            match store.length(&path).await {
                Ok(length) => assert!(matches!(length, None | Some(3))),
                Err(error) => assert!(matches!(error, StoreError::Unavailable { .. }), "{error}"),
            }
        }
        seen.push(faults.struck());
    }
    assert!(seen[0].len() > 5);
    assert_eq!(seen[0], seen[1]);
    assert_ne!(seen[0], seen[2]);
}
