//! Linear layers, dense and per expert, in every precision; few rows through a prepacked weight, as decoding does; the
//! quantisers.

use std::hint::black_box;
use std::sync::Arc;

use dsv3_ops::testing::values;
use dsv3_ops::{Fp8, Fp8Format, Fp8Scales, Param, Precision, Tensor, Weight, grouped_linear, linear};

use crate::harness::Amount::{Bytes, Flops};
use crate::harness::Bench;
use crate::shapes::{Shape, TOP_K};

const FP8: Precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
const PRECISIONS: [(&str, Precision); 3] = [("f32", Precision::F32), ("bf16", Precision::Bf16), ("fp8", FP8)];
/// Weights that decoding reads in turn take at least this much together, beyond the caches.
const DECODED_BYTES: usize = 192 << 20;

/// Three layers: the output projection of attention and both directions of the dense MLP.
pub(crate) fn linear(bench: &mut Bench, shape: &Shape) {
    let d = shape.hidden;
    for (n, k) in [(d, shape.heads * shape.value), (shape.dense, d), (d, shape.dense)] {
        layer(bench, shape, 1, shape.tokens(), n, k);
    }
}

/// Both directions of the experts, every expert with as many rows as any other.
pub(crate) fn experts(bench: &mut Bench, shape: &Shape) {
    for (n, k) in [(shape.expert, shape.hidden), (shape.hidden, shape.expert)] {
        layer(bench, shape, shape.experts, shape.tokens() * TOP_K, n, k);
    }
}

/// `[m, k]` rows through `experts` weights of `[n, k]`.
fn layer(bench: &mut Bench, shape: &Shape, experts: usize, m: usize, n: usize, k: usize) {
    let name = format!("{}: {m} × {n} × {k}", shape.name);
    let flops = Flops(2.0 * (m * n * k) as f64);
    let passes = ["forward", "input gradient", "weight gradient"];
    for (label, precision) in PRECISIONS {
        let op = format!("{} {label}", if experts > 1 { "grouped_linear" } else { "linear" });
        if !bench.wants(&op, &name, &passes) {
            continue;
        }
        let x = values(&[m, k], 1);
        let master = values(&[experts, n, k], 3);
        let master = if experts > 1 { master } else { Tensor::f32(&[n, k], master.as_f32().to_vec()) };
        let w = Param { id: 0, compute: Weight::encode(&master, &precision), master: Some(master) };
        let offsets: Arc<[usize]> = (0..=experts).map(|e| e * m / experts).collect();
        bench.time(&op, &name, passes[0], flops, || {
            black_box(if experts > 1 {
                grouped_linear::forward(&x, &offsets, &w.compute)
            } else {
                linear::forward(&x, &w.compute)
            });
        });
        bench.backward(&op, &name, [(passes[1], flops), (passes[2], flops)], |tape| {
            let x = tape.leaf(x.clone());
            if experts > 1 { grouped_linear::on_tape(tape, &x, &offsets, &w) } else { linear::on_tape(tape, &x, &w) }
        });
    }
}

/// Layers of `L` that read their weights from memory: the output head, and the experts of one layer that a step touches.
pub(crate) fn decoding(bench: &mut Bench) {
    let (vocab, d, expert, experts) = (16_384, 1024, 512, 64);
    for rows in [1, 8] {
        for (label, precision) in PRECISIONS {
            decode_dense(bench, rows, vocab, d, label, precision);
            decode_experts(bench, rows, experts, expert, d, label, precision);
        }
    }
}

fn decode_dense(bench: &mut Bench, rows: usize, n: usize, k: usize, label: &str, precision: Precision) {
    let (op, name) = (format!("linear {label}, prepacked"), format!("L: {rows} × {n} × {k}"));
    if !bench.wants(&op, &name, &["decoding"]) {
        return;
    }
    let (x, master) = (values(&[rows, k], 1), values(&[n, k], 3));
    let bytes = Weight::encode(&master, &precision).bytes();
    let weights: Vec<Weight> =
        (0..DECODED_BYTES.div_ceil(bytes)).map(|_| Weight::encode(&master, &precision).prepack()).collect();
    let mut turn = weights.iter().cycle();
    bench.time(&op, &name, "decoding", Bytes(bytes as f64), || {
        black_box(linear::forward(&x, turn.next().unwrap_or(&weights[0])));
    });
}

/// Every row goes to [`TOP_K`] experts, spread evenly; the next call takes other experts.
fn decode_experts(
    bench: &mut Bench,
    rows: usize,
    experts: usize,
    n: usize,
    k: usize,
    label: &str,
    precision: Precision,
) {
    let (op, name) = (format!("grouped_linear {label}, prepacked"), format!("L: {rows} × 4 of {experts} × {n} × {k}"));
    if !bench.wants(&op, &name, &["decoding"]) {
        return;
    }
    let (x, master) = (values(&[rows * TOP_K, k], 1), values(&[experts, n, k], 3));
    let bytes = Weight::encode(&master, &precision).bytes();
    let weights: Vec<Weight> =
        (0..DECODED_BYTES.div_ceil(bytes)).map(|_| Weight::encode(&master, &precision).prepack()).collect();
    let touched = rows * TOP_K;
    let mut call = 0;
    bench.time(&op, &name, "decoding", Bytes((bytes * touched / experts) as f64), || {
        let first = call * touched;
        let begin = first % experts;
        let offsets: Vec<usize> = (0..=experts).map(|e| e.saturating_sub(begin).min(touched)).collect();
        black_box(grouped_linear::forward(&x, &offsets, &weights[first / experts % weights.len()]));
        call += 1;
    });
}

/// Activations and weights into codes and back.
pub(crate) fn quantisers(bench: &mut Bench, shape: &Shape) {
    let (rows, cols) = (shape.tokens(), shape.hidden);
    let name = format!("{}: {rows} × {cols}", shape.name);
    let passes = ["rows of 1×128", "columns of 128×1", "blocks of 128×128", "back to f32"];
    if !bench.wants("quantise fp8", &name, &passes) {
        return;
    }
    let x = values(&[rows, cols], 1);
    let offsets: Arc<[usize]> = Arc::new([0, rows]);
    let encoding = Fp8Format::E4m3.forward();
    // Four bytes read and one written, or the reverse; scales are a thirtieth of the codes at most.
    let bytes = Bytes(5.0 * (rows * cols) as f64);
    bench.time("quantise fp8", &name, passes[0], bytes, || {
        black_box(Fp8::quantize_rows(&x, encoding, Fp8Scales::F32));
    });
    bench.time("quantise fp8", &name, passes[1], bytes, || {
        black_box(Fp8::quantize_columns(&x, &offsets, encoding, Fp8Scales::F32));
    });
    bench.time("quantise fp8", &name, passes[2], bytes, || {
        black_box(Fp8::quantize_blocks(&x, encoding, Fp8Scales::F32));
    });
    let codes = Fp8::quantize_rows(&x, encoding, Fp8Scales::F32);
    bench.time("quantise fp8", &name, passes[3], bytes, || {
        black_box(codes.dequantize());
    });
}
