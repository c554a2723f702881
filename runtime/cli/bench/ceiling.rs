//! What the machine allows: a large f32 product, a large read, a large copy; and how much memory the process has taken.
//!
//! The product is ours, on a weight laid out in panels: 2·n³ operations, the best of several runs.

use std::{hint::black_box, time::Instant};

use dsv3_ops::{Precision, Tensor, Weight, linear};
use rayon::prelude::*;

/// Rows and columns of the product's operands: three matrices of 16 MiB.
const PRODUCT_SIZE: usize = 2048;
/// Elements of a buffer: 256 MiB, beyond the caches.
const BUFFER_ELEMENTS: usize = 1 << 25;
/// What a thread reads or copies at a time, in elements.
const CHUNK_ELEMENTS: usize = 1 << 18;
const RUNS: usize = 4;

/// Bandwidths in GB/s (10⁹ bytes).
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Bytes read.
    pub(super) read: f64,
    /// Bytes read and bytes written.
    pub(super) copy: f64,
}

/// Seconds of the fastest of several runs.
fn best(mut run: impl FnMut()) -> f64 {
    let seconds = (0..RUNS).map(|_| {
        let started = Instant::now();
        run();
        started.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}

/// GFLOP/s of the product on the threads of the pool.
pub(super) fn product_gflops() -> f64 {
    let n = PRODUCT_SIZE;
    let value = |i: usize| (i % 251) as f32 / 251.0 - 0.5;
    let x = Tensor::f32(&[n, n], (0..n * n).map(value).collect());
    let weight = Weight::encode(&x, &Precision::F32).prepack();
    let seconds = best(|| drop(black_box(linear::forward(&x, &weight))));
    2.0 * (n * n * n) as f64 / seconds * 1e-9
}

/// Bandwidths on the threads of the pool.
pub(super) fn memory() -> Memory {
    // Not zeros: those would be one page of the kernel's.
    let from: Vec<u64> = (0..BUFFER_ELEMENTS).into_par_iter().map(|i| i as u64).collect();
    let mut to = from.clone();
    let bytes = (BUFFER_ELEMENTS * size_of::<u64>()) as f64;
    let read = best(|| {
        let sums = from.par_chunks(CHUNK_ELEMENTS).map(|chunk| chunk.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x)));
        black_box(sums.reduce(|| 0, u64::wrapping_add));
    });
    let copy = best(|| {
        let pairs = to.par_chunks_mut(CHUNK_ELEMENTS).zip(from.par_chunks(CHUNK_ELEMENTS));
        pairs.for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&to);
    });
    Memory { read: bytes / read * 1e-9, copy: 2.0 * bytes / copy * 1e-9 }
}

/// Forgets the highest memory so far, where the system lets a process do so.
pub(super) fn reset_peak() {
    dsv3_ops::return_freed_memory();
    // Refused in some containers: the peak then includes the product above, 50 MB.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Highest resident memory of the process, by `/proc/self/status`.
pub(super) fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}
