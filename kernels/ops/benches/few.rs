//! Few rows through a prepacked weight far beyond the caches, as decoding does: GB/s of weight, beside reading memory.
//!
//! `cargo bench -p dsv3-ops --bench few`, or `RAYON_NUM_THREADS=1 cargo bench ..` for one core. Reads of a buffer as large as
//! the weight alternate with the products, so that both meet the same load; the last column is their ratio. One row is
//! bound by memory, eight rows by the processor. `-- --isa avx2` limits the instruction set.

use std::hint::black_box;
use std::time::Instant;

use dsv3_ops::testing::values;
use dsv3_ops::{Fp8Format, Fp8Scales, Precision, Weight, linear, with_threads_awake};
use rayon::prelude::*;

/// Outputs and inputs: 64 MiB of FP8.
const SIZES: (usize, usize) = (1 << 16, 1 << 10);
/// Alternations, of which the best of each kind count.
const ROUNDS: usize = 20;

fn seconds(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

fn read(words: &[u64]) {
    let sum_of = |chunk: &[u64]| {
        let mut lanes = [0_u64; 32];
        for words in chunk.chunks_exact(32) {
            lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = lane.wrapping_add(*word));
        }
        lanes.into_iter().fold(0, u64::wrapping_add)
    };
    let len = words.len().div_ceil(8 * rayon::current_num_threads());
    black_box(words.par_chunks(len).map(sum_of).reduce(|| 0, u64::wrapping_add));
}

fn main() {
    let mut args = std::env::args().skip_while(|arg| arg != "--isa");
    if let Some(name) = args.nth(1) {
        dsv3_ops::limit_instruction_set(&name).expect("an instruction set of this machine");
    }
    println!("{}, {} threads", dsv3_ops::instruction_set(), rayon::current_num_threads());
    let (n, k) = SIZES;
    let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
    let master = values(&[n, k], 1);
    println!("{:<12} {:>5} {:>10} {:>12} {:>12} {:>7}", "weight", "rows", "GB/s", "GFLOP/s", "read, GB/s", "ratio");
    for (label, precision) in [("fp8", fp8), ("bf16", Precision::Bf16), ("f32", Precision::F32)] {
        let w = Weight::encode(&master, &precision).prepack();
        let words = vec![1_u64; w.bytes() / 8];
        for m in [1, 2, 4, 8] {
            let x = values(&[m, k], 2);
            let (mut product, mut reading) = (f64::INFINITY, f64::INFINITY);
            for _ in 0..ROUNDS {
                with_threads_awake(|| {
                    reading = reading.min(seconds(|| read(&words)));
                    product = product.min(seconds(|| drop(black_box(linear::forward(&x, &w)))));
                });
            }
            let rate = |seconds: f64| w.bytes() as f64 / seconds * 1e-9;
            println!(
                "{label:<12} {m:>5} {:>10.1} {:>12.1} {:>12.1} {:>7.2}",
                rate(product),
                2.0 * (m * n * k) as f64 / product * 1e-9,
                rate(reading),
                reading / product
            );
        }
    }
}
