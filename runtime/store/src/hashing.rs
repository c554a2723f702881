//! Hashing beside reading and writing on a local disk: while one thread moves bytes, another hashes them, so that a file
//! takes as long as the slower of the two.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
    sync::mpsc,
    thread,
};

use bytes::Bytes;
use dsv3_core::Digest;

/// Bytes moved at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that wait for the hasher.
const CHUNKS_WAITING: usize = 4;
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

/// The bytes of a file and their digest.
pub(crate) fn read_hashed(path: &Path) -> io::Result<(Vec<u8>, Digest)> {
    let mut file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    if length < THREAD_BYTES {
        file.read_exact(&mut bytes)?;
        let digest = Digest::of(&bytes);
        return Ok((bytes, digest));
    }
    let digest = thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel::<&[u8]>(CHUNKS_WAITING);
        let hashing = scope.spawn(move || {
            let mut hasher = blake3::Hasher::new();
            for chunk in receiver {
                hasher.update(chunk);
            }
            digest_of(&hasher)
        });
        for chunk in bytes.chunks_mut(CHUNK_BYTES) {
            file.read_exact(chunk)?;
            // As above.
            let _ = sender.send(chunk);
        }
        drop(sender);
        joined(hashing)
    })?;
    Ok((bytes, digest))
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

    #[test]
    fn whatever_the_length_the_digest_is_that_of_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        for length in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, THREAD_BYTES, THREAD_BYTES + 12345] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 + i / 251) as u8).collect();
            let (path, digest) = (folder.path().join("f"), Digest::of(&bytes));
            std::fs::write(&path, &bytes).unwrap();
            let mut copy = Vec::new();
            assert_eq!(copy_hashed(&mut bytes.as_slice(), &mut copy).unwrap(), (digest, length as u64));
            assert!(copy == bytes);
            assert_eq!(hash_file(&path).unwrap(), (digest, length as u64));
            assert!(read_hashed(&path).unwrap() == (bytes.clone(), digest));
            assert_eq!(hash_beside(&bytes, || Ok(1)).unwrap(), (digest, 1));
        }
    }
}
