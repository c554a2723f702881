//! What the machine allows: a large f32 product, a large read, a large copy. `dsv3-pipeline bench` measures them before
//! and after its work, the benches of `kernels/ops` and `runtime/train` in the same run; the larger figure counts.
//!
//! The product has 2·n³ operations and is made twice: by the `gemm` crate (of which `gemm-f32` is the f32 part) and by
//! ours on a weight laid out in panels. The ceiling is the faster of both and is the machine's: it does not follow
//! `--isa`, which limits ours alone.

use std::{hint::black_box, time::Instant};

use dsv3_ops::{Precision, Tensor, Weight, linear};
use gemm_common::Parallelism;
use rayon::prelude::*;

/// Rows and columns of the product's operands: three matrices of 16 MiB.
const PRODUCT_SIZE: usize = 2048;
/// Elements of a buffer: 256 MiB, beyond the caches.
const BUFFER_ELEMENTS: usize = 1 << 25;
/// What a thread reads or copies at a time, in elements.
const CHUNK_ELEMENTS: usize = 1 << 18;
const RUNS: usize = 6;
/// No run begins after that time: the portable kernels take tens of seconds for one.
const SECONDS_MAX: f64 = 2.0;

/// GFLOP/s of the product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Products {
    /// By the `gemm` crate.
    pub(super) gemm: f64,
    /// By this program.
    pub(super) own: f64,
}

impl Products {
    /// The faster one.
    pub(super) fn ceiling(self) -> f64 {
        self.gemm.max(self.own)
    }

    /// The larger figure of each.
    pub(super) fn max(self, other: Self) -> Self {
        Self { gemm: self.gemm.max(other.gemm), own: self.own.max(other.own) }
    }
}

/// Bandwidths in GB/s (10⁹ bytes).
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Bytes read.
    pub(super) read: f64,
    /// Bytes read and bytes written.
    pub(super) copy: f64,
}

impl Memory {
    /// The larger of both.
    pub(super) fn bandwidth(self) -> f64 {
        self.read.max(self.copy)
    }

    /// The larger figure of each.
    pub(super) fn max(self, other: Self) -> Self {
        Self { read: self.read.max(other.read), copy: self.copy.max(other.copy) }
    }
}

/// Seconds of the fastest of several runs.
fn best(mut run: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    for _ in 0..RUNS {
        let started = Instant::now();
        run();
        best = best.min(started.elapsed().as_secs_f64());
        if begin.elapsed().as_secs_f64() > SECONDS_MAX {
            break;
        }
    }
    best
}

/// The product on the threads of the pool.
pub(super) fn products() -> Products {
    let n = PRODUCT_SIZE;
    let value = |i: usize| (i % 251) as f32 / 251.0 - 0.5;
    let x = Tensor::f32(&[n, n], (0..n * n).map(value).collect());
    let mut c = vec![0.0; n * n];
    let gemm = best(|| gemm_product(n, x.as_f32(), x.as_f32(), black_box(&mut c)));
    drop(c);
    let weight = Weight::encode(&x, &Precision::F32).prepack();
    let own = best(|| drop(black_box(linear::forward(&x, &weight))));
    let gflops = |seconds: f64| 2.0 * (n * n * n) as f64 / seconds * 1e-9;
    Products { gemm: gflops(gemm), own: gflops(own) }
}

/// `c = a · b` of square matrices, by columns, on the threads of the pool.
fn gemm_product(n: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    assert!([a.len(), b.len(), c.len()].iter().all(|len| *len == n * n), "three matrices of {n} x {n}");
    let multiply = gemm_f32::gemm::f32::get_gemm_fn();
    let (by_column, by_row) = (n as isize, 1);
    let threads = Parallelism::Rayon(rayon::current_num_threads());
    // SAFETY: every element that the sizes and strides name lies within its slice, and `c` overlaps neither other.
    #[allow(unsafe_code)]
    unsafe {
        multiply(
            n,
            n,
            n,
            c.as_mut_ptr(),
            by_column,
            by_row,
            false,
            a.as_ptr(),
            by_column,
            by_row,
            b.as_ptr(),
            by_column,
            by_row,
            0.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Reads between steps: on a virtual machine the bandwidth changes from one second to the next, so that a step is
/// compared with the reads beside it.
pub(super) struct Reader(Vec<u64>);

impl Reader {
    pub(super) fn new() -> Self {
        // Not zeros: those would be one page of the kernel's.
        Self((0..BUFFER_ELEMENTS).into_par_iter().map(|i| i as u64).collect())
    }

    /// Memory it holds.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }

    /// One read of all of it on the threads of the pool, GB/s.
    pub(super) fn pass(&self) -> f64 {
        let started = Instant::now();
        let chunks = self.0.par_chunks(CHUNK_ELEMENTS);
        let sums = chunks.map(|chunk| chunk.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x)));
        black_box(sums.reduce(|| 0, u64::wrapping_add));
        self.bytes() as f64 / started.elapsed().as_secs_f64() * 1e-9
    }
}

/// Bandwidths on the threads of the pool.
pub(super) fn memory() -> Memory {
    let reader = Reader::new();
    let from = &reader.0;
    let mut to = from.clone();
    let bytes = reader.bytes() as f64;
    let read = (0..RUNS).map(|_| reader.pass()).fold(0.0, f64::max);
    let copy = best(|| {
        let pairs = to.par_chunks_mut(CHUNK_ELEMENTS).zip(from.par_chunks(CHUNK_ELEMENTS));
        pairs.for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&to);
    });
    Memory { read, copy: 2.0 * bytes / copy * 1e-9 }
}
