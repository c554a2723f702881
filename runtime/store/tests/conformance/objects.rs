//! Objects by path: create, read, ranges, lists, delete.

use std::ops::Range;

use bytes::Bytes;
use dsv3_store::{Create, Store, StoreError};

use crate::every_store;

async fn create(store: &Store, path: &str, bytes: &'static [u8]) -> Create {
    store.create(path, Bytes::from_static(bytes)).await.unwrap_or_else(|error| panic!("{store:?} {path}: {error}"))
}

#[tokio::test]
async fn what_is_created_is_there_and_stays() {
    let (stores, _folder) = every_store();
    for store in stores {
        assert_eq!(store.length("a/b.json").await.unwrap(), None);
        assert_eq!(store.read_if_exists("a/b.json").await.unwrap(), None);
        assert_eq!(create(&store, "a/b.json", b"one").await, Create::Created);
        assert_eq!(create(&store, "a/b.json", b"two").await, Create::AlreadyExists, "{store:?}");
        assert_eq!(create(&store, "a/b.json", b"one").await, Create::AlreadyExists, "{store:?}");
        assert_eq!(store.read("a/b.json").await.unwrap(), "one");
        assert_eq!(store.length("a/b.json").await.unwrap(), Some(3));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_64_racing_creates_exactly_one_wins() {
    let (stores, _folder) = every_store();
    for store in stores {
        for round in 0..4 {
            let path = format!("stages/k/checkpoints/{round:08}.json");
            let race = |i: usize| {
                let (store, path) = (store.clone(), path.clone());
                tokio::spawn(async move { store.create(&path, Bytes::from(format!("racer {i}"))).await.unwrap() })
            };
            let racers: Vec<_> = (0..64).map(race).collect();
            let mut winners = Vec::new();
            for (i, racer) in racers.into_iter().enumerate() {
                winners.extend((racer.await.unwrap() == Create::Created).then_some(i));
            }
            assert_eq!(winners.len(), 1, "{store:?}");
            assert_eq!(store.read(&path).await.unwrap(), format!("racer {}", winners[0]));
        }
    }
}

#[tokio::test]
async fn objects_without_bytes() {
    let (stores, _folder) = every_store();
    for store in stores {
        assert_eq!(create(&store, "empty", b"").await, Create::Created);
        assert_eq!(create(&store, "empty", b"").await, Create::AlreadyExists);
        assert_eq!(store.read("empty").await.unwrap(), "");
        assert_eq!(store.length("empty").await.unwrap(), Some(0));
        assert_eq!(store.read_range("empty", 0..10).await.unwrap(), "");
        assert_eq!(store.list_all("").await.unwrap(), ["empty"], "{store:?}");
    }
}

#[tokio::test]
async fn ranges_inside_at_the_end_beyond_it_and_empty() {
    let (stores, _folder) = every_store();
    for store in stores {
        create(&store, "digits", b"0123456789").await;
        let cases: [(Range<u64>, &str); 8] = [
            (0..10, "0123456789"),
            (0..1, "0"),
            (3..7, "3456"),
            (9..10, "9"),
            (7..100, "789"),
            (10..20, ""),
            (50..60, ""),
            (4..4, ""),
        ];
        for (range, expected) in cases {
            assert_eq!(store.read_range("digits", range.clone()).await.unwrap(), expected, "{store:?} {range:?}");
        }
        let missing = store.read_range("letters", 0..1).await.unwrap_err();
        assert!(matches!(missing, StoreError::Missing { .. }), "{missing}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn lists_beyond_a_page() {
    let (stores, _folder) = every_store();
    for store in stores {
        // Local files are synced one by one, and a folder has no pages.
        let count = if store.local_root().is_some() { 120 } else { 1234 };
        let make = |i: usize| {
            let store = store.clone();
            tokio::spawn(async move { create(&store, &format!("many/{i:05}"), b"x").await })
        };
        let made: Vec<_> = (0..count).map(make).collect();
        for made in made {
            assert_eq!(made.await.unwrap(), Create::Created);
        }
        create(&store, "many/folder/one", b"x").await;
        create(&store, "manyfold/other", b"x").await;
        let mut names: Vec<String> = (0..count).map(|i| format!("{i:05}")).chain(["folder/".to_owned()]).collect();
        assert_eq!(store.list("many").await.unwrap(), names, "{store:?}");
        names.pop();
        let mut paths: Vec<String> = names.iter().map(|name| format!("many/{name}")).collect();
        paths.push("many/folder/one".to_owned());
        assert_eq!(store.list_all("many").await.unwrap(), paths, "{store:?}");
    }
}

#[tokio::test]
async fn folders_and_prefixes() {
    let (stores, _folder) = every_store();
    for store in stores {
        for path in ["runs/b/plan.json", "runs/a/plan.json", "runs/a/status/1.json", "runs/x.json", "runsaway"] {
            create(&store, path, b"1").await;
        }
        assert_eq!(store.list("runs").await.unwrap(), ["a/", "b/", "x.json"], "{store:?}");
        assert_eq!(store.list("runs/a").await.unwrap(), ["plan.json", "status/"], "{store:?}");
        let below = ["runs/a/plan.json", "runs/a/status/1.json"];
        assert_eq!(store.list_all("runs/a").await.unwrap(), below, "{store:?}");
        assert!(store.list("run").await.unwrap().is_empty(), "part of a name is no folder: {store:?}");
        assert!(store.list_all("nothing/here").await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn names_of_all_kinds() {
    let names = [
        "odd/with space",
        "odd/plus+and&more",
        "odd/per%20cent",
        "odd/ümläut-ß",
        "odd/日本語",
        "odd/emoji-🧪",
        "odd/quote'\"",
        "odd/(brackets)[]{}",
        "odd/semi;colon,comma",
        "odd/tilde~at@",
        "odd/equals=query",
        "odd/.hidden",
        "odd/dots..inside",
    ];
    let (stores, _folder) = every_store();
    for store in stores {
        let mut listed = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let bytes = Bytes::from(format!("{i}"));
            match store.create(name, bytes.clone()).await {
                // A name that paths of this program cannot have is refused everywhere, and nothing is written.
                Err(StoreError::BadPath { .. }) => continue,
                created => assert_eq!(created.unwrap(), Create::Created, "{store:?} {name}"),
            }
            assert_eq!(store.create(name, bytes.clone()).await.unwrap(), Create::AlreadyExists, "{store:?} {name}");
            assert_eq!(store.read(name).await.unwrap(), bytes, "{store:?} {name}");
            listed.push((*name).to_owned());
        }
        assert!(listed.len() >= 9, "{listed:?}");
        listed.sort_unstable();
        assert_eq!(store.list_all("odd").await.unwrap(), listed, "{store:?}");
        for name in &listed {
            store.delete(name).await.unwrap();
        }
        assert!(store.list_all("odd").await.unwrap().is_empty(), "{store:?}");
        for outside in ["../outside", "a/../../outside", "a//b", ""] {
            let refused = store.create(outside, Bytes::from_static(b"x")).await;
            assert!(refused.is_err(), "{store:?} {outside:?}");
        }
    }
}

#[tokio::test]
async fn deleting_and_creating_again() {
    let (stores, _folder) = every_store();
    for store in stores {
        store.delete("never/was").await.unwrap();
        create(&store, "a/one", b"1").await;
        store.delete("a/one").await.unwrap();
        store.delete("a/one").await.unwrap();
        let missing = store.read("a/one").await.unwrap_err();
        assert!(matches!(missing, StoreError::Missing { .. }) && missing.to_string().contains("a/one"), "{missing}");
        assert!(store.list_all("a").await.unwrap().is_empty(), "{store:?}");
        assert_eq!(create(&store, "a/one", b"2").await, Create::Created, "{store:?}");
        assert_eq!(store.read("a/one").await.unwrap(), "2");
    }
}
