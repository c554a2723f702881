//! Digests of external files, with a cache that spares unchanged files a second reading.
//!
//! The cache is a hint: one JSON line per file under `cache/hashes.jsonl` of a local store, believed only while path,
//! length, inode, modification and change times all agree, and never for a file that changed within the last two
//! seconds, whose next change could leave the times as they are.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use dsv3_core::{Digest, Error};
use serde::{Deserialize, Serialize};

/// Age in nanoseconds below which the times of a file prove nothing.
const SETTLED_NANOS: i64 = 2_000_000_000;

/// What must agree for a digest to be believed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    inode: u64,
    device: u64,
    modified_nanos: i64,
    changed_nanos: i64,
}

#[derive(Serialize, Deserialize)]
struct Line {
    path: PathBuf,
    #[serde(flatten)]
    stamp: Stamp,
    digest: Digest,
}

/// The digests known so far.
#[derive(Debug, Default)]
pub(crate) struct HashCache {
    file: Option<PathBuf>,
    known: BTreeMap<PathBuf, (Stamp, Digest)>,
    fresh: Vec<String>,
}

fn stamp(metadata: &fs::Metadata) -> Stamp {
    let nanos = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000) + nanos;
    Stamp {
        bytes: metadata.len(),
        inode: metadata.ino(),
        device: metadata.dev(),
        modified_nanos: nanos(metadata.mtime(), metadata.mtime_nsec()),
        changed_nanos: nanos(metadata.ctime(), metadata.ctime_nsec()),
    }
}

fn unreadable(path: &Path, error: io::Error) -> Error {
    Error::invalid(format!("the input file {} cannot be read", path.display())).source(error)
}

impl HashCache {
    /// The cache of a store on a local disk; without one, every file is read.
    pub(crate) fn open(store_root: Option<&Path>) -> Self {
        let file = store_root.map(|root| root.join("cache/hashes.jsonl"));
        let text = file.as_ref().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        // A torn last line is skipped; of a repeated path the last line counts.
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
        let known = lines.map(|line| (line.path, (line.stamp, line.digest))).collect();
        Self { file, known, fresh: Vec::new() }
    }

    /// Digest and length of a local file.
    pub(crate) fn digest(&mut self, path: &Path) -> Result<(Digest, u64), Error> {
        let mut file = fs::File::open(path).map_err(|error| unreadable(path, error))?;
        let before = stamp(&file.metadata().map_err(|error| unreadable(path, error))?);
        if let Some((known, digest)) = self.known.get(path)
            && *known == before
        {
            return Ok((*digest, before.bytes));
        }
        let mut hasher = blake3::Hasher::new();
        let bytes = io::copy(&mut file, &mut hasher).map_err(|error| unreadable(path, error))?;
        let after = stamp(&file.metadata().map_err(|error| unreadable(path, error))?);
        if before != after || bytes != before.bytes {
            return Err(Error::invalid(format!("the input file {} changed while it was read", path.display())));
        }
        let digest = Digest::from_bytes(*hasher.finalize().as_bytes());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64);
        if now - after.changed_nanos.max(after.modified_nanos) > SETTLED_NANOS {
            let line = Line { path: path.to_owned(), stamp: after.clone(), digest };
            self.fresh.extend(serde_json::to_string(&line));
            self.known.insert(path.to_owned(), (after, digest));
        }
        Ok((digest, bytes))
    }

    /// Appends what is new. A failure costs only time at the next run.
    pub(crate) fn save(&mut self) {
        let Some(file) = self.file.as_ref().filter(|_| !self.fresh.is_empty()) else { return };
        let append = || -> io::Result<()> {
            if let Some(folder) = file.parent() {
                fs::create_dir_all(folder)?;
            }
            let text: String = self.fresh.iter().map(|line| format!("{line}\n")).collect();
            fs::OpenOptions::new().create(true).append(true).open(file)?.write_all(text.as_bytes())
        };
        if let Err(error) = append() {
            tracing::debug!(%error, "the cache of digests was not written");
        }
        self.fresh.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_is_read_again_and_an_old_one_is_not() {
        let dir = std::env::temp_dir().join(format!("dsv3-hashes-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("x");
        fs::write(&path, b"one").unwrap();
        let mut cache = HashCache::open(Some(&dir));
        assert_eq!(cache.digest(&path).unwrap(), (Digest::of(b"one"), 3));
        fs::write(&path, b"two").unwrap();
        assert_eq!(cache.digest(&path).unwrap(), (Digest::of(b"two"), 3));
        // A fresh file is not remembered; one whose stamp is planted is believed.
        assert!(cache.fresh.is_empty());
        let planted = stamp(&fs::metadata(&path).unwrap());
        let line = Line { path: path.clone(), stamp: planted, digest: Digest::of(b"planted") };
        cache.fresh.push(serde_json::to_string(&line).unwrap());
        cache.save();
        fs::OpenOptions::new().append(true).open(dir.join("cache/hashes.jsonl")).unwrap().write_all(b"{torn").unwrap();
        assert_eq!(HashCache::open(Some(&dir)).digest(&path).unwrap().0, Digest::of(b"planted"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
