//! The other ops of a block, of the embedding and of the head.

use std::hint::black_box;
use std::sync::Arc;

use dsv3_ops::Spans;
use dsv3_ops::permute::{self, Dispatch};
use dsv3_ops::rope::{self, RopeTable};
use dsv3_ops::testing::{param, values};
use dsv3_ops::{balance_loss, columns, elementwise, embedding, gather_rows, rms_norm, router, swiglu, token_logprob};

use crate::harness::Amount::{Bytes, Flops};
use crate::harness::Bench;
use crate::shapes::{Shape, TOP_K};

/// Rows whose logits are made at one time, as in the recipes.
const LOGIT_ROWS: usize = 1024;

/// Bytes of `arrays` arrays of `elements` f32.
fn floats(arrays: usize, elements: usize) -> crate::harness::Amount {
    Bytes((4 * arrays * elements) as f64)
}

/// What lies between the products of attention and MLP.
pub(crate) fn norm_and_mlp(bench: &mut Bench, shape: &Shape) {
    let (tokens, d, of) = (shape.tokens(), shape.hidden, shape.name);
    let x = values(&[tokens, d], 1);
    let name = format!("{of}: {tokens} × {d}");
    let norm = param(0, &values(&[d], 2));
    bench.time("rms_norm", &name, "forward", floats(2, tokens * d), || {
        black_box(rms_norm::forward(&x, &norm.compute, 1e-6));
    });
    bench.backward("rms_norm", &name, [("backward", floats(3, tokens * d))], |tape| {
        let x = tape.leaf(x.clone());
        rms_norm::on_tape(tape, &x, &norm, 1e-6)
    });
    bench.time("elementwise add", &name, "forward", floats(3, tokens * d), || {
        black_box(elementwise::add(&x, &x));
    });
    let (slots, width) = (tokens * TOP_K, shape.expert);
    let name = format!("{of}: {slots} × {width}");
    let (gate, up) = (values(&[slots, width], 2), values(&[slots, width], 3));
    bench.time("swiglu", &name, "forward", floats(3, slots * width), || {
        black_box(swiglu::forward(&gate, &up));
    });
    bench.backward("swiglu", &name, [("backward", floats(5, slots * width))], |tape| {
        let (gate, up) = (tape.leaf(gate.clone()), tape.leaf(up.clone()));
        swiglu::on_tape(tape, &gate, &up)
    });
    let head = shape.nope + shape.rope;
    let (name, q) = (format!("{of}: {tokens} × {} × {head}", shape.heads), values(&[tokens, shape.heads, head], 4));
    let table = RopeTable::new(shape.rope, 10_000.0, None, tokens);
    let positions: Arc<[u32]> = (0..tokens as u32).map(|i| i % shape.length as u32).collect();
    bench.time("rope", &name, "forward", floats(2, q.numel()), || {
        black_box(rope::forward(&q, shape.nope, &positions, &table));
    });
    bench.backward("rope", &name, [("backward", floats(2, q.numel()))], |tape| {
        let q = tape.leaf(q.clone());
        rope::on_tape(tape, &q, shape.nope, &positions, &table)
    });
    let (rank, latent) = (shape.kv_rank, shape.kv_rank + shape.rope);
    let (name, x) = (format!("{of}: {tokens} × {latent}"), values(&[tokens, latent], 5));
    bench.time("columns split", &name, "forward", floats(2, x.numel()), || {
        black_box(columns::split(&x, rank));
    });
    let (left, right) = columns::split(&x, rank);
    bench.time("columns cat", &name, "forward", floats(2, x.numel()), || {
        black_box(columns::cat(&left, &right));
    });
}

/// Router, dispatch and the weighted way back, balance loss.
pub(crate) fn routing(bench: &mut Bench, shape: &Shape) {
    let (tokens, d, experts, of) = (shape.tokens(), shape.hidden, shape.experts, shape.name);
    let x = values(&[tokens, d], 1);
    let name = format!("{of}: {tokens} × {experts} × {d}");
    let flops = Flops(2.0 * (tokens * experts * d) as f64);
    let gate = param(1, &values(&[experts, d], 2));
    bench.time("router scores", &name, "forward", flops, || {
        black_box(router::scores_forward(&x, &gate.compute));
    });
    bench.backward("router scores", &name, [("input gradient", flops), ("weight gradient", flops)], |tape| {
        let x = tape.leaf(x.clone());
        router::scores_on_tape(tape, &x, &gate)
    });
    let config = router::Config { experts, top_k: TOP_K, groups: 4, top_groups: 2, scale: 2.5, norm_topk: true };
    let (bias, scores) = (vec![0.0; experts], router::scores_forward(&x, &gate.compute));
    let chosen = router::select(&scores, &bias, &config);
    let name = format!("{of}: {tokens} × {TOP_K} of {experts}");
    bench.time("router choice", &name, "forward", floats(1, tokens * (experts + TOP_K)), || {
        black_box(router::select(&scores, &bias, &config));
    });
    bench.time("router gates", &name, "forward", floats(3, tokens * TOP_K), || {
        black_box(router::gates_forward(&scores, &chosen, &config));
    });
    bench.backward("router gates", &name, [("backward", floats(1, tokens * (experts + 3 * TOP_K)))], |tape| {
        let scores = tape.leaf(scores.clone());
        router::gates_on_tape(tape, &scores, &chosen, &config)
    });
    let spans = Spans::uniform(shape.sequences, shape.length);
    bench.time("balance_loss", &name, "forward", floats(1, tokens * experts), || {
        black_box(balance_loss::forward(&scores, &spans, TOP_K));
    });
    bench.backward("balance_loss", &name, [("backward", floats(2, tokens * experts))], |tape| {
        let scores = tape.leaf(scores.clone());
        balance_loss::on_tape(tape, &scores, &spans, TOP_K)
    });
    let gates = router::gates_forward(&scores, &chosen, &config);
    let name = format!("{of}: {tokens} × {d} to {TOP_K} of {experts}");
    bench.time("permute plan", &name, "forward", floats(3, tokens * TOP_K), || {
        black_box(Dispatch::new(&chosen, experts));
    });
    let dispatch = Arc::new(Dispatch::new(&chosen, experts));
    let both = floats(1, tokens * d * (1 + TOP_K));
    bench.time("permute", &name, "forward", both, || {
        black_box(permute::forward(&x, &dispatch));
    });
    bench.backward("permute", &name, [("backward", both)], |tape| {
        let x = tape.leaf(x.clone());
        permute::on_tape(tape, &x, &dispatch)
    });
    let sorted = permute::forward(&x, &dispatch);
    bench.time("permute combine", &name, "forward", both, || {
        black_box(permute::combine_forward(&sorted, &gates, &dispatch));
    });
    let backward = floats(1, tokens * d * (1 + 2 * TOP_K));
    bench.backward("permute combine", &name, [("backward", backward)], |tape| {
        let (sorted, gates) = (tape.leaf(sorted.clone()), tape.leaf(gates.clone()));
        permute::combine_on_tape(tape, &sorted, &gates, &dispatch)
    });
}

/// Embedding and output head.
pub(crate) fn ends(bench: &mut Bench, shape: &Shape) {
    let (tokens, d, vocab, of) = (shape.tokens(), shape.hidden, shape.vocab, shape.name);
    let table = param(2, &values(&[vocab, d], 6));
    let ids: Arc<[u32]> = (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab as u32).collect();
    let name = format!("{of}: {tokens} of {vocab} × {d}");
    bench.time("embedding", &name, "forward", floats(2, tokens * d), || {
        black_box(embedding::forward(&ids, &table.compute));
    });
    bench.backward("embedding", &name, [("backward", floats(3, tokens * d))], |tape| {
        embedding::on_tape(tape, &ids, &table)
    });
    let x = values(&[tokens, d], 1);
    let rows: Vec<u32> = (0..tokens as u32).step_by(2).collect();
    bench.time(
        "gather_rows",
        &format!("{of}: {} of {tokens} × {d}", rows.len()),
        "forward",
        floats(1, tokens * d),
        || {
            black_box(gather_rows::forward(&x, &rows));
        },
    );
    let options = token_logprob::Options { chunk_rows: LOGIT_ROWS, want_entropy: false };
    let name = format!("{of}: {tokens} × {vocab} × {d}");
    let flops = Flops(2.0 * (tokens * vocab * d) as f64);
    bench.time("token_logprob", &name, "forward", flops, || {
        black_box(token_logprob::forward(&x, &table.compute, &ids, options));
    });
    bench.backward("token_logprob", &name, [("backward", Flops(4.0 * (tokens * vocab * d) as f64))], |tape| {
        let x = tape.leaf(x.clone());
        token_logprob::on_tape(tape, &x, &table, &ids, options).0
    });
}
