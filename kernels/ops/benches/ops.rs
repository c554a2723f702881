//! Times the ops at the shapes of the demo recipe: microseconds, and GFLOP/s where the arithmetic is a product's.
//!
//! `cargo bench -p dsv3-ops [-- NAME]`, or `RAYON_NUM_THREADS=1 cargo bench -p dsv3-ops` for one core.

use std::sync::Arc;
use std::time::Instant;

use dsv3_ops::mla_decode::{self, CacheRows, Page};
use dsv3_ops::{Spans, Tape, Tensor, WeightGrads, attention};

/// Values in (-1, 1), the same on every run.
fn noise(shape: &[usize], seed: u32) -> Tensor {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let data = (0..shape.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 * 2.0 - 1.0
        })
        .collect();
    Tensor::f32(shape, data)
}

/// Prints the best of several runs.
fn time(name: &str, flops: f64, mut work: impl FnMut()) {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if wanted.is_some_and(|wanted| !name.contains(&wanted)) {
        return;
    }
    work();
    let mut best = f64::INFINITY;
    for _ in 0..30 {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{name:<44} {:>10.0} us {:>8.1} GFLOP/s", best * 1e6, flops / best * 1e-9);
}

fn time_attention(len: usize, sequences: usize) {
    let (heads, dn, dr, dv) = (4, 16, 32, 32);
    let tokens = len * sequences;
    let spans = Arc::new(Spans::uniform(sequences, len));
    let q = noise(&[tokens, heads, dn + dr], 1);
    let kv = noise(&[tokens, heads, dn + dv], 2);
    let k_rope = noise(&[tokens, dr], 3);
    let d_out = noise(&[tokens, heads * dv], 4);
    let pairs = (sequences * heads * len * (len + 1) / 2) as f64;
    let forward_flops = 2.0 * pairs * (dn + dr + dv) as f64;
    time(&format!("attention forward {sequences} x {len}"), forward_flops, || {
        attention::forward(&q, &kv, &k_rope, &spans, 0.2);
    });
    let backward_flops = 2.0 * pairs * (3 * (dn + dr) + 2 * dv) as f64;
    time(&format!("attention forward+backward {sequences} x {len}"), forward_flops + backward_flops, || {
        let mut tape = Tape::new();
        let (q, kv, k_rope) = (tape.leaf(q.clone()), tape.leaf(kv.clone()), tape.leaf(k_rope.clone()));
        let out = attention::on_tape(&mut tape, &q, &kv, &k_rope, &spans, 0.2);
        tape.backward(vec![(out.id(), d_out.clone())], &mut WeightGrads::default());
    });
}

fn time_decode(rows: usize, len: usize, bf16: bool) {
    let (heads, rank, dr, page_tokens) = (4, 64, 32, 16);
    let width = rank + dr;
    let q = noise(&[rows, heads, width], 1);
    let pages_each = len.div_ceil(page_tokens);
    let cache = noise(&[rows * pages_each, page_tokens * width], 2);
    let narrow = cache.to_bf16();
    let pages: Vec<Page<'_>> = if bf16 {
        narrow.as_bf16().chunks(page_tokens * width).map(Page::Bf16).collect()
    } else {
        cache.as_f32().chunks(page_tokens * width).map(Page::F32).collect()
    };
    let views: Vec<CacheRows<'_>> = pages.chunks(pages_each).map(|pages| CacheRows { pages, len }).collect();
    let flops = (2 * rows * heads * len * (width + rank)) as f64;
    let kind = if bf16 { "bf16" } else { "f32" };
    time(&format!("mla_decode {rows} rows x {len} tokens {kind}"), flops, || {
        mla_decode::forward(&q, &views, rank, 0.2);
    });
}

fn main() {
    time_attention(128, 8);
    time_attention(512, 8);
    time_attention(4096, 1);
    time_decode(128, 100, false);
    time_decode(128, 100, true);
    time_decode(1, 2000, false);
}
