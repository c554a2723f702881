//! A panel from rows: `out[k][j] = source[j * stride + k]`, zero for j from `width` to 32.
//!
//! AVX-512 turns blocks of 16 × 16 words in registers; other machines copy row by row. Moves only: no bit depends on which.

use super::PANEL;
use crate::isa::{Isa, simd_fn};

/// Writes `width` columns j (at most a panel) and `len` rows k to `out`, `[len][32]`.
pub(crate) fn transpose_panel(isa: Isa, source: &[f32], stride: usize, width: usize, len: usize, out: &mut [f32]) {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        crate::isa::Kind::Avx512 => x86::transpose(source, stride, width, len, out),
        _ => by_rows(isa, source, stride, width, len, out),
    }
}

simd_fn! {
    fn by_rows(source: &[f32], stride: usize, width: usize, len: usize, out: &mut [f32]) {
        for j in 0..width {
            let source = &source[j * stride..j * stride + len];
            for (k, x) in source.iter().enumerate() {
                out[k * PANEL + j] = *x;
            }
        }
        for row in out.chunks_exact_mut(PANEL) {
            row[width..].fill(0.0);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;

    use super::PANEL;

    /// Words of a vector.
    const LANES: usize = 16;
    /// Words of a row to fetch ahead: rows lie too far apart for the processor to do it. Past the end of the block lies the
    /// next one.
    const AHEAD: usize = 64;

    pub(super) fn transpose(source: &[f32], stride: usize, width: usize, len: usize, out: &mut [f32]) {
        let needed = if width > 0 && len > 0 { (width - 1) * stride + len } else { 0 };
        assert!(width <= PANEL && source.len() >= needed && out.len() >= len * PANEL, "a panel of {width} x {len}");
        for j in (0..PANEL).step_by(LANES) {
            for k in (0..len).step_by(LANES) {
                // SAFETY: the features were detected where an `Isa` of this kind exists. Rows from `width` and words from
                // `len` on are not loaded, rows of `out` from `len` on not stored; the others exist by the assertion.
                unsafe {
                    block(source, stride, (j, width.saturating_sub(j).min(LANES)), (k, (len - k).min(LANES)), out)
                };
            }
        }
    }

    /// Columns from `j` on, `columns` of them not zero, and up to 16 rows from `k` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn block(
        source: &[f32],
        stride: usize,
        (j, columns): (usize, usize),
        (k, rows): (usize, usize),
        out: &mut [f32],
    ) {
        let mask: __mmask16 = if rows == LANES { !0 } else { (1 << rows) - 1 };
        let from: [__m512; LANES] = std::array::from_fn(|i| {
            if i < columns {
                // SAFETY: the caller's promise; masked words are not touched, nor is what is fetched ahead.
                unsafe {
                    let words = source.as_ptr().add((j + i) * stride + k);
                    _mm_prefetch::<_MM_HINT_T0>(words.wrapping_add(AHEAD).cast());
                    _mm512_maskz_loadu_ps(mask, words)
                }
            } else {
                _mm512_setzero_ps()
            }
        });
        // Row r of a lane's 4 x 4 words, of columns 4g to 4g + 3, is at 4g + r.
        let words: [__m512; LANES] = std::array::from_fn(|i| {
            let (g, r) = (i / 4 * 4, i % 4);
            let pick = |a: __m512, b: __m512| {
                if r / 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) }
            };
            let (a, b) =
                (_mm512_castps_pd(pick(from[g], from[g + 1])), _mm512_castps_pd(pick(from[g + 2], from[g + 3])));
            _mm512_castpd_ps(if r % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
        });
        for row in 0..rows {
            let (lane, r) = (row / 4, row % 4);
            let join = |a: __m512, b: __m512| {
                if lane / 2 == 0 { _mm512_shuffle_f32x4::<0x44>(a, b) } else { _mm512_shuffle_f32x4::<0xee>(a, b) }
            };
            let (a, b) = (join(words[r], words[4 + r]), join(words[8 + r], words[12 + r]));
            let whole =
                if lane % 2 == 0 { _mm512_shuffle_f32x4::<0x88>(a, b) } else { _mm512_shuffle_f32x4::<0xdd>(a, b) };
            // SAFETY: row k + row of the output exists by the caller's promise.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add((k + row) * PANEL + j), whole) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    #[test]
    fn every_instruction_set_moves_the_same_words() {
        for (width, len, stride) in [(32, 128, 128), (1, 1, 1), (17, 33, 40), (31, 16, 16), (16, 100, 101), (3, 0, 5)] {
            let source = values(&[width * stride], 1);
            for isa in Isa::all() {
                let mut out = vec![7.0; len * PANEL];
                transpose_panel(isa, source.as_f32(), stride, width, len, &mut out);
                for (k, row) in out.chunks(PANEL).enumerate() {
                    for (j, x) in row.iter().enumerate() {
                        let expected = if j < width { source.as_f32()[j * stride + k] } else { 0.0 };
                        assert_eq!(*x, expected, "{width} x {len}, {isa:?}");
                    }
                }
            }
        }
    }
}
