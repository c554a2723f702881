//! Times linear layers, dense and grouped, at the shapes of the demo recipe: microseconds and GFLOP/s.
//!
//! `cargo bench -p dsv3-ops --bench linear [-- NAME]`, or `RAYON_NUM_THREADS=1 cargo bench ..` for one core.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use dsv3_ops::testing::values;
use dsv3_ops::{
    Fp8, Fp8Format, Fp8Scales, Param, Precision, Tape, Tensor, Weight, WeightGrads, grouped_linear, linear,
};

const FP8: Precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };

/// Prints the best of several runs.
fn time(name: &str, flops: f64, mut work: impl FnMut()) {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if wanted.is_some_and(|wanted| !name.contains(&wanted)) {
        return;
    }
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < 0.2 {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{name:<44} {:>10.1} us {:>8.1} GFLOP/s", best * 1e6, flops / best * 1e-9);
}

/// One layer, or one per expert with `m / experts` rows each; forward alone, then with both backward products.
fn layers(m: usize, n: usize, k: usize, experts: usize) {
    for (label, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16), ("fp8", FP8)] {
        let x = values(&[m, k], 1);
        let dy = values(&[m, n], 2);
        let master = values(&[experts, n, k], 3);
        let offsets: Arc<[usize]> = (0..=experts).map(|e| e * m / experts).collect();
        let w = Param { id: 0, compute: Weight::encode(&master, &precision), master: Some(master) };
        let flops = 2.0 * (m * n * k) as f64;
        time(&format!("forward {experts} of {m} x {n} x {k} {label}"), flops, || {
            black_box(grouped_linear::forward(&x, &offsets, &w.compute));
        });
        let mut weights = WeightGrads::default();
        time(&format!("training {experts} of {m} x {n} x {k} {label}"), 3.0 * flops, || {
            let mut tape = Tape::new();
            let x = tape.leaf(x.clone());
            let y = grouped_linear::on_tape(&mut tape, &x, &offsets, &w);
            black_box(tape.backward(vec![(y.id(), dy.clone())], &mut weights));
        });
    }
}

/// One to a few rows through a prepacked weight, as decoding does.
fn decode(m: usize, n: usize, k: usize) {
    for (label, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16), ("fp8", FP8)] {
        let w = Weight::encode(&values(&[n, k], 3), &precision).prepack();
        let x = values(&[m, k], 1);
        time(&format!("decode {m} x {n} x {k} {label}"), 2.0 * (m * n * k) as f64, || {
            black_box(linear::forward(&x, &w));
        });
    }
}

fn quantise(rows: usize, cols: usize) {
    let x = values(&[rows, cols], 1);
    let offsets: Arc<[usize]> = Arc::new([0, rows]);
    let encoding = Fp8Format::E4m3.forward();
    // In these lines GFLOP/s reads as billions of elements per second.
    let elements = (rows * cols) as f64;
    time(&format!("quantise rows {rows} x {cols}"), elements, || {
        black_box(Fp8::quantize_rows(&x, encoding, Fp8Scales::F32));
    });
    time(&format!("quantise columns {rows} x {cols}"), elements, || {
        black_box(Fp8::quantize_columns(&x, &offsets, encoding, Fp8Scales::F32));
    });
    time(&format!("encode weight {rows} x {cols} fp8"), elements, || {
        black_box(Weight::encode(&x, &FP8));
    });
    let q = Fp8::quantize_rows(&x, encoding, Fp8Scales::F32);
    time(&format!("dequantise rows {rows} x {cols}"), elements, || {
        black_box::<Tensor>(q.dequantize());
    });
}

fn main() {
    dsv3_ops::keep_freed_memory();
    layers(1024, 128, 128, 1);
    layers(1024, 256, 128, 1);
    layers(1024, 96, 128, 1);
    layers(1024, 704, 128, 1);
    layers(4096, 32, 128, 16);
    layers(4096, 128, 32, 16);
    layers(1024, 1024, 1024, 1);
    decode(1, 2048, 2048);
    decode(8, 2048, 2048);
    decode(1, 128, 128);
    quantise(1024, 128);
    quantise(2048, 1024);
}
