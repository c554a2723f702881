//! Absorbed attention against the training form, and bit equality in any company.

use super::*;
use crate::testing::values;
use crate::{Precision, Spans, attention};

const HEADS: usize = 3;
const DN: usize = 5;
const DR: usize = 4;
const DV: usize = 6;
const RANK: usize = 9;
const WIDTH: usize = RANK + DR;
const SCALE: f32 = 0.3;

/// Cache rows `[tokens, WIDTH]` in pages of `page_tokens`, the last one padded.
fn paged(cache: &[f32], page_tokens: usize) -> Vec<Vec<f32>> {
    let page = |rows: &[f32]| {
        let mut page = rows.to_vec();
        page.resize(page_tokens * WIDTH, f32::NAN);
        page
    };
    cache.chunks(page_tokens * WIDTH).map(page).collect()
}

fn absorbed() -> Absorbed {
    Absorbed::new(&Weight::encode(&values(&[HEADS * (DN + DV), RANK], 1), &Precision::F32), HEADS, DN, DV)
}

#[test]
fn equals_the_training_form() {
    let tokens = 23;
    let cache = values(&[tokens, WIDTH], 2);
    let q = values(&[tokens, HEADS, DN + DR], 3);
    let weight = Weight::encode(&values(&[HEADS * (DN + DV), RANK], 1), &Precision::F32);
    let (latent, k_rope) = crate::columns::split(&cache, RANK);
    let kv = crate::linear::forward(&latent, &weight).reshape(&[tokens, HEADS, DN + DV]);
    let want = attention::forward(&q, &kv, &k_rope, &Spans::uniform(1, tokens), SCALE);
    let pages = paged(cache.as_f32(), 8);
    let pages: Vec<Page<'_>> = pages.iter().map(|page| Page::F32(page)).collect();
    let rows: Vec<CacheRows<'_>> = (1..=tokens).map(|len| CacheRows { pages: &pages, len }).collect();
    let o = forward(&absorb_query(&q, &weight, DN, DV), &rows, RANK, SCALE);
    let got = expand_value(&o, &weight, DN, DV);
    assert_eq!(got.shape(), want.shape());
    for (got, want) in got.as_f32().iter().zip(want.as_f32()) {
        assert!((got - want).abs() < 2e-6, "{got} is not {want}");
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let lens = [1, 40, 17, 16, 33, 64, 5];
    let caches: Vec<Vec<Vec<f32>>> =
        (0..lens.len()).map(|i| paged(values(&[lens[i], WIDTH], 10 + i as u64).as_f32(), 16)).collect();
    let pages: Vec<Vec<Page<'_>>> = caches.iter().map(|c| c.iter().map(|p| Page::F32(p)).collect()).collect();
    let rows: Vec<CacheRows<'_>> = pages.iter().zip(lens).map(|(pages, len)| CacheRows { pages, len }).collect();
    let q = values(&[lens.len(), HEADS, DN + DR], 4);
    let run = |q: &Tensor, rows: &[CacheRows<'_>]| {
        let absorbed = absorbed();
        absorbed.value(&forward(&absorbed.query(q), rows, RANK, SCALE)).into_f32()
    };
    let batch = run(&q, &rows);
    let per_row = HEADS * (DN + DR);
    for (i, row) in rows.iter().enumerate() {
        let alone = Tensor::f32(&[1, HEADS, DN + DR], q.as_f32()[i * per_row..][..per_row].to_vec());
        assert_eq!(run(&alone, &[*row]), batch[i * HEADS * DV..][..HEADS * DV]);
    }
}

#[test]
fn bf16_pages_equal_f32_pages_of_the_same_values() {
    let cache = values(&[20, WIDTH], 5).to_bf16();
    let q = values(&[1, HEADS, WIDTH], 6);
    let wide = cache.to_f32();
    let narrow = [Page::Bf16(&cache.as_bf16()[..16 * WIDTH]), Page::Bf16(&cache.as_bf16()[16 * WIDTH..])];
    let wide = [Page::F32(&wide.as_f32()[..16 * WIDTH]), Page::F32(&wide.as_f32()[16 * WIDTH..])];
    let run = |pages: &[Page<'_>]| forward(&q, &[CacheRows { pages, len: 19 }], RANK, SCALE).into_f32();
    assert_eq!(run(&narrow), run(&wide));
}

#[test]
fn an_encoded_kv_b_gives_the_bits_of_its_values() {
    // Heads of 24 + 40 rows and a rank of 150, so that heads and tiles of 128 cross each other.
    let (heads, dn, dv, rank) = (5, 24, 40, 150);
    let master = values(&[heads * (dn + dv), rank], 8);
    let fp8 = Precision::Fp8 { format: crate::Fp8Format::E4m3, scales: crate::Fp8Scales::F32 };
    for precision in [Precision::F32, Precision::Bf16, fp8] {
        let encoded = Weight::encode(&master, &precision);
        let plain = Absorbed::new(&Weight::from_plain(encoded.dequantize()), heads, dn, dv);
        for rows in [1, 50] {
            let (q, o) = (values(&[rows, heads, dn + 4], 9), values(&[rows, heads, rank], 10));
            for weight in [encoded.clone(), encoded.prepack()] {
                let own = Absorbed::new(&weight, heads, dn, dv);
                assert_eq!(own.query(&q).as_f32(), plain.query(&q).as_f32(), "{precision:?}");
                assert_eq!(own.value(&o).as_f32(), plain.value(&o).as_f32(), "{precision:?}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "pages lack")]
fn a_length_beyond_the_pages_is_refused() {
    let page = vec![0.0; 4 * WIDTH];
    forward(&values(&[1, HEADS, WIDTH], 7), &[CacheRows { pages: &[Page::F32(&page)], len: 5 }], RANK, SCALE);
}
