//! Saving and loading through the store beside the disk's own limit, measured in the same run on the same bytes.
//!
//!     cargo bench -p dsv3-store --bench throughput
//!     DSV3_BENCH_MIB=4096 DSV3_BENCH_FILES=16 DSV3_BENCH_DIR=/mnt/disk cargo bench -p dsv3-store --bench throughput
//!
//! Limit of saving: the bytes written to as many files and synced, one after another or four at a time, whichever is
//! faster. Saving: `put_blob` of as many blobs, four at a time as a checkpoint does it: hashed, written, synced, linked,
//! folder synced. Limit of loading: the files read into memory. Loading: `get_blob`, the digest compared. Before each cold
//! read the pages are dropped (`posix_fadvise`); a warm read comes from the page cache. Rounds take turns; the best of each
//! counts.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use bytes::Bytes;
use dsv3_core::Digest;
use dsv3_store::Store;
use futures::{StreamExt, TryStreamExt};

/// Rounds of each measurement.
const ROUNDS: usize = 3;
/// Files or blobs at the same time, as many as a checkpoint stores.
const PARALLEL: usize = 4;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn shards(total_bytes: usize, count: usize) -> Vec<Bytes> {
    let mut state = 7u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.rotate_right(29).to_le_bytes()
    };
    let shard = total_bytes / count / 8;
    (0..count).map(|_| (0..shard).flat_map(|_| word()).collect::<Vec<u8>>().into()).collect()
}

/// Runs `work` on each item with `threads` threads.
fn each<T: Sync>(items: &[T], threads: usize, work: impl Fn(usize, &T) -> io::Result<()> + Sync) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let take = || {
        let i = next.fetch_add(1, Ordering::Relaxed);
        items.get(i).map(|item| (i, item))
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    while let Some((i, item)) = take() {
                        work(i, item)?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
    })
}

fn plain_path(folder: &Path, i: usize) -> PathBuf {
    folder.join(format!("plain-{i}"))
}

fn write_plain(folder: &Path, shards: &[Bytes], threads: usize) -> io::Result<f64> {
    let start = Instant::now();
    each(shards, threads, |i, bytes| {
        let mut file = File::create(plain_path(folder, i))?;
        file.write_all(bytes)?;
        file.sync_all()
    })?;
    File::open(folder)?.sync_all()?;
    Ok(start.elapsed().as_secs_f64())
}

fn read_plain(paths: &[PathBuf], threads: usize) -> io::Result<f64> {
    let start = Instant::now();
    each(paths, threads, |_, path| {
        let mut file = File::open(path)?;
        let mut bytes = Vec::with_capacity(file.metadata()?.len() as usize);
        file.read_to_end(&mut bytes)?;
        std::hint::black_box(bytes);
        Ok(())
    })?;
    Ok(start.elapsed().as_secs_f64())
}

/// Asks the system to forget the pages of these files, which are synced.
fn drop_pages(paths: &[PathBuf]) -> io::Result<()> {
    for path in paths {
        rustix::fs::fadvise(File::open(path)?, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

async fn save(store: &Store, shards: &[Bytes]) -> (f64, Vec<Digest>) {
    let start = Instant::now();
    let puts = futures::stream::iter(shards.iter().cloned()).map(|bytes| store.put_blob(bytes)).buffered(PARALLEL);
    let digests = puts.try_collect().await.expect("saved");
    (start.elapsed().as_secs_f64(), digests)
}

async fn load(store: &Store, digests: &[Digest]) -> f64 {
    let start = Instant::now();
    let gets = futures::stream::iter(digests.iter().copied()).map(|digest| store.get_blob(digest));
    let check = gets.buffer_unordered(PARALLEL).try_for_each(async |bytes| {
        std::hint::black_box(bytes);
        Ok(())
    });
    check.await.expect("loaded");
    start.elapsed().as_secs_f64()
}

/// Best times in seconds.
struct Best {
    write: f64,
    save: f64,
    read_cold: f64,
    load_cold: f64,
    read_warm: f64,
    load_warm: f64,
}

async fn measure(folder: &Path, shards: &[Bytes]) -> io::Result<Best> {
    let max = f64::INFINITY;
    let mut best = Best { write: max, save: max, read_cold: max, load_cold: max, read_warm: max, load_warm: max };
    let plain: Vec<PathBuf> = (0..shards.len()).map(|i| plain_path(folder, i)).collect();
    for _ in 0..ROUNDS {
        for threads in [1, PARALLEL] {
            best.write = best.write.min(write_plain(folder, shards, threads)?);
            drop_pages(&plain)?;
            best.read_cold = best.read_cold.min(read_plain(&plain, threads)?);
            best.read_warm = best.read_warm.min(read_plain(&plain, threads)?);
            plain.iter().try_for_each(fs::remove_file)?;
        }
        let root = folder.join("store");
        let store = Store::open(&root.display().to_string()).map_err(io::Error::other)?;
        let (seconds, digests) = save(&store, shards).await;
        best.save = best.save.min(seconds);
        let blobs: Vec<PathBuf> = digests.iter().filter_map(|digest| store.local_blob(*digest)).collect();
        drop_pages(&blobs)?;
        best.load_cold = best.load_cold.min(load(&store, &digests).await);
        best.load_warm = best.load_warm.min(load(&store, &digests).await);
        fs::remove_dir_all(root)?;
    }
    Ok(best)
}

fn main() -> io::Result<()> {
    let (mib, files) = (number("DSV3_BENCH_MIB", 2048), number("DSV3_BENCH_FILES", 8).max(1));
    let folder = std::env::var("DSV3_BENCH_DIR").unwrap_or_else(|_| env!("CARGO_TARGET_TMPDIR").to_owned());
    let folder = tempfile::tempdir_in(folder)?;
    let shards = shards(mib << 20, files);
    let bytes: usize = shards.iter().map(Bytes::len).sum();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let best = runtime.block_on(measure(folder.path(), &shards))?;
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    println!("{files} files of {} MiB, best of {ROUNDS} rounds, GB/s\n", (bytes / files) >> 20);
    println!("| | the disk | the store | ratio |\n|---|---|---|---|");
    let rows = [
        ("save (synced)", best.write, best.save),
        ("load, pages dropped", best.read_cold, best.load_cold),
        ("load from the page cache", best.read_warm, best.load_warm),
    ];
    for (name, disk, store) in rows {
        println!("| {name} | {:.2} | {:.2} | {:.2} |", rate(disk), rate(store), disk / store);
    }
    Ok(())
}
