//! One suite for every kind of store, and the faults.

mod gc;
mod kill;
mod lease;
mod matrix;
mod objects;
mod saver;
mod stages;

use std::{fs, path::PathBuf, sync::Arc};

use object_store::{memory::InMemory, path::Path as ObjectPath};

use crate::{Store, StoreOptions};

/// A folder that ends with the test.
pub(crate) struct TempFolder(pub(crate) PathBuf);

impl TempFolder {
    pub(crate) fn new() -> Self {
        Self(std::env::temp_dir().join(format!("dsv3-store-{}", crate::nonce())))
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&format!("file://{}", self.0.display())).unwrap()
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A memory store, one below a prefix as in a shared bucket, a local one in `folder`, and the one `DSV3_TEST_STORE` names
/// (a prefix of its own for each call; `moto_server` serves for s3).
pub(crate) fn each(folder: &TempFolder) -> Vec<Store> {
    let prefix = ObjectPath::from("team/runs");
    let below =
        Store::with_objects_and("s3://bucket/team/runs", Arc::new(InMemory::new()), prefix, StoreOptions::near());
    let mut stores = vec![Store::with_memory(), below, folder.store()];
    if let Ok(url) = std::env::var("DSV3_TEST_STORE") {
        stores.push(Store::open(&format!("{url}/{}", crate::nonce())).unwrap());
    }
    stores
}
