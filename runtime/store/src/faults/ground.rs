//! The bytes of a store, which can be copied, opened by one process after another, and damaged.
//!
//! In memory a copy shares the contents; on a disk it is a folder of hard links: objects are never changed in place, a
//! damaged one is written anew under its name.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use dsv3_core::Digest;
use object_store::{ObjectStoreExt, memory::InMemory, path::Path as ObjectPath};

use crate::{
    Store,
    error::{Result, StoreError},
    nonce,
};

/// The bytes of a store.
#[derive(Debug)]
pub enum Ground {
    /// In memory.
    Memory(Arc<InMemory>),
    /// In a folder of its own, which goes with this value.
    Folder(PathBuf),
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Self::Folder(folder) = self {
            // A folder that stays behind in a temporary place harms nothing.
            let _ = fs::remove_dir_all(folder);
        }
    }
}

impl Ground {
    /// No bytes yet: in memory, or in a new folder below `parent`.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(parent: Option<&Path>) -> Result<Self> {
        let Some(parent) = parent else { return Ok(Self::Memory(Arc::new(InMemory::new()))) };
        let folder = parent.join(format!("store-{}", nonce()));
        fs::create_dir_all(&folder).map_err(StoreError::io("create", &folder))?;
        Ok(Self::Folder(folder))
    }

    /// A copy that goes its own way.
    ///
    /// # Errors
    /// When the folder cannot be copied.
    pub fn fork(&self) -> Result<Self> {
        match self {
            Self::Memory(objects) => Ok(Self::Memory(Arc::new(objects.fork()))),
            Self::Folder(folder) => {
                let copy = Self::new(folder.parent())?;
                if let Self::Folder(to) = &copy {
                    link_all(folder, to).map_err(StoreError::io("copy", folder))?;
                }
                Ok(copy)
            }
        }
    }

    /// A handle of its own, as a new process has it.
    ///
    /// # Errors
    /// When the folder cannot be opened.
    pub fn store(&self) -> Result<Store> {
        match self {
            Self::Memory(objects) => Ok(Store::with_objects("memory://", objects.clone())),
            Self::Folder(folder) => Store::open(&format!("file://{}", folder.display())),
        }
    }

    /// Puts other bytes, or none, in the place of an object, as a failing disk or a careless hand does.
    ///
    /// # Errors
    /// When the place cannot be written.
    pub async fn replace(&self, path: &str, bytes: Option<Bytes>) -> Result<()> {
        match self {
            Self::Memory(objects) => {
                let location = ObjectPath::from(path);
                let done = match bytes {
                    Some(bytes) => objects.put(&location, bytes.into()).await.map(drop),
                    None => objects.delete(&location).await,
                };
                done.map_err(|error| StoreError::object("write", path, error))
            }
            Self::Folder(folder) => {
                let file = folder.join(path);
                let removed = fs::remove_file(&file);
                removed
                    .and_then(|()| bytes.map_or(Ok(()), |bytes| fs::write(&file, bytes)))
                    .map_err(StoreError::io("write", file))
            }
        }
    }

    /// Paths of the blobs whose bytes are not those of their name.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn damaged_blobs(&self) -> Result<Vec<String>> {
        let store = self.store()?;
        let mut damaged = Vec::new();
        for path in store.list_all("blobs").await? {
            let named = path.rsplit('/').next().and_then(|name| name.parse::<Digest>().ok());
            if named != Some(Digest::of(&store.read(&path).await?)) {
                damaged.push(path);
            }
        }
        Ok(damaged)
    }
}

fn link_all(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            link_all(&entry.path(), &target)?;
        } else {
            fs::hard_link(entry.path(), &target)?;
        }
    }
    Ok(())
}
