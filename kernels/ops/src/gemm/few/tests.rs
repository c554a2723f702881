//! Every number of rows gives the bits of the written rule, on odd sizes and in every encoding.

use super::super::{BLOCK_K, Mat, Product, Right, run};
use super::*;
use crate::fp8::TILE;
use crate::testing::values;
use crate::weight::{Element, Operand};
use crate::{Fp8Format, Fp8Scales, Precision, Weight};

const SIZES: [(usize, usize); 6] = [(1, 1), (32, 128), (33, 129), (70, 300), (160, 255), (31, 2)];

const FP8: Precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Chains of 128, added in order; `scale(block)` multiplies their sums.
fn chain(a: &[f32], b: &[f32], start: Option<f32>, scale: impl Fn(usize, f32) -> f32) -> f32 {
    let blocks = a.chunks(BLOCK_K).zip(b.chunks(BLOCK_K)).enumerate();
    let sums = blocks.map(|(i, (a, b))| scale(i, a.iter().zip(b).fold(0f32, |acc, (a, b)| a.mul_add(*b, acc))));
    sums.fold(start, |total, sum| Some(total.map_or(sum, |total| total + sum))).unwrap_or(0.0)
}

#[test]
fn weights_as_values() {
    for ((n, k), precision) in SIZES.into_iter().flat_map(|s| [(s, Precision::F32), (s, Precision::Bf16), (s, FP8)]) {
        let weight = Weight::encode(&values(&[2, n, k], 1), &precision);
        let (dense, packed) = (weight.dequantize(), weight.prepack());
        let b = &Operand::forward(&packed, 1);
        assert!(b.prepacked().is_some());
        for m in (1..=9).chain([16, 17]) {
            let (a, start) = (values(&[m, k + 3], 2), values(&[m, n + 1], 3));
            for accumulate in [false, true] {
                let mut expected = start.as_f32().to_vec();
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let c = &mut expected[i * (n + 1) + j];
                    let (a, b) = (&a.as_f32()[i * (k + 3)..][..k], &dense.as_f32()[(n + j) * k..][..k]);
                    *c = chain(a, b, accumulate.then_some(*c), |_, sum| sum);
                }
                for isa in Isa::all() {
                    let (a, mut c) = (Mat::rows(a.as_f32(), k + 3), start.as_f32().to_vec());
                    run(isa, &mut [Product { m, n, k, a, b, c: &mut c, c_stride: n + 1, accumulate }]);
                    assert_eq!(bits(&c), bits(&expected), "{precision:?} {m} x {n} x {k} {isa:?}");
                }
            }
        }
    }
}

/// Values as words of pairs: the first in the upper half.
fn pairs(row: &[f32]) -> Vec<f32> {
    let word = |two: &[f32]| two[0].to_bits() & 0xffff_0000 | two.get(1).map_or(0, |x| x.to_bits() >> 16);
    row.chunks(2).map(|two| f32::from_bits(word(two))).collect()
}

#[test]
fn codes() {
    for ((n, k), format) in SIZES.into_iter().flat_map(|s| [(s, Fp8Format::E4m3), (s, Fp8Format::E5m2)]) {
        let weight = Weight::encode(&values(&[n, k], 1), &Precision::Fp8 { format, scales: Fp8Scales::F32 });
        let (packed, (codes, scales)) = (weight.prepack(), weight.fp8_parts().expect("FP8"));
        let value = |code: &u8| format.forward().decode(*code);
        let dense: Vec<f32> = codes.as_u8().iter().map(value).collect();
        let across = k.div_ceil(TILE);
        let elements = packed.panels(0);
        for m in (1..=9).chain([16]) {
            let a = crate::Fp8::quantize_rows(&values(&[m, k], 2), format.forward(), Fp8Scales::F32);
            let rows: Vec<f32> = a.codes.as_u8().iter().map(value).collect();
            let mut expected = vec![0.0; m * n];
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let scaled = |block: usize, sum: f32| {
                    sum * a.scales.as_f32()[i * across + block] * scales.as_f32()[j / TILE * across + block]
                };
                expected[i * n + j] = chain(&rows[i * k..][..k], &dense[j * k..][..k], None, scaled);
            }
            for isa in Isa::all() {
                let forms = [Form::F32, Form::Pairs].into_iter().filter(|f| *f == Form::F32 || isa.has_bf16_dot());
                for form in forms.filter(|form| m <= rows_most(isa, elements, *form)) {
                    let words = if form == Form::F32 { rows.clone() } else { rows.chunks(k).flat_map(pairs).collect() };
                    let mut c = vec![7.0; m * n];
                    for (index, first) in (0..n).step_by(PANEL).enumerate() {
                        let (a, scales) = (words.as_ptr(), a.scales.as_f32().as_ptr());
                        let rows = Rows { a, stride: form.words(k), scales, scale_strides: (across, 1), count: m };
                        // SAFETY: the sizes are those of the vectors above.
                        unsafe {
                            let cols = PANEL.min(n - first);
                            let out = Out { c: c.as_mut_ptr().add(first), stride: n, cols, add: false };
                            panel(isa, elements, form, index, k, rows, out);
                        }
                    }
                    assert_eq!(bits(&c), bits(&expected), "{m} x {n} x {k} {isa:?} {form:?}");
                }
            }
        }
    }
}

#[test]
fn vector_sets_have_kernels() {
    let weight = Weight::encode(&values(&[40, 50], 1), &Precision::Bf16).prepack();
    let codes = Weight::encode(&values(&[40, 50], 1), &FP8).prepack();
    let all = Isa::all();
    for (at, isa) in all.iter().enumerate() {
        for elements in [weight.panels(0), codes.panels(0)] {
            let most = rows_most(*isa, elements, Form::F32);
            assert_eq!(most >= ROWS_NARROW, at + 1 < all.len(), "{isa:?}: {most}");
        }
    }
}

#[test]
fn every_code_is_unpacked_to_its_value() {
    // Two codes a word, of 64 in a block; the last block without its second input.
    let codes: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
    for (isa, encoding) in Isa::all().into_iter().flat_map(|isa| [(isa, Encoding::E4m3), (isa, Encoding::E5m2)]) {
        let (mut words, mut values) = (vec![7.0; codes.len() / 2], vec![7.0; codes.len() - PANEL]);
        if !unpack_pairs(isa, &codes, encoding, &mut words) {
            assert!(!unpack_codes(isa, &codes, encoding, &mut values));
            continue;
        }
        assert!(unpack_codes(isa, &codes, encoding, &mut values));
        for (p, j) in (0..codes.len() / PANEL).flat_map(|p| (0..PANEL).map(move |j| (p, j))) {
            let want = encoding.decode(codes[p / 2 * 2 * PANEL + <u8 as Element>::place(p % 2, j)]).to_bits();
            let word = words[p / 2 * PANEL + j].to_bits();
            let half = if p % 2 == 0 { word & 0xffff_0000 } else { word << 16 };
            assert_eq!(half, want, "{isa:?} {encoding:?} {p} {j}");
            if let Some(value) = values.get(p * PANEL + j) {
                assert_eq!(value.to_bits(), want, "{isa:?} {encoding:?} {p} {j}");
            }
        }
    }
}
