//! Blobs: small and large, in parts and ranges, damaged and replaced; and what is built of objects, on every store.

use std::{fs, sync::Arc, time::Duration};

use bytes::Bytes;
use dsv3_core::{Cancel, Digest, SystemClock};
use dsv3_store::{Holder, LeaseOptions, Store, StoreError};

use crate::{content, every_store, on, server};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn blobs_of_every_length_come_back() {
    let (stores, folder) = every_store();
    let mib = 1 << 20;
    // One part, exactly one, one and a byte, several and a rest.
    for (i, length) in [0, 1, 5 * mib, 5 * mib + 1, 23 * mib + 4567].into_iter().enumerate() {
        let bytes = Bytes::from(content(length, i as u64));
        let digest = Digest::of(&bytes);
        let file = folder.path().join("input");
        fs::write(&file, &bytes).unwrap();
        for store in &stores {
            assert_eq!(store.put_blob(bytes.clone()).await.unwrap(), digest, "{store:?} {length}");
            assert_eq!(store.put_blob(bytes.clone()).await.unwrap(), digest, "{store:?} {length}");
            assert!(store.get_blob(digest).await.unwrap() == bytes, "{store:?} {length}");
            store.verify_blob(digest, length as u64).await.unwrap();
            store.delete(&format!("blobs/{digest}")).await.unwrap();
            assert!(matches!(store.get_blob(digest).await, Err(StoreError::Missing { .. })), "{store:?}");
            assert_eq!(store.put_blob_file(&file).await.unwrap(), (digest, length as u64), "{store:?}");
            assert!(store.get_blob(digest).await.unwrap() == bytes, "{store:?} {length}");
        }
    }
}

#[tokio::test]
async fn large_blobs_travel_in_parts_and_ranges() {
    let store = on(server());
    let bytes = Bytes::from(content(12 << 20, 9));
    let digest = store.put_blob(bytes.clone()).await.unwrap();
    let name = digest.to_string();
    let parts = server().faults().requests("PUT", &name);
    assert_eq!(parts.iter().filter(|part| part.target.contains("partNumber=")).count(), 3, "{parts:?}");
    assert_eq!(store.get_blob(digest).await.unwrap(), bytes);
    let reads = server().faults().requests("GET", &name);
    let mut ranges: Vec<&str> = reads.iter().map(|read| read.range.as_str()).collect();
    ranges.sort_unstable();
    assert_eq!(ranges, ["bytes=0-5242879", "bytes=10485760-12582911", "bytes=5242880-10485759"]);
}

/// Writes other bytes over an object, behind the store's back.
async fn damage(store: &Store, path: &str, bytes: &[u8]) {
    store.delete(path).await.unwrap();
    store.create(path, Bytes::copy_from_slice(bytes)).await.unwrap();
}

#[tokio::test]
async fn a_damaged_blob_is_named_when_loaded_and_replaced_by_the_next_put() {
    let (stores, _folder) = every_store();
    for store in stores {
        for length in [10, 6 << 20] {
            let good = Bytes::from(content(length, 3));
            let digest = store.put_blob(good.clone()).await.unwrap();
            let path = format!("blobs/{digest}");
            let mut flipped = good.to_vec();
            flipped[length / 2] ^= 4;
            for bad in [&flipped[..], &good[..length - 1]] {
                damage(&store, &path, bad).await;
                let error = store.get_blob(digest).await.unwrap_err();
                assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
                assert!(error.to_string().contains(&store.display_path(&path)), "{error}");
                assert!(store.verify_blob(digest, length as u64).await.is_err(), "{store:?}");
                assert_eq!(store.put_blob(good.clone()).await.unwrap(), digest);
                assert!(store.get_blob(digest).await.unwrap() == good, "{store:?} {length}");
            }
        }
    }
}

#[tokio::test]
async fn a_cut_blob_is_replaced_by_a_process_that_never_read_it() {
    let (stores, _folder) = every_store();
    for store in stores {
        let good = Bytes::from(content(2 << 20, 4));
        let digest = Digest::of(&good);
        damage(&store, &format!("blobs/{digest}"), &good[..good.len() / 2]).await;
        store.put_blob(good.clone()).await.unwrap();
        assert!(store.get_blob(digest).await.unwrap() == good, "{store:?}");
        // A short one is compared byte by byte.
        let digest = Digest::of(b"0123456789");
        damage(&store, &format!("blobs/{digest}"), b"0123456780").await;
        store.put_blob(Bytes::from_static(b"0123456789")).await.unwrap();
        assert_eq!(store.get_blob(digest).await.unwrap(), "0123456789", "{store:?}");
    }
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_uploaded_leaves_nothing() {
    let store = on(server());
    let file = tempfile::NamedTempFile::new().unwrap();
    let old = content(11 << 20, 5);
    fs::write(file.path(), &old).unwrap();
    let digest = Digest::of(&old);
    // The first part stalls; the file is another when the last one is read.
    let part = format!("{digest}?partNumber=1");
    server().faults().plan("PUT", &part, dsv3_test_s3::Fault::Stall(Duration::from_millis(400)), 1);
    let slow = dsv3_store::StoreOptions { parallel: 1, ..crate::options() };
    let store = Store::open_with(store.url(), &slow, &server().env()).unwrap();
    let path = file.path().to_owned();
    let putting = tokio::spawn(async move { (store.put_blob_file(&path).await, store) });
    while server().faults().requests("PUT", &part).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fs::write(file.path(), content(11 << 20, 6)).unwrap();
    let (outcome, store) = putting.await.unwrap();
    assert!(matches!(outcome, Err(StoreError::SourceChanged { .. })), "{outcome:?}");
    assert!(store.list_all("blobs").await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn leases_change_hands_on_every_store() {
    let (stores, _folder) = every_store();
    for store in stores {
        let options = LeaseOptions {
            beat: Duration::from_millis(20),
            expire: Duration::from_millis(500),
            poll: Duration::from_millis(20),
            ..LeaseOptions::default()
        };
        let (clock, cancel) = (Arc::new(SystemClock::default()), Cancel::new());
        let take = || {
            let holder = Holder::this_process("r");
            store.acquire("key", holder, clock.clone(), options, &cancel, |_| {})
        };
        let first = take().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(first.epoch(), 1);
        assert!(!first.lost().is_cancelled(), "its beats are overwritten and its lease holds: {store:?}");
        first.release().await.unwrap();
        let second = take().await.unwrap();
        assert_eq!(second.epoch(), 2, "{store:?}");
        second.release().await.unwrap();
    }
}
