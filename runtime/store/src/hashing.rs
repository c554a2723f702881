//! Hashing beside reading and writing on a local disk: while one thread moves bytes, another hashes them, so that a file
//! takes as long as the slower of the two.

use std::{
    fs::File,
    io::{self, Read, Write},
    num::NonZeroU64,
    os::unix::fs::FileExt,
    path::Path,
    sync::mpsc,
    thread,
};

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};
use bytes::Bytes;
use dsv3_core::Digest;

use crate::buffers::Buffer;

/// Bytes moved at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that wait for the hasher.
const CHUNKS_WAITING: usize = 4;
/// Bytes that the system is asked to fetch ahead of each reader: with less a disk waits for the readers.
const AHEAD_BYTES: u64 = 16 << 20;
/// Threads that read one file.
const READERS_MAX: usize = 4;
/// Bytes written before the system is asked to store them.
const WRITTEN_BYTES: usize = 8 << 20;
/// What is shorter is hashed by the thread that moves it.
pub(crate) const THREAD_BYTES: usize = 4 << 20;

fn digest_of(hasher: &blake3::Hasher) -> Digest {
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

/// A panic of the hashing thread as an error.
fn joined<T>(hashing: thread::ScopedJoinHandle<'_, T>) -> io::Result<T> {
    hashing.join().map_err(|_| io::Error::other("hashing was interrupted"))
}

/// Fills `chunk` as far as there is something to read.
fn read_full(from: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < chunk.len() {
        match from.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Digest and length of a file.
pub(crate) fn hash_file(path: &Path) -> io::Result<(Digest, u64)> {
    copy_hashed(&mut File::open(path)?, &mut io::sink())
}

/// Copies `from` into `to` and answers digest and length of what passed.
pub(crate) fn copy_hashed(from: &mut impl Read, to: &mut impl Write) -> io::Result<(Digest, u64)> {
    let mut first = vec![0; CHUNK_BYTES];
    let filled = read_full(from, &mut first)?;
    first.truncate(filled);
    if filled < CHUNK_BYTES {
        to.write_all(&first)?;
        return Ok((Digest::of(&first), filled as u64));
    }
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel::<Bytes>(CHUNKS_WAITING);
        let hashing = scope.spawn(move || {
            let mut hasher = blake3::Hasher::new();
            for chunk in receiver {
                hasher.update(&chunk);
            }
            digest_of(&hasher)
        });
        let (mut chunk, mut bytes) = (Bytes::from(first), 0);
        while !chunk.is_empty() {
            bytes += chunk.len() as u64;
            // The hasher ends early only by a panic, which joining it tells of.
            let _ = sender.send(chunk.clone());
            to.write_all(&chunk)?;
            let mut next = vec![0; CHUNK_BYTES];
            let filled = read_full(from, &mut next)?;
            next.truncate(filled);
            chunk = Bytes::from(next);
        }
        drop(sender);
        Ok((joined(hashing)?, bytes))
    })
}

/// The bytes of a file and their digest. A large one is read in pieces by several threads, each of which hashes what it has
/// just read while that is still in its cache.
pub(crate) fn read_hashed(path: &Path) -> io::Result<(Bytes, Digest)> {
    let mut file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if length < THREAD_BYTES {
        let mut bytes = vec![0; length];
        file.read_exact(&mut bytes)?;
        let digest = Digest::of(&bytes);
        return Ok((bytes.into(), digest));
    }
    let mut bytes = Buffer::alone(length)?;
    let mut values = vec![[0; 32]; length.div_ceil(CHUNK_BYTES)];
    let share = values.len().div_ceil(thread::available_parallelism().map_or(1, usize::from).clamp(2, READERS_MAX));
    thread::scope(|scope| {
        let shares = bytes.chunks_mut(share * CHUNK_BYTES).zip(values.chunks_mut(share));
        let reader = |(i, (bytes, values))| scope.spawn(move || read_share(path, i * share, bytes, values));
        let readers: Vec<_> = shares.enumerate().map(reader).collect();
        readers.into_iter().try_for_each(|reader| joined(reader)?)
    })?;
    let (left, right) = values.split_at(left_pieces(values.len()));
    let root = hazmat::merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash);
    Ok((bytes.into(), Digest::from_bytes(*root.as_bytes())))
}

/// Reads pieces from number `first` on, and answers the chaining value of each. Consecutive pieces and a file of its own
/// keep the system's readahead going, which two readers of one file would confuse.
fn read_share(path: &Path, first: usize, bytes: &mut [u8], values: &mut [ChainingValue]) -> io::Result<()> {
    let file = File::open(path)?;
    will_read(&file, (first * CHUNK_BYTES) as u64, AHEAD_BYTES);
    for (i, (piece, value)) in bytes.chunks_mut(CHUNK_BYTES).zip(values).enumerate() {
        let offset = ((first + i) * CHUNK_BYTES) as u64;
        file.read_exact_at(piece, offset)?;
        // The disk goes on while this piece is hashed.
        will_read(&file, offset + AHEAD_BYTES, piece.len() as u64);
        *value = blake3::Hasher::new().set_input_offset(offset).update(piece).finalize_non_root();
    }
    Ok(())
}

/// Asks the system to fetch `bytes` bytes from `offset` on.
fn will_read(file: &File, offset: u64, bytes: u64) {
    // Speed alone depends on it.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(file, offset, NonZeroU64::new(bytes), rustix::fs::Advice::WillNeed);
}

/// Writes `bytes`, and has the system begin to store each part while the next ones are written, so that the sync that
/// follows finds little left to do.
pub(crate) fn write_through(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    let mut offset = 0;
    for part in bytes.chunks(WRITTEN_BYTES) {
        file.write_all(part)?;
        // To let go of pages that are not stored yet means to begin storing them. Speed alone depends on it.
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(&*file, offset, NonZeroU64::new(part.len() as u64), rustix::fs::Advice::DontNeed);
        offset += part.len() as u64;
    }
    Ok(())
}

/// Of `pieces` pieces, at least two, those under the left child: BLAKE3 puts the largest power of two there that leaves
/// something to the right. A piece being a power of two of its chunks itself, no node divides one.
fn left_pieces(pieces: usize) -> usize {
    pieces.next_power_of_two() / 2
}

/// Chaining value over those of some pieces in order.
fn subtree(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(left_pieces(values.len()));
            hazmat::merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// Hashes `bytes` while `work` goes on.
pub(crate) fn hash_beside<T>(bytes: &[u8], work: impl FnOnce() -> io::Result<T>) -> io::Result<(Digest, T)> {
    if bytes.len() < THREAD_BYTES {
        return Ok((Digest::of(bytes), work()?));
    }
    thread::scope(|scope| {
        let hashing = scope.spawn(|| Digest::of(bytes));
        let done = work()?;
        Ok((joined(hashing)?, done))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Around every bound of the code, and trees of 4 to 9 pieces, the last one whole or not.
    const LENGTHS: [usize; 14] = [
        0,
        1,
        CHUNK_BYTES - 1,
        CHUNK_BYTES,
        CHUNK_BYTES + 1,
        THREAD_BYTES - 1,
        THREAD_BYTES,
        THREAD_BYTES + 1,
        THREAD_BYTES + 12345,
        6 * CHUNK_BYTES,
        7 * CHUNK_BYTES + 1024,
        8 * CHUNK_BYTES,
        8 * CHUNK_BYTES + 1025,
        2 * WRITTEN_BYTES + 1,
    ];

    #[test]
    fn whatever_the_length_the_digest_is_that_of_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        for length in LENGTHS {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 + i / 251) as u8).collect();
            let (path, digest) = (folder.path().join("f"), Digest::of(&bytes));
            std::fs::write(&path, &bytes).unwrap();
            let mut copy = Vec::new();
            assert_eq!(copy_hashed(&mut bytes.as_slice(), &mut copy).unwrap(), (digest, length as u64));
            assert!(copy == bytes);
            assert_eq!(hash_file(&path).unwrap(), (digest, length as u64));
            assert!(read_hashed(&path).unwrap() == (bytes.clone().into(), digest));
            assert_eq!(hash_beside(&bytes, || Ok(1)).unwrap(), (digest, 1));
            write_through(&mut File::create(&path).unwrap(), &bytes).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes);
        }
    }
}
