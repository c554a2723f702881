//! Byte strings that are put away in order and read back in any: in memory while they are few, in a file of the scratch
//! folder once they are not, so that an ingest holds a corpus larger than memory.
//!
//! Layout of the file: the strings one after the other, nothing between; where each ends is kept in memory (8 bytes a
//! string). The file is removed when the spool is dropped; nothing else ever reads it.

use std::{
    borrow::Cow,
    fs::{File, OpenOptions},
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::error::IngestError;

/// Bytes kept in memory before a file is begun.
const MEMORY_BYTES_MAX: u64 = 256 << 20;

/// Byte strings by their number.
pub(crate) struct Spool {
    held: Vec<Vec<u8>>,
    file: Option<Spilled>,
    ends: Vec<u64>,
    /// Where the file would lie; nothing means that all stays in memory.
    path: Option<PathBuf>,
    memory_bytes_max: u64,
}

struct Spilled {
    path: PathBuf,
    writer: BufWriter<File>,
    reader: Mutex<File>,
    written: bool,
}

impl Drop for Spilled {
    fn drop(&mut self) {
        // The engine removes the scratch folder in any case.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Spool {
    /// An empty spool whose file, if it needs one, is `scratch/name`.
    pub(crate) fn new(scratch: Option<&Path>, name: &str) -> Self {
        let path = scratch.map(|folder| folder.join(name));
        Self { held: Vec::new(), file: None, ends: Vec::new(), path, memory_bytes_max: memory_bytes_max() }
    }

    /// Number of strings.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Length of string `index`.
    pub(crate) fn bytes(&self, index: usize) -> u64 {
        self.ends[index] - self.start(index)
    }

    fn start(&self, index: usize) -> u64 {
        index.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    /// Puts the next string away.
    ///
    /// # Errors
    /// When the scratch folder refuses.
    pub(crate) fn push(&mut self, bytes: Vec<u8>) -> Result<(), IngestError> {
        self.ends.push(self.ends.last().copied().unwrap_or(0) + bytes.len() as u64);
        if let Some(file) = &mut self.file {
            file.written = false;
            return file.writer.write_all(&bytes).map_err(|source| IngestError::scratch(&file.path, source));
        }
        self.held.push(bytes);
        match &self.path {
            Some(path) if self.ends.last().copied() > Some(self.memory_bytes_max) => {
                let spilled = spill(path, std::mem::take(&mut self.held));
                self.file = Some(spilled.map_err(|source| IngestError::scratch(path, source))?);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Makes what was pushed readable. Call between the last push and the first read.
    ///
    /// # Errors
    /// As [`Spool::push`].
    pub(crate) fn seal(&mut self) -> Result<(), IngestError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        file.written = true;
        file.writer.flush().map_err(|source| IngestError::scratch(&file.path, source))
    }

    /// String `index`.
    ///
    /// # Errors
    /// When the scratch folder refuses.
    pub(crate) fn get(&self, index: usize) -> Result<Cow<'_, [u8]>, IngestError> {
        let Some(file) = &self.file else { return Ok(Cow::Borrowed(&self.held[index])) };
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(self.bytes(index)).map_err(io::Error::other)?];
            let mut reader = file.reader.lock().unwrap_or_else(PoisonError::into_inner);
            reader.seek(SeekFrom::Start(self.start(index)))?;
            reader.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        debug_assert!(file.written, "a spool is sealed before it is read");
        read().map(Cow::Owned).map_err(|source| IngestError::scratch(&file.path, source))
    }
}

fn spill(path: &Path, held: Vec<Vec<u8>>) -> io::Result<Spilled> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    let reader = Mutex::new(File::open(path)?);
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    for bytes in held {
        writer.write_all(&bytes)?;
    }
    Ok(Spilled { path: path.to_owned(), writer, reader, written: false })
}

#[cfg(not(test))]
fn memory_bytes_max() -> u64 {
    MEMORY_BYTES_MAX
}

#[cfg(test)]
use tests::memory_bytes_max;
#[cfg(test)]
pub(crate) use tests::with_memory_bytes_max;

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        static MEMORY: Cell<u64> = const { Cell::new(MEMORY_BYTES_MAX) };
    }

    pub(crate) fn memory_bytes_max() -> u64 {
        MEMORY.get()
    }

    /// Spools made on this thread in `work` keep so many bytes in memory.
    pub(crate) fn with_memory_bytes_max(bytes: u64, work: impl FnOnce()) {
        MEMORY.set(bytes);
        work();
        MEMORY.set(MEMORY_BYTES_MAX);
    }

    #[test]
    fn a_spool_reads_back_in_any_order_from_memory_and_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let strings: Vec<Vec<u8>> = (0..200_usize).map(|i| vec![i as u8; i % 7 * 10]).collect();
        for memory_bytes_max in [u64::MAX, 0, 1000] {
            let mut spool = Spool { memory_bytes_max, ..Spool::new(Some(folder.path()), "spool") };
            strings.iter().for_each(|bytes| spool.push(bytes.clone()).unwrap());
            spool.seal().unwrap();
            assert_eq!(folder.path().join("spool").exists(), memory_bytes_max != u64::MAX);
            for index in (0..200).rev().chain([7, 0, 199]) {
                assert_eq!((&*spool.get(index).unwrap(), spool.len()), (&strings[index][..], 200));
            }
            drop(spool);
            assert!(!folder.path().join("spool").exists());
        }
    }

    #[test]
    fn a_scratch_folder_that_refuses_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("taken"), "a file").unwrap();
        let mut spool = Spool { memory_bytes_max: 0, ..Spool::new(Some(&folder.path().join("taken")), "spool") };
        let error = dsv3_core::Error::from(spool.push(vec![1]).unwrap_err());
        assert_eq!(error.kind, dsv3_core::ErrorKind::Unavailable);
        assert!(error.message.contains("taken"), "{error}");
    }
}
