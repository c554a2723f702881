//! Path against path: instruction sets, row counts, threads and encodings give the same bits.

use super::*;
use crate::testing::values;
use crate::{Precision, Tensor, Weight, grouped_linear, linear};

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
            let (values, _) = crate::activation::input(&rows, weight.rounding(), false);
            let mut expected = vec![0.0; range.len() * n];
            let w = Mat::transposed(&all.as_f32()[e * n * k..(e + 1) * n * k], k);
            reference((range.len(), n, k), Mat::rows(values.as_f32(), k), w, &mut expected, n, false);
            assert_eq!(bits(&expected), bits(&y.as_f32()[range.start * n..range.end * n]), "{precision:?} expert {e}");
        }
    }
}
