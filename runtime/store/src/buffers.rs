//! Memory for large content: what a checkpoint is copied into, and what a large blob is read into.
//!
//! The first touch of fresh memory costs several times the copy that goes into it: the system hands it out page by page,
//! zeroed, and a virtual machine may have to ask its host for it. So the memory of a copy is kept from one save to the
//! next ([`Buffers`]), touched before the first save needs it where that is known ahead, and in huge pages where the
//! system has them.
//!
//! Invariants: a buffer has one owner from [`Buffers::take`] until it is dropped, as a [`Buffer`] or as the last clone of
//! the [`Bytes`] it became, and nobody is handed its memory before; so a save in flight never sees what the next one
//! copies. [`Buffers`] keeps the memory of one copy at most, and none once it is dropped.

use std::{
    fmt, io,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread::{self, JoinHandle},
};

use bytes::Bytes;
use memmap2::MmapMut;

/// What is shorter lies on the heap: a mapping of its own would not pay.
const MAPPED_BYTES: usize = 4 << 20;
/// The smallest page there is: one write in each touches all.
const PAGE_BYTES: usize = 4096;
/// Bytes touched between two looks whether they are still wanted.
const TOUCHED_BYTES: usize = 8 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Memory {
    Heap(Vec<u8>),
    Mapped(MmapMut),
}

impl Memory {
    fn new(bytes: usize) -> io::Result<Self> {
        if bytes < MAPPED_BYTES {
            return Ok(Self::Heap(vec![0; bytes]));
        }
        let mapped = MmapMut::map_anon(bytes)?;
        // Speed alone depends on it; a system without huge pages refuses.
        #[cfg(target_os = "linux")]
        let _ = mapped.advise(memmap2::Advice::HugePage);
        Ok(Self::Mapped(mapped))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }
}

/// Memory of a fixed length that goes back to its [`Buffers`] when it is dropped, or is freed when they are gone.
pub struct Buffer {
    /// None once it has gone back.
    memory: Option<Memory>,
    home: Weak<Shelf>,
}

impl Buffer {
    /// Memory that belongs to no [`Buffers`], zeroed.
    ///
    /// # Errors
    /// When the system has none.
    pub(crate) fn alone(bytes: usize) -> io::Result<Self> {
        Ok(Self { memory: Some(Memory::new(bytes)?), home: Weak::new() })
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], Memory::bytes)
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], Memory::bytes_mut)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Buffer> for Bytes {
    fn from(buffer: Buffer) -> Self {
        Self::from_owner(buffer)
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(shelf), Some(memory)) = (self.home.upgrade(), self.memory.take()) {
            shelf.put(memory);
        }
    }
}

/// The memory of one copy of a stage's state: a buffer for each file, kept between saves.
pub struct Buffers {
    shelf: Arc<Shelf>,
    /// Touches the memory of the first copy.
    touching: Mutex<Option<JoinHandle<()>>>,
}

struct Shelf {
    /// Lengths of the buffers of one copy.
    lengths: Vec<usize>,
    free: Mutex<Vec<Memory>>,
}

impl Shelf {
    /// Keeps `memory` unless the copy is complete without it.
    fn put(&self, memory: Memory) {
        let length = memory.bytes().len();
        let wanted = self.lengths.iter().filter(|wanted| **wanted == length).count();
        let mut free = lock(&self.free);
        if free.iter().filter(|free| free.bytes().len() == length).count() < wanted {
            free.push(memory);
        }
    }
}

impl Buffers {
    /// For copies whose files have these lengths in bytes. No memory is taken yet.
    pub fn new(lengths: Vec<usize>) -> Self {
        let shelf = Arc::new(Shelf { lengths, free: Mutex::default() });
        Self { shelf, touching: Mutex::default() }
    }

    /// Takes the memory of a copy and touches it in the background, so that the first save finds it ready.
    pub fn prepare(&self) {
        let (home, lengths) = (Arc::downgrade(&self.shelf), self.shelf.lengths.clone());
        let touch = move || {
            for length in lengths {
                // Whoever needs the memory tells that there is none.
                let Ok(mut memory) = Memory::new(length) else { return };
                for part in memory.bytes_mut().chunks_mut(TOUCHED_BYTES) {
                    if home.strong_count() == 0 {
                        return;
                    }
                    part.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *std::hint::black_box(byte) = 0);
                }
                let Some(shelf) = home.upgrade() else { return };
                shelf.put(memory);
            }
        };
        // Without a thread the first save touches its memory itself.
        *lock(&self.touching) = thread::Builder::new().name("touch buffers".to_owned()).spawn(touch).ok();
    }

    /// A buffer of `bytes` bytes with whatever was in it before: kept memory of that length, or fresh memory where there
    /// is none, as while the save before has not let go of it.
    ///
    /// # Errors
    /// When the system has no memory.
    pub fn take(&self, bytes: usize) -> io::Result<Buffer> {
        let touching = lock(&self.touching).take();
        if let Some(touching) = touching {
            // It cannot panic, and if it did, fresh memory would serve.
            let _ = touching.join();
        }
        let mut free = lock(&self.shelf.free);
        let kept = free.iter().position(|memory| memory.bytes().len() == bytes).map(|at| free.swap_remove(at));
        drop(free);
        let memory = kept.map_or_else(|| Memory::new(bytes), Ok)?;
        Ok(Buffer { memory: Some(memory), home: Arc::downgrade(&self.shelf) })
    }

    /// Bytes that are kept and that nobody uses.
    pub fn free_bytes(&self) -> usize {
        lock(&self.shelf.free).iter().map(|memory| memory.bytes().len()).sum()
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({:?}, {} bytes free)", self.shelf.lengths, self.free_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 2] = [1000, MAPPED_BYTES + 5];
    const COPY: usize = LENGTHS[0] + LENGTHS[1];

    fn start(bytes: &[u8]) -> usize {
        bytes.as_ptr() as usize
    }

    #[test]
    fn memory_comes_back_when_the_last_clone_is_gone_and_not_before() {
        let buffers = Buffers::new(LENGTHS.to_vec());
        for length in LENGTHS {
            let mut first = buffers.take(length).unwrap();
            first.fill(7);
            let at = start(&first);
            let bytes = Bytes::from(first);
            let part = bytes.slice(length - 2..);
            drop(bytes);
            // A part of it is still read, as by an upload: the next copy gets other memory.
            let mut second = buffers.take(length).unwrap();
            assert_ne!(start(&second), at);
            second.fill(8);
            assert_eq!(part, [7, 7].as_slice());
            drop(part);
            assert_eq!(start(&buffers.take(length).unwrap()), at);
            drop(second);
        }
    }

    #[test]
    fn no_more_than_one_copy_is_kept() {
        let buffers = Buffers::new(LENGTHS.to_vec());
        let take = || LENGTHS.map(|length| buffers.take(length).unwrap());
        let held = [take(), take(), take()];
        assert_eq!(buffers.free_bytes(), 0);
        drop(held);
        assert_eq!(buffers.free_bytes(), COPY);
        // One of another length is of no use to a later copy.
        drop(buffers.take(999).unwrap());
        assert_eq!(buffers.free_bytes(), COPY);
    }

    #[test]
    fn what_is_held_longer_than_the_buffers_stays_readable() {
        let buffers = Buffers::new(LENGTHS.to_vec());
        let mut buffer = buffers.take(LENGTHS[1]).unwrap();
        buffer.fill(3);
        let (bytes, shelf) = (Bytes::from(buffer), Arc::downgrade(&buffers.shelf));
        drop(buffers);
        assert!(bytes.iter().all(|byte| *byte == 3));
        assert_eq!(shelf.strong_count(), 0, "nothing is kept any more");
    }

    #[test]
    fn a_prepared_copy_is_found_by_the_first_save() {
        let buffers = Buffers::new(LENGTHS.to_vec());
        buffers.prepare();
        let first = buffers.take(LENGTHS[0]).unwrap();
        // Both were there.
        assert_eq!(buffers.free_bytes(), LENGTHS[1]);
        drop(first);
        assert_eq!(buffers.free_bytes(), COPY);
    }
}
