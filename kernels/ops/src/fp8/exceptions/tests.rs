//! Each exception by hand, against a plain reference, and what it keeps in memory.

use std::sync::Arc;

use super::*;
use crate::fp8::{E5m6, Encoding, Fp8, Fp8Format};
use crate::testing::values;
use crate::{Param, Precision, Tape, Tensor, Weight, WeightGrads, grouped_linear, swiglu};

const FP8: Precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
const NONE: Exceptions =
    Exceptions { input_power_of_two: false, gradient_power_of_two: false, input_e5m6: false, swiglu_recomputed: false };

fn param(w: &Tensor, precision: Precision, exceptions: Exceptions) -> Param {
    Param { id: 0, master: None, compute: Weight::encode(w, &precision).with_exceptions(exceptions) }
}

/// y, dx and dw of one layer, and the bytes it kept.
fn products(
    [x, w, dy]: [&Tensor; 3],
    offsets: &[usize],
    precision: Precision,
    exceptions: Exceptions,
) -> ([Vec<f32>; 3], usize) {
    let (mut tape, mut grads) = (Tape::new(), WeightGrads::default());
    let x = tape.leaf(x.clone());
    let y = grouped_linear::on_tape(&mut tape, &x, &Arc::from(offsets), &param(w, precision, exceptions));
    let saved = tape.saved_input_bytes();
    let mut inputs = tape.backward(vec![(y.id(), dy.clone())], &mut grads);
    let dx = inputs.take(x.id()).expect("dx").into_f32();
    ([y.value.into_f32(), dx, grads.get(0).expect("dw").clone().into_f32()], saved)
}

/// `[rows, 128]`: every row begins with `first`, the rest is 0.
fn rows(count: usize, first: &[f32]) -> Tensor {
    Tensor::f32(&[count, 128], (0..count * 128).map(|i| first.get(i % 128).copied().unwrap_or(0.0)).collect())
}

/// 448 on the diagonal: scale 1, so products are 448 times what the quantiser made.
fn diagonal() -> Tensor {
    Tensor::f32(&[128, 128], (0..128 * 128).map(|i| if i % 129 == 0 { 448.0 } else { 0.0 }).collect())
}

fn near(a: f32, b: f32) -> bool {
    (a - b).abs() <= 1e-6 * b.abs()
}

#[test]
fn an_outlier_of_672_takes_the_scales_known_by_hand() {
    // amax 672: s = 1.5 makes 34 the code 22, value 33, and keeps 672; s = 2 makes them 16 and 320: values 32 and 640.
    let (x, one) = (rows(1, &[672.0, 34.0]), rows(1, &[448.0]));
    let power = Exceptions { input_power_of_two: true, ..NONE };
    let plain = products([&x, &diagonal(), &one], &[0, 1], FP8, NONE).0;
    let rounded = products([&x, &diagonal(), &one], &[0, 1], FP8, power).0;
    assert_eq!(plain[0][..3], [448.0 * 672.0, 448.0 * 33.0, 0.0]);
    assert_eq!(rounded[0][..3], [448.0 * 640.0, 448.0 * 32.0, 0.0]);
    // The weight gradient requantises what was kept: 33 and 672 under other scales, 32 and 640 without loss.
    assert!(near(plain[2][0], 448.0 * 672.0) && near(plain[2][1], 448.0 * 33.0));
    assert_eq!(rounded[2][..3], [448.0 * 640.0, 448.0 * 32.0, 0.0]);
    assert_eq!(plain[1], rounded[1], "the input gradient reads no input");
}

#[test]
fn a_gradient_of_672_takes_the_scales_known_by_hand() {
    let (x, dy) = (rows(1, &[448.0]), rows(1, &[672.0, 34.0]));
    let power = Exceptions { gradient_power_of_two: true, ..NONE };
    let plain = products([&x, &diagonal(), &dy], &[0, 1], FP8, NONE).0;
    let rounded = products([&x, &diagonal(), &dy], &[0, 1], FP8, power).0;
    assert_eq!(plain[1][..3], [448.0 * 672.0, 448.0 * 33.0, 0.0]);
    assert_eq!(rounded[1][..3], [448.0 * 640.0, 448.0 * 32.0, 0.0]);
    // 128×1 tiles come from the f32 gradient: 34 alone in its tile keeps its value, or at s = 2^-3 is a tie that goes to 32.
    assert!(near(plain[2][0], 448.0 * 672.0) && near(plain[2][128], 448.0 * 34.0));
    assert_eq!([rounded[2][0], rounded[2][128]], [448.0 * 640.0, 448.0 * 32.0]);
    assert_eq!(plain[0], rounded[0], "the forward product reads no gradient");
}

#[test]
fn e5m6_keeps_what_e4m3_loses_beside_an_outlier() {
    // Beside 448, E4M3 has no code for 2^-11 and the weight gradient no trace of it; E5M6 keeps it to the last bit.
    let (x, dy) = (rows(128, &[448.0, 2f32.powi(-11)]), rows(128, &[448.0]));
    let cached = Exceptions { input_e5m6: true, ..NONE };
    let (plain, plain_bytes) = products([&x, &diagonal(), &dy], &[0, 128], FP8, NONE);
    let (e5m6, e5m6_bytes) = products([&x, &diagonal(), &dy], &[0, 128], FP8, cached);
    assert_eq!((plain[2][1], e5m6[2][1]), (0.0, 128.0 * 448.0 * 2f32.powi(-11)));
    assert!(plain[0] == e5m6[0] && plain[1] == e5m6[1], "forward and input gradient read E4M3 as before");
    assert_eq!((plain_bytes, e5m6_bytes), (128 * 128 + 128 * 4, 128 * 192 + 128));
}

/// The products of the recipe, from the public quantisers and plain loops in f64.
fn expected(
    [x, w, dy]: [&Tensor; 3],
    offsets: &Arc<[usize]>,
    format: Fp8Format,
    scales: Fp8Scales,
    exceptions: Exceptions,
) -> [Vec<f64>; 3] {
    let power = |on: bool| if on { Fp8Scales::Ue8m0 } else { scales };
    let (forward, backward) = (format.forward(), format.backward());
    let row_x = Fp8::quantize_rows(x, forward, power(exceptions.input_power_of_two)).dequantize();
    let kept = if exceptions.input_e5m6 { E5m6::quantize_rows(x).dequantize() } else { row_x.clone() };
    let requantised = power(exceptions.input_power_of_two || exceptions.input_e5m6);
    let col_x = Fp8::quantize_columns(&kept, offsets, forward, requantised).dequantize();
    let row_dy = Fp8::quantize_rows(dy, backward, power(exceptions.gradient_power_of_two)).dequantize();
    let col_dy = Fp8::quantize_columns(dy, offsets, backward, power(exceptions.gradient_power_of_two)).dequantize();
    let w_hat = Fp8::quantize_blocks(w, forward, scales).dequantize();
    plain_products([&row_x, &col_x, &w_hat, &row_dy, &col_dy].map(Tensor::as_f32), offsets, w.shape())
}

fn plain_products(
    [row_x, col_x, w, row_dy, col_dy]: [&[f32]; 5],
    offsets: &[usize],
    w_shape: &[usize],
) -> [Vec<f64>; 3] {
    let (n, k) = (w_shape[1], w_shape[2]);
    let [mut y, mut dx, mut dw] = [row_dy.len(), row_x.len(), w.len()].map(|len| vec![0f64; len]);
    for e in 0..offsets.len() - 1 {
        for row in offsets[e]..offsets[e + 1] {
            for (j, i) in (0..n).flat_map(|j| (0..k).map(move |i| (j, i))) {
                let (at, x, g) = ((e * n + j) * k + i, row * k + i, row * n + j);
                y[g] += f64::from(row_x[x]) * f64::from(w[at]);
                dx[x] += f64::from(row_dy[g]) * f64::from(w[at]);
                dw[at] += f64::from(col_dy[g]) * f64::from(col_x[x]);
            }
        }
    }
    [y, dx, dw]
}

fn close(computed: &[f32], expected: &[f64]) -> bool {
    let error: f64 = computed.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    error.sqrt() < 1e-6 * expected.iter().map(|b| b * b).sum::<f64>().sqrt()
}

/// Values over many binades, so that scales and codes differ from tile to tile.
fn spread(shape: &[usize], seed: u64) -> Tensor {
    let data = values(shape, seed).into_f32().into_iter().enumerate();
    Tensor::f32(shape, data.map(|(i, x)| x * 2f32.powi((i * 7 % 23) as i32 - 11)).collect())
}

#[test]
fn every_combination_follows_the_recipe() {
    // Ragged widths, an expert without rows, one with a single row.
    let offsets: Arc<[usize]> = Arc::new([0, 150, 150, 151, 300]);
    let (x, w, dy) = (spread(&[300, 141], 1), values(&[4, 33, 141], 2), spread(&[300, 33], 3));
    let all = [&x, &w, &dy];
    for combination in 0..8 {
        let exceptions = Exceptions {
            input_power_of_two: combination & 1 > 0,
            gradient_power_of_two: combination & 2 > 0,
            input_e5m6: combination & 4 > 0,
            ..NONE
        };
        for (format, scales) in [(Fp8Format::E4m3, Fp8Scales::F32), (Fp8Format::Hybrid, Fp8Scales::Ue8m0)] {
            let (found, saved) = products(all, &offsets, Precision::Fp8 { format, scales }, exceptions);
            let wanted = expected(all, &offsets, format, scales, exceptions);
            for (i, name) in ["y", "dx", "dw"].into_iter().enumerate() {
                assert!(close(&found[i], &wanted[i]), "{name} of {exceptions:?} {format:?} {scales:?}");
            }
            // 141 columns are two tiles: 212 bytes of E5M6 with two of scales, 141 of FP8 with eight.
            assert_eq!(saved, 300 * if exceptions.input_e5m6 { 214 } else { 149 });
        }
        let bf16 = |exceptions| products(all, &offsets, Precision::Bf16, exceptions);
        assert_eq!(bf16(exceptions), bf16(NONE), "only FP8 has exceptions");
    }
}

#[test]
fn requantising_powers_of_two_loses_only_subnormals() {
    let (x, offsets): (_, Arc<[usize]>) = (spread(&[200, 130], 4), Arc::new([0, 200]));
    let lost = |scales: Fp8Scales| {
        let rows = Fp8::quantize_rows(&x, Encoding::E4m3, scales).dequantize();
        let columns = Fp8::quantize_columns(&rows, &offsets, Encoding::E4m3, scales);
        let back = columns.dequantize();
        let pairs = rows.as_f32().iter().zip(back.as_f32()).enumerate();
        // Tiles begin at rows 0 and 128; the smallest normal value of a tile is 2^-6 of its scale.
        let normal = |i: usize, x: f32| x.abs() >= columns.scales.as_f32()[i / 130 / 128 * 130 + i % 130] / 64.0;
        pairs.filter(|(i, (a, b))| normal(*i, **a) && a != b).count()
    };
    assert_eq!(lost(Fp8Scales::Ue8m0), 0);
    assert!(lost(Fp8Scales::F32) > 1000, "with plain scales most values move");
}

/// SwiGLU of `g` and `u` through a down projection: y, dg, du, dw, and the bytes kept by both.
fn mlp([g, u, w, dy]: [&Tensor; 4], offsets: &Arc<[usize]>, cached: bool, late: bool) -> ([Vec<f32>; 4], [usize; 2]) {
    let (mut tape, mut grads) = (Tape::new(), WeightGrads::default());
    let (g, u) = (tape.leaf(g.clone()), tape.leaf(u.clone()));
    let down = param(w, FP8, NONE);
    let y = if cached {
        let (inner, cached) = swiglu::on_tape_cached(&mut tape, &g, &u, FP8);
        grouped_linear::on_tape_recomputed(&mut tape, &inner, cached.expect("a recording tape"), offsets, &down)
    } else {
        let inner = swiglu::on_tape(&mut tape, &g, &u);
        grouped_linear::on_tape(&mut tape, &inner, offsets, &down)
    };
    let saved = [tape.saved_swiglu_bytes(), tape.saved_input_bytes()];
    let seed = vec![(y.id(), dy.clone())];
    let mut inputs = if late { tape.backward_inputs(seed) } else { tape.backward(seed, &mut grads) };
    tape.run_deferred(usize::MAX, &mut grads);
    let [dg, du] = [&g, &u].map(|x| inputs.take(x.id()).expect("a gradient").into_f32());
    ([y.value.into_f32(), dg, du, grads.get(0).expect("dw").clone().into_f32()], saved)
}

#[test]
fn swiglu_is_computed_again_from_its_fp8_inputs() {
    let offsets: Arc<[usize]> = Arc::new([0, 150, 150, 151, 300]);
    for k in [128, 141, 256] {
        let [g, u, w, dy] = [spread(&[300, k], 1), spread(&[300, k], 2), values(&[4, 33, k], 3), spread(&[300, 33], 4)];
        let all = [&g, &u, &w, &dy];
        let (exact, exact_bytes) = mlp(all, &offsets, false, false);
        let (found, bytes) = mlp(all, &offsets, true, false);
        assert_eq!(found[0], exact[0], "the forward product is the same");
        // The reference: the same layers on ĝ and û, and a weight gradient of their SwiGLU in 128×1 tiles.
        let [g_hat, u_hat] = [&g, &u].map(|x| Fp8::quantize_rows(x, Encoding::E4m3, Fp8Scales::F32).dequantize());
        let of_hats = mlp([&g_hat, &u_hat, &w, &dy], &offsets, false, false).0;
        assert!(found[1] == of_hats[1] && found[2] == of_hats[2], "dg and du are those of the kept values");
        assert!(found[1] != exact[1] && found[2] != exact[2] && found[3] != exact[3]);
        let columns = |x: &Tensor| Fp8::quantize_columns(x, &offsets, Encoding::E4m3, Fp8Scales::F32).dequantize();
        let [col_x, col_dy] = [columns(&swiglu::forward(&g_hat, &u_hat)), columns(&dy)];
        let [x, dy] = [&col_x, &col_dy].map(Tensor::as_f32);
        let [_, _, dw] = plain_products([x, x, w.as_f32(), dy, dy], &offsets, w.shape());
        assert!(close(&found[3], &dw), "dw at width {k}");
        // Two cached elements for each of the inner width, 1 byte and 4/128 (ragged: 4/w) of scale each.
        let elements = 2 * 300 * k;
        assert_eq!((bytes, exact_bytes[0]), ([elements + 2 * 300 * k.div_ceil(128) * 4, 0], 4 * elements));
        assert!(k % 128 > 0 || bytes[0] as f64 <= 1.05 * elements as f64);
        assert_eq!(exact_bytes[1], 300 * (k + k.div_ceil(128) * 4), "without the cache the down projection keeps y");
    }
}

#[test]
fn threads_and_waiting_weight_gradients_change_no_bit() {
    let offsets: Arc<[usize]> = Arc::new([0, 700, 700, 701, 1100]);
    let [x, w, dy] = [spread(&[1100, 141], 1), values(&[4, 72, 141], 2), spread(&[1100, 72], 3)];
    let every = Exceptions { input_power_of_two: true, gradient_power_of_two: true, input_e5m6: true, ..NONE };
    let run = |threads: usize, late: bool| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let layer = || products([&x, &w, &dy], &offsets, FP8, every).0;
        let (layer, mlp) = pool.install(|| (layer(), mlp([&x, &x, &w, &dy], &offsets, true, late).0));
        layer.into_iter().chain(mlp).flatten().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = run(1, false);
    assert!(one == run(2, true) && one == run(3, false));
}

#[test]
fn nothing_and_one_token_pass() {
    for (count, offsets) in [(0, [0, 0, 0]), (1, [0, 1, 1]), (1, [0, 0, 1])] {
        let offsets: Arc<[usize]> = Arc::new(offsets);
        let [x, w, dy] = [spread(&[count, 5], 1), values(&[2, 3, 5], 2), spread(&[count, 3], 3)];
        let (mut tape, mut grads) = (Tape::new(), WeightGrads::default());
        let (g, u) = (tape.leaf(x.clone()), tape.leaf(x.clone()));
        let (inner, cached) = swiglu::on_tape_cached(&mut tape, &g, &u, FP8);
        let down = param(&w, FP8, NONE);
        let y = grouped_linear::on_tape_recomputed(&mut tape, &inner, cached.expect("codes"), &offsets, &down);
        tape.backward(vec![(y.id(), dy.clone())], &mut grads);
        let e5m6 = products([&x, &w, &dy], &offsets, FP8, Exceptions { input_e5m6: true, ..NONE });
        assert_eq!((y.value.numel(), e5m6.1), (count * 3, count * 9));
        assert!(e5m6.0.iter().flatten().all(|x| x.is_finite()));
    }
    let mut quiet = Tape::inference();
    let x = quiet.leaf(spread(&[2, 5], 1));
    assert!(swiglu::on_tape_cached(&mut quiet, &x, &x, FP8).1.is_none(), "inference keeps nothing");
    assert!(swiglu::on_tape_cached(&mut Tape::new(), &x, &x, Precision::Bf16).1.is_none(), "nor does BF16");
}
