//! Path against path: instruction sets, row counts, threads and encodings give the same bits.

use std::sync::Arc;

use super::*;
use crate::fp8::{self, Encoding, TILE};
use crate::testing::values;
use crate::weight::CodeOperand;
use crate::{Fp8, Fp8Format, Fp8Scales, Precision, Tensor, Weight, grouped_linear, linear};

/// The numerics rule as it is written.
fn reference(p: (usize, usize, usize), a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, accumulate: bool) {
    let (m, n, k) = p;
    for i in 0..m {
        for j in 0..n {
            let mut total = accumulate.then(|| c[i * c_stride + j]);
            for block in (0..k).step_by(BLOCK_K) {
                let sum = (block..(block + BLOCK_K).min(k)).fold(0f32, |acc, p| {
                    a.data[i * a.row_stride + p * a.col_stride]
                        .mul_add(b.data[p * b.row_stride + j * b.col_stride], acc)
                });
                total = Some(total.map_or(sum, |t| t + sum));
            }
            c[i * c_stride + j] = total.unwrap_or(0.0);
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(work)
}

#[test]
fn every_instruction_set_and_stride_follows_the_rule() {
    let sizes = [
        (1, 1, 1),
        (1, 32, 128),
        (3, 33, 129),
        (8, 64, 64),
        (9, 31, 300),
        (130, 70, 17),
        (5, 40, 0),
        (0, 8, 8),
        (101, 289, 257),
    ];
    for (m, n, k) in sizes {
        let a = values(&[m.max(k), m.max(k) + 3], 1);
        let b = values(&[n.max(k), n.max(k) + 3], 2);
        let start = values(&[m, n + 5], 3);
        let (wide_a, wide_b) = (m.max(k) + 3, n.max(k) + 3);
        let lefts = [Mat::rows(a.as_f32(), wide_a), Mat::transposed(a.as_f32(), wide_a)];
        let odd = values(&[2 * n.max(k) * (n.max(k) + 1)], 4);
        let rights = [
            Mat::rows(b.as_f32(), wide_b),
            Mat::transposed(b.as_f32(), wide_b),
            Mat { data: odd.as_f32(), row_stride: 2 * n + 2, col_stride: 2 },
        ];
        for (a, b) in lefts.iter().flat_map(|a| rights.iter().map(move |b| (*a, *b))) {
            if !b.holds(k, n) {
                continue;
            }
            for accumulate in [false, true] {
                let mut expected = start.as_f32().to_vec();
                reference((m, n, k), a, b, &mut expected, n + 5, accumulate);
                for isa in Isa::all() {
                    let mut c = start.as_f32().to_vec();
                    run(isa, &mut [Product { m, n, k, a, b: &b, c: &mut c, c_stride: n + 5, accumulate }]);
                    assert_eq!(bits(&c), bits(&expected), "{isa:?} {m} x {n} x {k}, accumulate {accumulate}");
                }
            }
        }
    }
}

#[test]
fn threads_and_batches_do_not_change_bits() {
    let (m, n, k) = (700, 352, 200);
    let a = values(&[m, k], 1);
    let b = values(&[n, k], 2);
    let (a, b) = (Mat::rows(a.as_f32(), k), Mat::transposed(b.as_f32(), k));
    let product = |threads| {
        in_pool(threads, || {
            let mut c = vec![0.0; m * n];
            gemm(m, n, k, a, b, &mut c, n, false);
            c
        })
    };
    let one = product(1);
    assert_eq!(bits(&one), bits(&product(2)));
    assert_eq!(bits(&one), bits(&product(7)));
    let mut row = vec![0.0; n];
    for i in [0, 1, 350, 699] {
        let (a, c) = (Mat::rows(&a.data[i * k..], k), &mut row[..]);
        run_serial(Product { m: 1, n, k, a, b: &b, c, c_stride: n, accumulate: false });
        assert_eq!(bits(&row), bits(&one[i * n..(i + 1) * n]));
    }
}

fn precisions() -> Vec<Precision> {
    let mut all = vec![Precision::F32, Precision::Bf16];
    for format in [crate::Fp8Format::E4m3, crate::Fp8Format::E5m2, crate::Fp8Format::Hybrid] {
        for scales in [crate::Fp8Scales::F32, crate::Fp8Scales::Ue8m0] {
            all.push(Precision::Fp8 { format, scales });
        }
    }
    all
}

#[test]
fn weights_read_the_same_packed_or_not_and_row_by_row() {
    for (n, k) in [(150, 300), (32, 64), (7, 5)] {
        for precision in precisions() {
            let weight = Weight::encode(&values(&[n, k], 5), &precision);
            let x = values(&[40, k], 6);
            let y = linear::forward(&x, &weight);
            let packed = weight.prepack();
            assert_eq!(bits(y.as_f32()), bits(linear::forward(&x, &packed).as_f32()));
            assert_eq!(bits(weight.dequantize().as_f32()), bits(packed.dequantize().as_f32()));
            for row in [0, 39] {
                let one = Tensor::f32(&[1, k], x.as_f32()[row * k..(row + 1) * k].to_vec());
                let expected = bits(&y.as_f32()[row * n..(row + 1) * n]);
                assert_eq!(bits(linear::forward(&one, &packed).as_f32()), expected);
                assert_eq!(bits(linear::forward(&one, &weight).as_f32()), expected);
            }
            if precision == Precision::F32 {
                let mut plain = vec![0.0; 40 * n];
                let w = Mat::transposed(weight.plain(), k);
                reference((40, n, k), Mat::rows(x.as_f32(), k), w, &mut plain, n, false);
                assert_eq!(bits(&plain), bits(y.as_f32()));
            }
            let gathered = weight.gather_rows(&[3, 0]);
            assert_eq!(&gathered.as_f32()[..k], &weight.dequantize().as_f32()[3 * k..4 * k]);
        }
    }
}

#[test]
fn an_expert_sees_only_its_rows() {
    let (experts, n, k) = (5, 48, 130);
    let offsets = [0usize, 3, 3, 170, 171, 171];
    for precision in precisions() {
        let weight = Weight::encode(&values(&[experts, n, k], 5), &precision);
        let packed = weight.prepack();
        let x = values(&[171, k], 6);
        let y = grouped_linear::forward(&x, &offsets, &weight);
        assert_eq!(bits(y.as_f32()), bits(grouped_linear::forward(&x, &offsets, &packed).as_f32()));
        let all = weight.dequantize();
        for e in 0..experts {
            let range = offsets[e]..offsets[e + 1];
            let rows = Tensor::f32(&[range.len(), k], x.as_f32()[range.start * k..range.end * k].to_vec());
            let mut expected = vec![0.0; range.len() * n];
            let sizes = (range.len(), n, k);
            if let Precision::Fp8 { format, scales } = precision {
                let a = Fp8::quantize_rows(&rows, format.forward(), scales);
                let (codes, scales) = weight.fp8_parts().expect("FP8");
                let (codes, tiles) = (&codes.as_u8()[e * n * k..], n.div_ceil(TILE) * k.div_ceil(TILE));
                let b = (codes, &scales.as_f32()[e * tiles..]);
                reference_codes(sizes, (a.codes.as_u8(), a.scales.as_f32()), b, format.forward(), &mut expected);
            } else {
                let values = crate::activation::input_values(&rows, weight.rounding());
                let w = Mat::transposed(&all.as_f32()[e * n * k..(e + 1) * n * k], k);
                reference(sizes, Mat::rows(values.as_f32(), k), w, &mut expected, n, false);
            }
            assert_eq!(bits(&expected), bits(&y.as_f32()[range.start * n..range.end * n]), "{precision:?} expert {e}");
        }
    }
}

/// The rule of a product of codes by plain loops: `a` in tiles of 1×128, `b` `[n, k]` in blocks of 128×128.
fn reference_codes(
    (m, n, k): (usize, usize, usize),
    (a, a_scales): (&[u8], &[f32]),
    (b, b_scales): (&[u8], &[f32]),
    encoding: Encoding,
    c: &mut [f32],
) {
    let tiles = k.div_ceil(TILE);
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        c[i * n + j] = 0.0;
        for block in 0..tiles {
            let mut chain = 0.0f32;
            for p in block * TILE..((block + 1) * TILE).min(k) {
                chain = encoding.decode(a[i * k + p]).mul_add(encoding.decode(b[j * k + p]), chain);
            }
            let sum = chain * a_scales[i * tiles + block] * b_scales[j / TILE * tiles + block];
            c[i * n + j] = if block == 0 { sum } else { c[i * n + j] + sum };
        }
    }
}

/// Forms that `isa` multiplies.
fn forms(isa: Isa) -> Vec<Form> {
    if isa.has_bf16_dot() { vec![Form::F32, Form::Pairs] } else { vec![Form::F32] }
}

/// Rows of codes as words.
fn words(isa: Isa, codes: &[u8], k: usize, encoding: Encoding, form: Form) -> Vec<f32> {
    let mut out = vec![0.0; codes.len() / k * form.words(k)];
    for (codes, out) in codes.chunks(k).zip(out.chunks_mut(form.words(k))) {
        match form {
            Form::F32 => fp8::decode_run(isa, codes, encoding, 1.0, out),
            Form::Pairs => fp8::pairs_along(isa, codes, encoding, false, out),
        }
    }
    out
}

#[test]
fn products_of_codes_have_the_same_bits_in_every_form_on_every_set() {
    for (m, n, k) in [(1, 1, 1), (1, 40, 130), (3, 33, 257), (70, 150, 300), (9, 32, 128), (5, 7, 3)] {
        for format in [Fp8Format::E4m3, Fp8Format::E5m2] {
            let encoding = format.forward();
            let precision = Precision::Fp8 { format, scales: Fp8Scales::F32 };
            let x = Fp8::quantize_rows(&values(&[m, k], 1), encoding, Fp8Scales::F32);
            let weight = Weight::encode(&values(&[n, k], 2), &precision);
            let (codes, scales) = weight.fp8_parts().expect("FP8");
            let mut expected = vec![0.0; m * n];
            let (a, b) = ((x.codes.as_u8(), x.scales.as_f32()), (codes.as_u8(), scales.as_f32()));
            reference_codes((m, n, k), a, b, encoding, &mut expected);
            for isa in Isa::all() {
                for (form, weight) in forms(isa).into_iter().flat_map(|f| [(f, weight.clone()), (f, weight.prepack())])
                {
                    let a = words(isa, x.codes.as_u8(), k, encoding, form);
                    let (b, width) = (CodeOperand::new(&weight, 0, true, form), form.words(k));
                    let mut c = vec![f32::NAN; m * n];
                    let a = Mat::rows(&a, width);
                    let product = Product { m, n, k: width, a, b: &b, c: &mut c, c_stride: n, accumulate: false };
                    let tiles = k.div_ceil(TILE);
                    let row_scales = RowScales { data: x.scales.as_f32(), row_stride: tiles, block_stride: 1 };
                    run_codes(isa, &mut [CodeProduct { product, form, row_scales }]);
                    assert_eq!(bits(&c), bits(&expected), "{m} x {n} x {k}, {format:?}, {isa:?}, {form:?}");
                }
            }
        }
    }
}

#[test]
fn gradients_of_codes_have_the_same_bits_in_every_form_on_every_set() {
    let offsets: Arc<[usize]> = Arc::new([0, 5, 5, 140, 301]);
    let (slots, n, k) = (301, 70, 45);
    let (x, dy) = (values(&[slots, k], 1), values(&[slots, n], 2));
    let w =
        Weight::encode(&values(&[4, n, k], 3), &Precision::Fp8 { format: Fp8Format::Hybrid, scales: Fp8Scales::F32 });
    let mut all = Vec::new();
    for (isa, form) in Isa::all().into_iter().flat_map(|isa| forms(isa).into_iter().map(move |form| (isa, form))) {
        let rows = Fp8::quantize_rows(&dy, Encoding::E5m2, Fp8Scales::F32);
        let dy_words = words(isa, rows.codes.as_u8(), n, Encoding::E5m2, form);
        let (width, tiles) = (form.words(n), n.div_ceil(TILE));
        for weight in [w.clone(), w.prepack()] {
            let mut dx = vec![0.0; slots * k];
            for (e, range) in offsets.windows(2).enumerate() {
                let b = CodeOperand::new(&weight, e, false, form);
                let a = Mat::rows(&dy_words[range[0] * width..range[1] * width], width);
                let (m, c) = (range[1] - range[0], &mut dx[range[0] * k..range[1] * k]);
                let product = Product { m, n: k, k: width, a, b: &b, c, c_stride: k, accumulate: false };
                let data = &rows.scales.as_f32()[range[0] * tiles..];
                let row_scales = RowScales { data, row_stride: tiles, block_stride: 1 };
                run_codes(isa, &mut [CodeProduct { product, form, row_scales }]);
            }
            all.push(bits(&dx));
        }
        let columns = |of: &Tensor, encoding| {
            let rule = fp8::Rule { encoding, scales: Fp8Scales::F32, view: fp8::View::Words(form) };
            fp8::words_of_columns(fp8::Source::Plain(of.as_f32()), of.cols(), &offsets, rule, &mut [])
        };
        let ((a, a_scales), (b, b_scales)) = (columns(&dy, Encoding::E5m2), columns(&x, Encoding::E4m3));
        // The last expert alone: 161 tokens, two tiles.
        let (tokens, first_tile) = (161, 3);
        let words = form.words(tokens);
        let b = &b[b.len() - words * k..];
        let b = Scaled { words: Mat::rows(b, k), scales: &b_scales[first_tile * k..], n: k };
        let a = Mat::transposed(&a[a.len() - words * n..], n);
        let mut dw = vec![0.25; n * k];
        let product = Product { m: n, n: k, k: words, a, b: &b, c: &mut dw, c_stride: k, accumulate: true };
        let row_scales = RowScales { data: &a_scales[first_tile * n..], row_stride: 1, block_stride: n };
        run_codes(isa, &mut [CodeProduct { product, form, row_scales }]);
        all.push(bits(&dw));
    }
    for results in all.chunks(3) {
        assert_eq!(results[0], results[1], "row layout and panels");
        assert_eq!(results, &all[..3]);
    }
}
