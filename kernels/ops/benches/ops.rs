//! Times the ops at the shapes of the demo recipe: microseconds, and GFLOP/s where the arithmetic is a product's.
//!
//! `cargo bench -p dsv3-ops [-- NAME]`, or `RAYON_NUM_THREADS=1 cargo bench -p dsv3-ops` for one core.

use std::sync::Arc;
use std::time::Instant;

use dsv3_ops::mla_decode::{self, CacheRows, Page};
use dsv3_ops::permute::{self, Dispatch};
use dsv3_ops::rope::{self, RopeTable};
use dsv3_ops::{Param, Precision, Spans, Tape, Tensor, Var, Weight, WeightGrads};
use dsv3_ops::{attention, balance_loss, rms_norm, router, swiglu, token_logprob};

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

/// Times `run` on a tape and its backward pass from a gradient of ones.
fn time_on_tape(name: &str, flops: f64, inputs: &[Tensor], run: impl Fn(&mut Tape, &[Var]) -> Var) {
    time(name, flops, || {
        let mut tape = Tape::new();
        let vars: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
        let out = run(&mut tape, &vars);
        let seed = Tensor::f32(out.value.shape(), vec![1.0; out.value.numel()]);
        tape.backward(vec![(out.id(), seed)], &mut WeightGrads::default());
    });
}

/// The other ops of one block and of the head, forward and backward, at the demo's width.
fn time_block(tokens: usize) {
    let (d, experts, top_k, width, vocab) = (128, 16, 4, 32, 704);
    let name = |op: &str| format!("{op} forward+backward, {tokens} tokens");
    let x = noise(&[tokens, d], 1);
    let param = |id, shape: &[usize]| {
        let master = noise(shape, 50 + id);
        Param { id, compute: Weight::encode(&master, &Precision::F32), master: Some(master) }
    };
    let (norm, gate, head) = (param(0, &[d]), param(1, &[experts, d]), param(2, &[vocab, d]));
    time_on_tape(&name("rms_norm"), 0.0, std::slice::from_ref(&x), |t, x| rms_norm::on_tape(t, &x[0], &norm, 1e-6));
    let hidden = [noise(&[tokens * top_k, width], 2), noise(&[tokens * top_k, width], 3)];
    time_on_tape(&name("swiglu"), 0.0, &hidden, |t, x| swiglu::on_tape(t, &x[0], &x[1]));
    let table = RopeTable::new(32, 10000.0, None, tokens);
    let positions: Arc<[u32]> = (0..tokens as u32).collect();
    let q = noise(&[tokens, 4, 48], 4);
    time_on_tape(&name("rope"), 0.0, &[q], |t, x| rope::on_tape(t, &x[0], 16, &positions, &table));
    let config = router::Config { experts, top_k, groups: 4, top_groups: 2, scale: 2.5, norm_topk: true };
    let bias = vec![0.0; experts];
    time_on_tape(&name("router"), (6 * tokens * experts * d) as f64, std::slice::from_ref(&x), |t, x| {
        let scores = router::scores_on_tape(t, &x[0], &gate);
        let chosen = router::select(&scores.value, &bias, &config);
        router::gates_on_tape(t, &scores, &chosen, &config)
    });
    let scores = router::scores_forward(&x, &gate.compute);
    let chosen = router::select(&scores, &bias, &config);
    let gates = router::gates_forward(&scores, &chosen, &config);
    time_on_tape(&name("permute and combine"), 0.0, &[x.clone(), gates], |t, x| {
        let dispatch = Arc::new(Dispatch::new(&chosen, experts));
        let sorted = permute::on_tape(t, &x[0], &dispatch);
        permute::combine_on_tape(t, &sorted, &x[1], &dispatch)
    });
    let spans = Spans::uniform(8, tokens / 8);
    time_on_tape(&name("balance_loss"), 0.0, &[scores], |t, x| balance_loss::on_tape(t, &x[0], &spans, top_k));
    let targets: Arc<[u32]> = (0..tokens as u32).map(|i| i * 7 % vocab as u32).collect();
    time_on_tape(&name("token_logprob"), (8 * tokens * vocab * d) as f64, &[x], |t, x| {
        token_logprob::on_tape(t, &x[0], &head, &targets, token_logprob::Options::default()).0
    });
}

fn main() {
    dsv3_ops::keep_freed_memory();
    time_block(1024);
    time_attention(128, 8);
    time_attention(512, 8);
    time_attention(4096, 1);
    time_decode(128, 100, false);
    time_decode(128, 100, true);
    time_decode(1, 2000, false);
}
