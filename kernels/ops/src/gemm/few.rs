//! Few rows of A against a prepacked weight: every panel is streamed once and decoded in registers.
//!
//! A panel's layout is that of `weight/layout.rs`. Its two vectors of a pair of inputs are multiplied as they are (FP8 codes,
//! by the dot product of BF16 pairs) or widened to the f32 of k and of k + 1. An output is the chain of `gemm.rs`, block by
//! block, with the scales of `gemm/codes.rs` where there are codes; so the bits are those of the kernels that pack.
//! Only AVX-512 has these kernels: other machines pack the panel and take the usual ones, to the same result.

#![allow(unsafe_code)]

use half::bf16;

use super::{BLOCK_K, PANEL};
use crate::fp8::Encoding;
use crate::isa::Isa;
use crate::weight::panel_len;

/// Rows that pass over a panel together.
const ROWS_MAX: usize = 8;

/// Elements of one prepacked matrix, panel after panel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    /// With the scales of their tiles, `[⌈out/128⌉, ⌈k/128⌉]`.
    Codes(&'a [u8], Encoding, &'a [f32]),
}

/// What a call multiplies: A in f32, or for codes in words of pairs, with a scale for each row and block.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// Row i starts at `a[i * stride]`.
    pub(super) a: *const f32,
    pub(super) stride: usize,
    /// Scale of row i in block b: `scales[i * scale_strides.0 + b * scale_strides.1]`; unused without codes.
    pub(super) scales: *const f32,
    pub(super) scale_strides: (usize, usize),
    pub(super) count: usize,
}

/// Where the outputs of one panel go: element (i, j) at `c[i * stride + j]`, j below `cols`.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) c: *mut f32,
    pub(super) stride: usize,
    pub(super) cols: usize,
    /// Add to C instead of replacing it.
    pub(super) add: bool,
}

/// Whether [`panel`] may be called with such elements: codes are multiplied in pairs.
pub(super) fn has_kernel(isa: Isa, elements: Elements<'_>, pairs: bool) -> bool {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        crate::isa::Kind::Avx512 => pairs == matches!(elements, Elements::Codes(..)) && (!pairs || isa.has_bf16_dot()),
        _ => false,
    }
}

/// Multiplies `rows` by panel `index` of a matrix with `k` inputs.
///
/// # Safety
/// [`has_kernel`] must have said so. `rows.count` rows of A must be valid for `k` elements (in f32; words of pairs:
/// ⌈k/2⌉), their scales for ⌈k/128⌉ blocks, and the outputs for as many rows of `out.cols` columns, which nobody else
/// touches.
///
/// # Panics
/// When the matrix has no such panel.
pub(super) unsafe fn panel(elements: Elements<'_>, index: usize, k: usize, rows: Rows, out: Out) {
    for first in (0..rows.count).step_by(ROWS_MAX) {
        let count = ROWS_MAX.min(rows.count - first);
        // SAFETY: rows below `rows.count`.
        let (rows, out) = unsafe {
            let scales = rows.scales.wrapping_add(first * rows.scale_strides.0);
            let rows = Rows { a: rows.a.add(first * rows.stride), scales, count, ..rows };
            (rows, Out { c: out.c.add(first * out.stride), ..out })
        };
        // SAFETY: `has_kernel` found the features; the panel is there by its slice; the rest is the caller's promise.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            match elements {
                Elements::F32(data) => {
                    x86::plain(&data[index * panel_len::<f32>(k)..][..panel_len::<f32>(k)], k, rows, out)
                }
                Elements::Bf16(data) => {
                    x86::widened(&data[index * panel_len::<bf16>(k)..][..panel_len::<bf16>(k)], k, rows, out);
                }
                Elements::Codes(data, encoding, scales) => {
                    let across = k.div_ceil(BLOCK_K);
                    let scales = &scales[index * PANEL / BLOCK_K * across..][..across];
                    let codes = &data[index * panel_len::<u8>(k)..][..panel_len::<u8>(k)];
                    x86::codes(codes, encoding, scales, k, rows, out);
                }
            }
        }
    }
}

/// Words of pairs, `[..][32]`, of a panel's blocks of codes; false where only the written form can make them.
pub(crate) fn unpack_codes(isa: Isa, codes: &[u8], encoding: Encoding, out: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa.has_bf16_dot() {
        assert_eq!(codes.len(), 2 * out.len(), "two codes make a word");
        // SAFETY: the features were detected, and the sizes are checked.
        unsafe { x86::unpack_codes(codes, encoding, out) };
        return true;
    }
    let _ = (isa, codes, encoding, out);
    false
}

/// The values, `[k][32]`, of a panel's blocks of BF16 elements, the last one perhaps without its second input; false as above.
pub(crate) fn unpack_bf16(isa: Isa, elements: &[bf16], out: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa.kind() == crate::isa::Kind::Avx512 {
        assert!(elements.len() >= out.len() && out.len().is_multiple_of(PANEL), "an element makes a value");
        // SAFETY: as above.
        unsafe { x86::unpack_bf16(elements, out) };
        return true;
    }
    let _ = (isa, elements, out);
    false
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! SAFETY, for the whole module: functions are called where `has_kernel` found their features, with pointers valid as
    //! [`super::panel`] demands; slices of a panel hold `depth(k)` inputs of 32 outputs.

    use std::arch::x86_64::*;
    use std::sync::OnceLock;

    use half::bf16;

    use super::*;

    /// Bytes ahead of the one being read that are asked for: a page, at whose end the processor's own prefetching stops.
    const AHEAD: usize = 4096;

    /// Sums of one panel, row by row.
    type Sums = [[f32; PANEL]; ROWS_MAX];

    macro_rules! by_rows {
        ($call:ident, $rows:ident, ($($arg:expr),*)) => {
            match $rows.count {
                1 => $call::<1>($($arg),*),
                2 => $call::<2>($($arg),*),
                3 => $call::<3>($($arg),*),
                4 => $call::<4>($($arg),*),
                5 => $call::<5>($($arg),*),
                6 => $call::<6>($($arg),*),
                7 => $call::<7>($($arg),*),
                _ => $call::<8>($($arg),*),
            }
        };
    }

    /// Adds a block's sums, scaled where there are scales, to those before it.
    #[inline(always)]
    unsafe fn add_block<const R: usize>(
        sums: &mut Sums,
        acc: &[[__m512; 2]; R],
        first: bool,
        scale: Option<(&[f32; R], f32)>,
    ) {
        for r in 0..R {
            for v in 0..2 {
                // SAFETY: a row of sums has two vectors.
                unsafe {
                    let mut sum = acc[r][v];
                    if let Some((rows, column)) = scale {
                        sum = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(rows[r])), _mm512_set1_ps(column));
                    }
                    let to = sums[r].as_mut_ptr().add(16 * v);
                    let sum = if first { sum } else { _mm512_add_ps(_mm512_loadu_ps(to), sum) };
                    _mm512_storeu_ps(to, sum);
                }
            }
        }
    }

    /// What is in C before the first block, where it counts.
    unsafe fn begin(rows: Rows, out: Out, sums: &mut Sums) {
        if out.add {
            for (i, sums) in sums.iter_mut().enumerate().take(rows.count) {
                // SAFETY: within C.
                let c = unsafe { std::slice::from_raw_parts(out.c.add(i * out.stride), out.cols) };
                sums[..out.cols].copy_from_slice(c);
            }
        }
    }

    unsafe fn finish(rows: Rows, out: Out, sums: &Sums) {
        for (i, sums) in sums.iter().enumerate().take(rows.count) {
            // SAFETY: within C, which nobody else touches.
            let c = unsafe { std::slice::from_raw_parts_mut(out.c.add(i * out.stride), out.cols) };
            c.copy_from_slice(&sums[..out.cols]);
        }
    }

    macro_rules! kernel {
        ($name:ident, $by:ident, ($($arg:ident: $ty:ty),*)) => {
            pub(super) unsafe fn $name($($arg: $ty,)* k: usize, rows: Rows, out: Out) {
                let mut sums = [[0.0; PANEL]; ROWS_MAX];
                // SAFETY: see the module.
                unsafe {
                    begin(rows, out, &mut sums);
                    by_rows!($by, rows, ($($arg,)* k, rows, !out.add, &mut sums));
                    finish(rows, out, &sums);
                }
            }
        };
    }
    kernel!(plain, plain_rows, (panel: &[f32]));
    kernel!(widened, widened_rows, (panel: &[bf16]));
    kernel!(codes, codes_rows, (panel: &[u8], encoding: Encoding, scales: &[f32]));

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn plain_rows<const R: usize>(panel: &[f32], k: usize, rows: Rows, fresh: bool, sums: &mut Sums) {
        for start in (0..k).step_by(BLOCK_K) {
            // SAFETY: see the module.
            unsafe {
                let mut acc = [[_mm512_setzero_ps(); 2]; R];
                for p in start..k.min(start + BLOCK_K) {
                    let at = panel.as_ptr().add(p * PANEL);
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD));
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD + 64));
                    let b = [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))];
                    for r in 0..R {
                        let a = _mm512_set1_ps(*rows.a.add(r * rows.stride + p));
                        acc[r] = [_mm512_fmadd_ps(a, b[0], acc[r][0]), _mm512_fmadd_ps(a, b[1], acc[r][1])];
                    }
                }
                add_block(sums, &acc, fresh && start == 0, None);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn widened_rows<const R: usize>(panel: &[bf16], k: usize, rows: Rows, fresh: bool, sums: &mut Sums) {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        for start in (0..k).step_by(BLOCK_K) {
            // SAFETY: see the module; the second input of the last pair of an odd k is not multiplied.
            unsafe {
                let mut acc = [[_mm512_setzero_ps(); 2]; R];
                let end = k.min(start + BLOCK_K);
                for p in (start..end).step_by(2) {
                    let at = panel.as_ptr().add(p * PANEL);
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD));
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD + 64));
                    let words = [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(PANEL).cast())];
                    let b = words.map(|w| _mm512_castsi512_ps(_mm512_and_si512(w, upper)));
                    for r in 0..R {
                        let a = _mm512_set1_ps(*rows.a.add(r * rows.stride + p));
                        acc[r] = [_mm512_fmadd_ps(a, b[0], acc[r][0]), _mm512_fmadd_ps(a, b[1], acc[r][1])];
                    }
                    if p + 1 == end {
                        break;
                    }
                    let b = words.map(|w| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)));
                    for r in 0..R {
                        let a = _mm512_set1_ps(*rows.a.add(r * rows.stride + p + 1));
                        acc[r] = [_mm512_fmadd_ps(a, b[0], acc[r][0]), _mm512_fmadd_ps(a, b[1], acc[r][1])];
                    }
                }
                add_block(sums, &acc, fresh && start == 0, None);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma")]
    unsafe fn codes_rows<const R: usize>(
        panel: &[u8],
        encoding: Encoding,
        scales: &[f32],
        k: usize,
        rows: Rows,
        fresh: bool,
        sums: &mut Sums,
    ) {
        let table = Table::of(encoding);
        for (block, start) in (0..k).step_by(BLOCK_K).enumerate() {
            // SAFETY: see the module; a word of pairs past an odd k holds a zero, and so does the panel.
            unsafe {
                let vectors = table.vectors();
                let mut acc = [[_mm512_setzero_ps(); 2]; R];
                let mut a = rows.a.add(start / 2);
                for p in (start..k.min(start + BLOCK_K)).step_by(2) {
                    let at = panel.as_ptr().add(p * PANEL);
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD));
                    let codes = _mm512_loadu_si512(at.cast());
                    let b = decode(codes, vectors).map(|b| std::mem::transmute::<__m512i, __m512bh>(b));
                    for r in 0..R {
                        let x = std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(*a.add(r * rows.stride)));
                        acc[r] = [_mm512_dpbf16_ps(acc[r][0], x, b[0]), _mm512_dpbf16_ps(acc[r][1], x, b[1])];
                    }
                    a = a.add(1);
                }
                let of_row = |r: usize| *rows.scales.add(r * rows.scale_strides.0 + block * rows.scale_strides.1);
                add_block(sums, &acc, fresh && start == 0, Some((&std::array::from_fn(of_row), scales[block])));
            }
        }
    }

    /// The pairs of a block of 64 codes, columns 0 to 15 and 16 to 31.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma")]
    fn decode(codes: __m512i, [low, high]: [[__m512i; 2]; 2]) -> [__m512i; 2] {
        let lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        let upper = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        // upper | (codes & sign)
        let upper = _mm512_ternarylogic_epi32::<0xf8>(upper, codes, _mm512_set1_epi8(i8::MIN));
        [_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)]
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma")]
    pub(super) unsafe fn unpack_codes(codes: &[u8], encoding: Encoding, out: &mut [f32]) {
        // SAFETY: see the module; chunks have the bytes of the vectors.
        unsafe {
            let vectors = Table::of(encoding).vectors();
            for (codes, out) in codes.chunks_exact(2 * PANEL).zip(out.chunks_exact_mut(PANEL)) {
                // The next block of k is read soon, and lies there.
                _mm_prefetch::<_MM_HINT_T1>(codes.as_ptr().cast::<i8>().wrapping_add(BLOCK_K * PANEL));
                let [first, second] = decode(_mm512_loadu_si512(codes.as_ptr().cast()), vectors);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), first);
                _mm512_storeu_si512(out.as_mut_ptr().add(16).cast(), second);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) unsafe fn unpack_bf16(elements: &[bf16], out: &mut [f32]) {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        // SAFETY: see the module; chunks have the bytes of the vectors.
        unsafe {
            for (block, out) in elements.chunks_exact(2 * PANEL).zip(out.chunks_mut(2 * PANEL)) {
                let words = [0, PANEL].map(|at| {
                    let at = block.as_ptr().add(at);
                    _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(BLOCK_K * PANEL).cast());
                    _mm512_loadu_si512(at.cast())
                });
                for (i, word) in words.into_iter().enumerate() {
                    let to = out.as_mut_ptr().add(16 * i);
                    _mm512_storeu_si512(to.cast(), _mm512_and_si512(word, upper));
                    if out.len() > PANEL {
                        _mm512_storeu_si512(to.add(PANEL).cast(), _mm512_slli_epi32::<16>(word));
                    }
                }
            }
        }
    }

    /// BF16 values of the 128 magnitudes of an encoding, by low and high bytes.
    struct Table([[u8; 128]; 2]);

    impl Table {
        fn of(encoding: Encoding) -> &'static Self {
            static TABLES: OnceLock<[Table; 2]> = OnceLock::new();
            let make = |encoding: Encoding| {
                let bytes = |code: usize| ((encoding.decode(code as u8).to_bits() >> 16) as u16).to_le_bytes();
                Self([0, 1].map(|byte: usize| std::array::from_fn(|code| bytes(code)[byte])))
            };
            let [e4m3, e5m2] = TABLES.get_or_init(|| [make(Encoding::E4m3), make(Encoding::E5m2)]);
            match encoding {
                Encoding::E4m3 => e4m3,
                Encoding::E5m2 => e5m2,
            }
        }

        #[inline(always)]
        unsafe fn vectors(&self) -> [[__m512i; 2]; 2] {
            // SAFETY: a table has two vectors.
            self.0.each_ref().map(|bytes| unsafe {
                [_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_loadu_si512(bytes.as_ptr().add(64).cast())]
            })
        }
    }
}

#[cfg(test)]
mod tests;
