//! Attention in training and over the latent cache.

use std::hint::black_box;
use std::sync::Arc;

use dsv3_ops::mla_decode::{self, CacheRows, Page};
use dsv3_ops::testing::values;
use dsv3_ops::{Spans, attention};

use crate::harness::Amount::Flops;
use crate::harness::Bench;
use crate::shapes::Shape;

/// Causal attention of a batch; scores above the diagonal do not count.
pub(crate) fn training(bench: &mut Bench, shape: &Shape) {
    let Shape { sequences, length, heads, nope, rope, value, .. } = *shape;
    let tokens = shape.tokens();
    let name = format!("{}: {sequences} × {length}", shape.name);
    if !bench.wants("attention", &name, &["forward", "backward"]) {
        return;
    }
    let spans = Arc::new(Spans::uniform(sequences, length));
    let q = values(&[tokens, heads, nope + rope], 1);
    let kv = values(&[tokens, heads, nope + value], 2);
    let k_rope = values(&[tokens, rope], 3);
    let pairs = (sequences * heads * length * (length + 1) / 2) as f64;
    let flops = 2.0 * pairs * (nope + rope + value) as f64;
    bench.time("attention", &name, "forward", Flops(flops), || {
        black_box(attention::forward(&q, &kv, &k_rope, &spans, 0.2));
    });
    bench.backward("attention", &name, [("backward", Flops(2.0 * flops))], |tape| {
        let (q, kv, k_rope) = (tape.leaf(q.clone()), tape.leaf(kv.clone()), tape.leaf(k_rope.clone()));
        attention::on_tape(tape, &q, &kv, &k_rope, &spans, 0.2)
    });
}

/// A step of decoding after 512 tokens with the heads and latents of `L`.
pub(crate) fn decoding(bench: &mut Bench) {
    let (heads, rank, rope, page_tokens, len) = (8, 128, 32, 16, 512_usize);
    let width = rank + rope;
    for rows in [1, 8] {
        let name = format!("L: {rows} × {len}");
        if !bench.wants("mla_decode f32 bf16", &name, &["decoding"]) {
            continue;
        }
        let q = values(&[rows, heads, width], 1);
        let pages_each = len.div_ceil(page_tokens);
        let cache = values(&[rows * pages_each, page_tokens * width], 2);
        let narrow = cache.to_bf16();
        let flops = Flops((2 * rows * heads * len * (width + rank)) as f64);
        for (op, pages) in [
            ("mla_decode f32", cache.as_f32().chunks(page_tokens * width).map(Page::F32).collect::<Vec<_>>()),
            ("mla_decode bf16", narrow.as_bf16().chunks(page_tokens * width).map(Page::Bf16).collect()),
        ] {
            let views: Vec<CacheRows<'_>> = pages.chunks(pages_each).map(|pages| CacheRows { pages, len }).collect();
            bench.time(op, &name, "decoding", flops, || {
                black_box(mla_decode::forward(&q, &views, rank, 0.2));
            });
        }
    }
}
