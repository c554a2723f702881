//! What only a network has, each on a real S3 server with faults on the way to it: lost answers, 409, busy servers, cut
//! connections and bodies, conditions that a server ignores, wrong credentials.

use bytes::Bytes;
use dsv3_core::{Digest, ErrorKind};
use dsv3_store::{ConditionalCreate, Create, CreateMode, Store, StoreError, StoreOptions};
use dsv3_test_s3::{Fault, S3Server};

use crate::{content, on, options};

fn body(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

#[tokio::test]
async fn a_create_whose_answer_was_lost_is_ours() {
    let server = S3Server::start();
    let store = on(&server);
    for (i, fault) in [Fault::LostAnswer(500), Fault::LostAnswer(503), Fault::CutAfter].into_iter().enumerate() {
        let path = format!("c/{i}.json");
        server.faults().plan("PUT", &path, fault, 1);
        assert_eq!(store.create(&path, body("nonce 1")).await.unwrap(), Create::Created, "{fault:?}");
        assert_eq!(server.faults().requests("PUT", &path).len(), 2, "it was tried again: {fault:?}");
        assert_eq!(store.create(&path, body("nonce 2")).await.unwrap(), Create::AlreadyExists);
        assert_eq!(store.read(&path).await.unwrap(), "nonce 1");
    }
}

#[tokio::test]
async fn a_create_that_did_not_arrive_and_lost_to_another_is_not_ours() {
    let server = S3Server::start();
    let store = on(&server);
    for (i, fault) in [Fault::Status(500), Fault::CutBefore].into_iter().enumerate() {
        let path = format!("c/{i}.json");
        assert_eq!(store.create(&path, body("theirs")).await.unwrap(), Create::Created);
        server.faults().plan("PUT", &path, fault, 1);
        assert_eq!(store.create(&path, body("ours")).await.unwrap(), Create::AlreadyExists, "{fault:?}");
        assert_eq!(store.read(&path).await.unwrap(), "theirs");
    }
}

#[tokio::test]
async fn conflict_409_is_neither_won_nor_lost() {
    let server = S3Server::start();
    let store = on(&server);
    // The other writer failed: nobody has the name, and we take it.
    server.faults().plan("PUT", "c/1", Fault::Status(409), 2);
    assert_eq!(store.create("c/1", body("ours")).await.unwrap(), Create::Created);
    assert_eq!(server.faults().requests("PUT", "c/1").len(), 3);
    // The other writer has won.
    store.create("c/2", body("theirs")).await.unwrap();
    server.faults().plan("PUT", "c/2", Fault::Status(409), 1);
    assert_eq!(store.create("c/2", body("ours")).await.unwrap(), Create::AlreadyExists);
    // Our own first attempt is what is in the way.
    server.faults().plan("PUT", "c/3", Fault::LostAnswer(500), 1);
    server.faults().plan("PUT", "c/3", Fault::Status(409), 1);
    assert_eq!(store.create("c/3", body("ours")).await.unwrap(), Create::Created);
    // A conflict that does not end is an error after a bounded number of attempts.
    server.faults().plan("PUT", "c/4", Fault::Status(409), 1000);
    let error = store.create("c/4", body("ours")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_eq!(server.faults().requests("PUT", "c/4").len(), options().attempts as usize);
}

#[tokio::test]
async fn busy_servers_and_broken_connections_pass_for_every_operation() {
    let server = S3Server::start();
    let store = on(&server);
    store.create("o/x", body("0123456789")).await.unwrap();
    let before = [
        Fault::Status(500),
        Fault::Status(502),
        Fault::Status(503),
        Fault::Status(504),
        Fault::Status(429),
        Fault::Status(408),
        Fault::CutBefore,
        Fault::CutAfter,
    ];
    for (i, fault) in before.into_iter().enumerate() {
        let faults = server.faults();
        for (method, part) in
            [("GET", "o/x"), ("HEAD", "o/x"), ("GET", "list-type"), ("PUT", "o/y"), ("POST", "delete")]
        {
            faults.plan(method, part, fault, 2);
        }
        assert_eq!(store.read("o/x").await.unwrap(), "0123456789", "{fault:?}");
        assert_eq!(store.length("o/x").await.unwrap(), Some(10), "{fault:?}");
        assert_eq!(store.list("o").await.unwrap(), ["x"], "{fault:?}");
        assert_eq!(store.create(&format!("o/y{i}"), body("y")).await.unwrap(), Create::Created, "{fault:?}");
        store.delete(&format!("o/y{i}")).await.unwrap();
        assert_eq!(store.list_all("o").await.unwrap(), ["o/x"], "{fault:?}");
        faults.clear();
    }
    server.faults().plan("GET", "o/x", Fault::Status(503), 1000);
    server.faults().forget_requests();
    let error = store.read("o/x").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("o/x"), "{error}");
    assert_eq!(server.faults().requests("GET", "o/x").len(), options().attempts as usize);
}

#[tokio::test]
async fn bodies_that_end_early_are_read_again() {
    let server = S3Server::start();
    let store = on(&server);
    let bytes = Bytes::from(content(12 << 20, 1));
    let digest = store.put_blob(bytes.clone()).await.unwrap();
    for fault in [Fault::CutBody, Fault::ShortBody] {
        server.faults().plan("GET", &digest.to_string(), fault, 3);
        assert!(store.get_blob(digest).await.unwrap() == bytes, "{fault:?}");
    }
    server.faults().plan("GET", "list-type", Fault::CutBody, 2);
    assert_eq!(store.list("blobs").await.unwrap(), [digest.to_string()]);
    // A flipped bit has the right length; the digest of the whole finds it.
    server.faults().plan("GET", &digest.to_string(), Fault::FlippedBit, 1);
    assert!(matches!(store.get_blob(digest).await, Err(StoreError::Damaged { .. })));
    assert!(store.get_blob(digest).await.unwrap() == bytes);
}

#[tokio::test]
async fn parts_are_tried_again_by_themselves_and_a_failed_upload_is_aborted() {
    let server = S3Server::start();
    let store = on(&server);
    let bytes = Bytes::from(content(17 << 20, 2));
    let name = Digest::of(&bytes).to_string();
    server.faults().plan("PUT", "partNumber=2", Fault::LostAnswer(500), 1);
    server.faults().plan("PUT", "partNumber=3", Fault::CutBefore, 2);
    // The upload is completed although nobody said so; then there is no such upload any more.
    server.faults().plan("POST", "uploadId=", Fault::CutAfter, 1);
    let digest = store.put_blob(bytes.clone()).await.unwrap();
    assert!(store.get_blob(digest).await.unwrap() == bytes);
    for (part, requests) in [(1, 1), (2, 2), (3, 3), (4, 1)] {
        assert_eq!(
            server.faults().requests("PUT", &format!("{name}?partNumber={part}&")).len(),
            requests,
            "part {part}"
        );
    }
    assert_eq!(server.open_uploads(), 0);
    let other = Bytes::from(content(17 << 20, 3));
    server.faults().plan("PUT", "partNumber=3", Fault::Status(500), 1000);
    let error = store.put_blob(other.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_eq!(server.open_uploads(), 0, "it was aborted");
    assert_eq!(store.length(&format!("blobs/{}", Digest::of(&other))).await.unwrap(), None);
    server.faults().clear();
    store.put_blob(other).await.unwrap();
}

#[tokio::test]
async fn the_probe_tells_whether_conditions_are_honoured() {
    let server = S3Server::start();
    let store = on(&server);
    assert_eq!(store.probe(ConditionalCreate::Required).await.unwrap(), CreateMode::Conditional);
    assert_eq!(store.probe(ConditionalCreate::SingleWriter).await.unwrap(), CreateMode::Conditional, "not needed");
    assert!(store.list_all("probe").await.unwrap().is_empty(), "it cleans up");
    server.faults().ignore_conditions(true);
    let store = on(&server);
    let error = store.probe(ConditionalCreate::Required).await.unwrap_err();
    assert!(matches!(error, StoreError::Unconditional { .. }), "{error}");
    let told = dsv3_core::Error::from(error);
    assert_eq!(told.kind, ErrorKind::Invalid);
    assert!(told.help.as_deref().unwrap_or_default().contains("conditional_create: single_writer"), "{told:?}");
    // The weaker mode looks and then writes.
    assert_eq!(store.probe(ConditionalCreate::SingleWriter).await.unwrap(), CreateMode::SingleWriter);
    assert_eq!(store.create("a", body("1")).await.unwrap(), Create::Created);
    assert_eq!(store.create("a", body("2")).await.unwrap(), Create::AlreadyExists);
    assert_eq!(store.read("a").await.unwrap(), "1");
}

#[tokio::test]
async fn the_probe_survives_lost_answers_and_servers_that_refuse_the_condition() {
    let server = S3Server::start();
    server.faults().plan("PUT", "probe/", Fault::LostAnswer(500), 1);
    assert_eq!(on(&server).probe(ConditionalCreate::Required).await.unwrap(), CreateMode::Conditional);
    // As many refusals as attempts: then the plain put goes through.
    server.faults().plan("PUT", "probe/", Fault::Status(501), options().attempts as usize);
    let error = on(&server).probe(ConditionalCreate::Required).await.unwrap_err();
    assert!(matches!(error, StoreError::Unconditional { .. }), "{error}");
    // A server that takes nothing at all is not thought to ignore conditions.
    server.faults().plan("PUT", "probe/", Fault::Status(500), 1000);
    let error = on(&server).probe(ConditionalCreate::SingleWriter).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn options_reach_the_client_and_wrong_credentials_are_told() {
    let server = S3Server::start();
    let endpoint = StoreOptions {
        endpoint: Some(server.endpoint()),
        region: Some("us-east-1".into()),
        path_style: Some(true),
        allow_http: Some(true),
        ..options()
    };
    let store = Store::open_with(&server.url("o"), &endpoint, &server.credentials()).unwrap();
    assert_eq!(store.create("a", body("1")).await.unwrap(), Create::Created);
    let refused = StoreOptions { allow_http: Some(false), attempts: 1, ..endpoint.clone() };
    let store = Store::open_with(&server.url("o"), &refused, &server.credentials()).unwrap();
    assert!(store.read("a").await.is_err(), "plain HTTP must be allowed");
    let mut wrong = server.credentials();
    wrong.iter_mut().filter(|(name, _)| name.contains("SECRET")).for_each(|(_, value)| *value = "another".into());
    let store = Store::open_with(&server.url("o"), &endpoint, &wrong).unwrap();
    let error = store.create("b", body("1")).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert_eq!(server.faults().requests("PUT", "o/b").len(), 1, "it is not tried again");
    for url in ["file://./runs", "memory://"] {
        assert!(matches!(Store::open_with(url, &endpoint, &[]), Err(StoreError::Url { .. })));
    }
    assert!(matches!(Store::open_with("gs://bucket", &endpoint, &[]), Err(StoreError::Url { .. })));
}
