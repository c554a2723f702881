//! One list of cases for every store: a local folder, memory, and a real S3 server over HTTP that this test starts, at the
//! bucket's root and below a prefix. `DSV3_TEST_STORE=s3://bucket/prefix` adds a store of yours (credentials and endpoint
//! from the environment), below a prefix of its own for each case.
//!
//!     cargo test -p dsv3-store --test conformance
//!
//! `traps.rs` has what only a network has: answers that are lost, servers that are busy, conditions that are ignored.

mod blobs;
mod objects;
mod traps;

use std::sync::{
    OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use dsv3_store::{Store, StoreOptions};
use dsv3_test_s3::S3Server;

/// The server that cases share; it ends with this process.
pub(crate) fn server() -> &'static S3Server {
    static SERVER: OnceLock<S3Server> = OnceLock::new();
    SERVER.get_or_init(S3Server::start)
}

/// Options under which a transfer in parts needs few bytes and a failure little time.
pub(crate) fn options() -> StoreOptions {
    StoreOptions { part_mib: 5, parallel: 4, attempts: 6, backoff_ms: 5, backoff_ms_max: 20, ..StoreOptions::default() }
}

/// A store on a server, below a prefix that nobody else has.
pub(crate) fn on(server: &S3Server) -> Store {
    Store::open_with(&server.url(&fresh()), &options(), &server.env()).expect("a store")
}

fn fresh() -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    format!("case-{}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Every kind of store, empty, and what has to live as long as they do.
pub(crate) fn every_store() -> (Vec<Store>, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let local = Store::open_with(&folder.path().display().to_string(), &options(), &[]).expect("a store");
    let memory = Store::open_with("memory://", &options(), &[]).expect("a store");
    let mut stores = vec![local, memory, on(server())];
    if let Ok(url) = std::env::var("DSV3_TEST_STORE") {
        let url = format!("{url}/{}", dsv3_store::nonce());
        stores.push(Store::open_with(&url, &options(), &[]).expect("the store of DSV3_TEST_STORE"));
    }
    (stores, folder)
}

/// Bytes that repeat in no short period.
pub(crate) fn content(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let words = std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    });
    words.flat_map(u32::to_le_bytes).take(bytes).collect()
}
