//! One suite for every kind of store, and the faults.

mod lease;
mod objects;
mod stages;

use std::{fs, path::PathBuf};

use crate::Store;

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

/// A memory store, and a local one in `folder`.
pub(crate) fn both(folder: &TempFolder) -> [Store; 2] {
    [Store::with_memory(), folder.store()]
}
