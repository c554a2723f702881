//! Objects and blobs on memory, local and faulty stores.

use std::{fs, sync::Arc};

use bytes::Bytes;
use dsv3_core::{Digest, ErrorKind, FileEntry, Manifest};
use object_store::memory::InMemory;

use super::{TempFolder, each};
use crate::{
    Create, Sources, Store, StoreError,
    faults::{Fault, Faults, FaultyObjects},
};

fn faulty() -> (Store, Faults) {
    let faults = Faults::default();
    let objects = FaultyObjects::new(Arc::new(InMemory::new()), faults.clone());
    (Store::with_objects("memory://faulty", Arc::new(objects)), faults)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_racing_creates_exactly_one_wins() {
    let folder = TempFolder::new();
    for store in each(&folder) {
        for round in 0..8 {
            let path = format!("stages/k/checkpoints/{round}.json");
            let racers: Vec<_> = (0..32)
                .map(|i| {
                    let (store, path) = (store.clone(), path.clone());
                    tokio::spawn(
                        async move { (i, store.create(&path, Bytes::from(format!("racer {i}"))).await.unwrap()) },
                    )
                })
                .collect();
            let mut winners = Vec::new();
            for racer in racers {
                let (i, outcome) = racer.await.unwrap();
                winners.extend((outcome == Create::Created).then_some(i));
            }
            assert_eq!(winners.len(), 1, "{store:?}");
            assert_eq!(store.read(&path).await.unwrap(), format!("racer {}", winners[0]));
        }
    }
}

#[tokio::test]
async fn objects_are_listed_read_and_deleted() {
    let folder = TempFolder::new();
    for store in each(&folder) {
        for path in ["runs/b/plan.json", "runs/a/plan.json", "runs/x.json"] {
            store.create(path, Bytes::from_static(b"1")).await.unwrap();
        }
        assert_eq!(store.list("runs").await.unwrap(), ["a/", "b/", "x.json"]);
        assert_eq!(store.list_all("runs").await.unwrap(), ["runs/a/plan.json", "runs/b/plan.json", "runs/x.json"]);
        assert!(store.list("nothing/here").await.unwrap().is_empty());
        store.delete("runs/x.json").await.unwrap();
        store.delete("runs/x.json").await.unwrap();
        let error = store.read("runs/x.json").await.unwrap_err();
        assert!(matches!(error, StoreError::Missing { .. }) && error.to_string().contains("runs/x.json"), "{error}");
        assert!(store.read("../outside").await.is_err());
    }
}

#[tokio::test]
async fn a_cut_or_changed_blob_is_refused_and_healed_by_the_next_put() {
    let folder = TempFolder::new();
    let store = folder.store();
    let digest = store.put_blob(Bytes::from_static(b"0123456789")).await.unwrap();
    let file = store.local_blob(digest).unwrap();
    store.verify_blob(digest, 10).await.unwrap();
    for damage in [&b"01234"[..], b"0123456780"] {
        fs::write(&file, damage).unwrap();
        let error = folder.store().verify_blob(digest, 10).await.unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        let error = store.get_blob(digest).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Data);
        assert!(error.to_string().contains(&file.display().to_string()), "{error}");
        assert_eq!(store.put_blob(Bytes::from_static(b"0123456789")).await.unwrap(), digest);
        assert_eq!(store.get_blob(digest).await.unwrap(), "0123456789");
    }
    fs::write(folder.0.join("input"), b"0123456789").unwrap();
    fs::write(&file, b"").unwrap();
    assert_eq!(store.put_blob_file(&folder.0.join("input")).await.unwrap(), (digest, 10));
    assert_eq!(fs::read(&file).unwrap(), b"0123456789");
    assert_eq!(fs::read_dir(folder.0.join("tmp")).unwrap().count(), 0);
}

#[tokio::test]
async fn blobs_and_manifests_round_trip() {
    let folder = TempFolder::new();
    let (third, _) = faulty();
    for store in each(&folder).into_iter().chain([third]) {
        let digest = store.put_blob(Bytes::from_static(b"abc")).await.unwrap();
        assert_eq!(digest, Digest::of(b"abc"));
        assert_eq!(store.get_blob(digest).await.unwrap(), "abc");
        let file = FileEntry { path: "a/b.txt".into(), digest, bytes: 3 };
        let mut manifest = Manifest {
            format: 1,
            kind: "report".into(),
            files: vec![file],
            meta: serde_json::json!({"b": 1, "a": 0.1}),
        };
        let id = store.put_manifest(&manifest).await.unwrap();
        assert_eq!(store.manifest(id).await.unwrap(), manifest);
        manifest.files[0].path = "../b.txt".into();
        let id = store.put_manifest(&manifest).await.unwrap();
        assert!(matches!(store.manifest(id).await, Err(StoreError::BadPath { .. })));
        assert!(matches!(store.manifest(digest).await, Err(StoreError::Damaged { .. })));
    }
}

#[tokio::test]
async fn a_source_is_read_where_it_lies_and_refused_when_it_changed() {
    let folder = TempFolder::new();
    let store = folder.store();
    let path = folder.0.join("input.jsonl");
    fs::write(&path, b"one").unwrap();
    let entry = FileEntry { path: "input.jsonl".into(), digest: Digest::of(b"one"), bytes: 3 };
    let sources = Sources::from([(entry.digest, path.display().to_string())]);
    assert_eq!(store.get_file(&entry, &sources).await.unwrap(), "one");
    fs::write(&path, b"two").unwrap();
    let error = store.get_file(&entry, &sources).await.unwrap_err();
    assert!(matches!(error, StoreError::SourceChanged { .. }), "{error}");
    fs::remove_file(&path).unwrap();
    let error = store.get_file(&entry, &sources).await.unwrap_err();
    assert!(matches!(error, StoreError::SourceMissing { .. }) && error.to_string().contains("input.jsonl"), "{error}");
    assert_eq!(error.kind().exit_code(), 69);
    store.put_blob(Bytes::from_static(b"one")).await.unwrap();
    assert_eq!(store.get_file(&entry, &sources).await.unwrap(), "one");
}

#[tokio::test]
async fn what_passes_is_tried_again_and_a_lost_answer_is_recognised() {
    let (store, faults) = faulty();
    faults.plan("stages", Fault::Timeout, 2);
    assert_eq!(store.create("stages/a", Bytes::from_static(b"1")).await.unwrap(), Create::Created);
    faults.plan("stages", Fault::LostAnswer, 1);
    assert_eq!(store.create("stages/b", Bytes::from_static(b"mine")).await.unwrap(), Create::Created);
    assert_eq!(store.create("stages/b", Bytes::from_static(b"other")).await.unwrap(), Create::AlreadyExists);
    faults.plan("stages", Fault::Full, 1);
    let error = store.create("stages/c", Bytes::from_static(b"1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("stages/c"), "{error}");
    faults.plan("blobs", Fault::Cut, 1);
    let digest = store.put_blob(Bytes::from_static(b"0123456789")).await.unwrap();
    assert!(matches!(store.verify_blob(digest, 10).await, Err(StoreError::Damaged { .. })));
}

#[test]
fn urls_that_name_no_store_are_refused() {
    for url in ["ftp://host/x", "s3:///prefix", "file://", ""] {
        let error = Store::open(url).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{url}: {error}");
    }
    let error = Store::open("file:///proc/no-such-folder/store").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("/proc/no-such-folder"), "{error}");
}

#[tokio::test]
async fn a_store_that_takes_no_writes_says_so_and_can_be_read() {
    let (store, faults) = faulty();
    let digest = store.put_blob(Bytes::from_static(b"kept")).await.unwrap();
    faults.plan("", Fault::ReadOnly, usize::MAX);
    let errors = [
        store.create("runs/a/plan.json", Bytes::from_static(b"1")).await.unwrap_err(),
        store.put_blob(Bytes::from_static(b"new")).await.unwrap_err(),
        store.delete(&format!("blobs/{digest}")).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::Denied { .. }), "{error:?}");
        assert!(error.to_string().contains("memory://faulty/"), "{error}");
        let error = dsv3_core::Error::from(error);
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.help.unwrap().contains("--store"));
    }
    assert_eq!(store.get_blob(digest).await.unwrap(), Bytes::from_static(b"kept"));
    assert_eq!(store.put_blob(Bytes::from_static(b"kept")).await.unwrap(), digest, "what is there need not be written");
    faults.clear();
    store.create("runs/a/plan.json", Bytes::from_static(b"1")).await.unwrap();
}
