//! The kernels in vectors of 16 (AVX-512) and of 8 (AVX2), and what packing reads of prepacked elements.
//!
//! SAFETY, for the whole file: functions are called where `rows_most` or an `Isa` found their features, with pointers valid as
//! [`super::panel`] demands; a panel holds `depth(k)` inputs of 32 outputs.

use std::arch::x86_64::*;

use half::bf16;

use super::super::kernel::{Lanes, Ymm, Zmm};
use super::super::{BLOCK_K, Form, PANEL};
use super::words::{NarrowCodes, Stored, Wide, WideCodes, Words};
use super::{Elements, Out, ROWS_MAX, ROWS_PASS_NARROW, Rows};
use crate::fp8::Encoding;
use crate::isa::{Isa, Kind};
use crate::weight::panel_len;

/// Bytes ahead of the one being read that are asked for: a page, at whose end the processor's own prefetching stops.
const AHEAD: usize = 4096;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Sums of one panel, row by row.
type Sums = [[f32; PANEL]; ROWS_MAX];

/// What a kernel multiplies a panel by, and the sums it begins with and ends with.
struct Call<'a> {
    k: usize,
    rows: Rows,
    /// Nothing was added up before the first block.
    fresh: bool,
    sums: &'a mut Sums,
}

/// The vectors of a kernel, and how it multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// f32 of 16.
    Wide,
    /// f32 of 8.
    Narrow,
    /// Words of pairs, 16 of them.
    Pairs,
}

impl Kernel {
    pub(super) fn of(isa: Isa, elements: Elements<'_>, form: Form) -> Self {
        let codes = matches!(elements, Elements::Codes(..));
        match isa.kind() {
            _ if form == Form::Pairs => Self::Pairs,
            Kind::Avx512 if !codes || isa.has_byte_tables() => Self::Wide,
            _ => Self::Narrow,
        }
    }

    /// Rows of one pass.
    pub(super) fn rows(self) -> usize {
        if self == Self::Narrow { ROWS_PASS_NARROW } else { ROWS_MAX }
    }

    /// Multiplies at most [`Kernel::rows`] rows by a panel.
    pub(super) unsafe fn run(self, panel: Elements<'_>, k: usize, rows: Rows, out: Out) {
        let mut sums = [[0.0; PANEL]; ROWS_MAX];
        // SAFETY: see the file.
        unsafe {
            begin(rows, out, &mut sums);
            let (call, count) = (Call { k, rows, fresh: !out.add, sums: &mut sums }, rows.count);
            match (self, panel) {
                (Self::Narrow, Elements::F32(panel)) => narrow_plain(panel, call, count),
                (_, Elements::F32(panel)) => wide_plain(panel, call, count),
                (Self::Narrow, Elements::Bf16(panel)) => narrow_stored(panel, call, count),
                (_, Elements::Bf16(panel)) => wide_stored(panel, call, count),
                (_, Elements::Codes(codes, encoding, scales)) => {
                    let run = match (self, rows.scales.is_null()) {
                        (Self::Narrow, true) => narrow_values,
                        (Self::Narrow, false) => narrow_codes,
                        (Self::Wide, true) => wide_values,
                        (Self::Wide, false) => wide_codes,
                        (Self::Pairs, _) => pairs_of_codes,
                    };
                    run(codes, encoding, scales, call, count);
                }
            }
            finish(rows, out, &sums);
        }
    }
}

/// Panel `index` of a matrix with `k` inputs, with the scales of its K blocks.
///
/// # Panics
/// When there is none.
pub(super) fn panel_of(elements: Elements<'_>, index: usize, k: usize) -> Elements<'_> {
    match elements {
        Elements::F32(data) => Elements::F32(&data[index * panel_len::<f32>(k)..][..panel_len::<f32>(k)]),
        Elements::Bf16(data) => Elements::Bf16(&data[index * panel_len::<bf16>(k)..][..panel_len::<bf16>(k)]),
        Elements::Codes(data, encoding, scales) => {
            let across = k.div_ceil(BLOCK_K);
            let codes = &data[index * panel_len::<u8>(k)..][..panel_len::<u8>(k)];
            Elements::Codes(codes, encoding, &scales[index * PANEL / BLOCK_K * across..][..across])
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

/// Asks for what lies a page after `at`, `bytes` of it.
#[inline(always)]
unsafe fn fetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        // SAFETY: a hint, without effect on values.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + line).cast()) };
    }
}

/// Adds a block's sums, scaled where there are scales, to those before it.
#[inline(always)]
unsafe fn add_block<L: Lanes, const N: usize, const R: usize>(
    sums: &mut Sums,
    acc: &[[L; N]; R],
    first: bool,
    scale: Option<(&[f32; R], f32)>,
) {
    for r in 0..R {
        for v in 0..N {
            // SAFETY: a row of sums has N vectors.
            unsafe {
                let mut sum = acc[r][v];
                if let Some((rows, column)) = scale {
                    sum = sum.mul(L::splat(rows[r])).mul(L::splat(column));
                }
                let to = sums[r].as_mut_ptr().add(v * L::COUNT);
                let sum = if first { sum } else { L::load(to).add(sum) };
                sum.store(to);
            }
        }
    }
}

/// The rows' scales in a K block.
#[inline(always)]
unsafe fn row_scales<const R: usize>(rows: Rows, block: usize) -> [f32; R] {
    let mut scales = [0.0; R];
    for (r, scale) in scales.iter_mut().enumerate() {
        // SAFETY: see the file.
        *scale = unsafe { *rows.scales.add(r * rows.scale_strides.0 + block * rows.scale_strides.1) };
    }
    scales
}

/// F32 elements.
#[inline(always)]
unsafe fn plain<L: Lanes, const N: usize, const R: usize>(panel: &[f32], call: Call<'_>) {
    let Call { k, rows, fresh, sums } = call;
    for start in (0..k).step_by(BLOCK_K) {
        // SAFETY: see the file.
        unsafe {
            let mut acc = [[L::zero(); N]; R];
            for p in start..k.min(start + BLOCK_K) {
                let at = panel.as_ptr().add(p * PANEL);
                fetch(at.cast(), 4 * PANEL);
                let mut b = [L::zero(); N];
                for v in 0..N {
                    b[v] = L::load(at.add(v * L::COUNT));
                }
                multiply(&mut acc, rows, p, &b);
            }
            add_block(sums, &acc, fresh && start == 0, None);
        }
    }
}

/// One step of every chain: `acc = fma(a, b, acc)` with column `p` of A.
#[inline(always)]
unsafe fn multiply<L: Lanes, const N: usize, const R: usize>(acc: &mut [[L; N]; R], rows: Rows, p: usize, b: &[L; N]) {
    for r in 0..R {
        // SAFETY: see the file.
        unsafe {
            let a = L::splat(*rows.a.add(r * rows.stride + p));
            for v in 0..N {
                acc[r][v] = a.fma(b[v], acc[r][v]);
            }
        }
    }
}

/// What scales multiply, one for each K block of a panel.
#[derive(Clone, Copy)]
enum Scales<'a> {
    Nothing,
    /// Every element, before it is multiplied: values of codes.
    Elements(&'a [f32]),
    /// The block's sum, after the scale of its row: products of codes.
    Sums(&'a [f32]),
}

/// Elements of 8 or 16 bits, widened to f32.
#[inline(always)]
unsafe fn widened<L: Wide, W: Words<L, N>, const N: usize, const R: usize>(
    words: W,
    scales: Scales<'_>,
    call: Call<'_>,
) {
    let Call { k, rows, fresh, sums } = call;
    for (block, start) in (0..k).step_by(BLOCK_K).enumerate() {
        // SAFETY: see the file; the second input of the last pair of an odd k is not multiplied.
        unsafe {
            let factor = match scales {
                Scales::Elements(scales) => Some(L::splat(scales[block])),
                _ => None,
            };
            let value = |x: L| factor.map_or(x, |factor| x.mul(factor));
            let mut acc = [[L::zero(); N]; R];
            let end = k.min(start + BLOCK_K);
            let mut at = words.start().add(start / 2 * W::BYTES);
            for p in (start..end).step_by(2) {
                fetch(at, W::BYTES);
                let pairs = words.read(at);
                at = at.add(W::BYTES);
                let mut b = pairs;
                for v in 0..N {
                    b[v] = value(pairs[v].upper());
                }
                multiply(&mut acc, rows, p, &b);
                if p + 1 == end {
                    break;
                }
                for v in 0..N {
                    b[v] = value(pairs[v].lower());
                }
                multiply(&mut acc, rows, p + 1, &b);
            }
            match scales {
                Scales::Sums(scales) => {
                    add_block(sums, &acc, fresh && start == 0, Some((&row_scales(rows, block), scales[block])));
                }
                _ => add_block(sums, &acc, fresh && start == 0, None),
            }
        }
    }
}

/// Codes, multiplied as pairs.
#[inline(always)]
unsafe fn dotted<const R: usize>(words: WideCodes, scales: &[f32], call: Call<'_>) {
    let Call { k, rows, fresh, sums } = call;
    for (block, start) in (0..k).step_by(BLOCK_K).enumerate() {
        // SAFETY: see the file; a word of pairs past an odd k holds a zero, and so does the panel.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; R];
            let mut at = words.start().add(start / 2 * WideCodes::BYTES);
            for word in start / 2..k.min(start + BLOCK_K).div_ceil(2) {
                fetch(at, WideCodes::BYTES);
                let b = words.read(at).map(|b| std::mem::transmute::<__m512, __m512bh>(b.0));
                at = at.add(WideCodes::BYTES);
                for r in 0..R {
                    let x = _mm512_set1_ps(*rows.a.add(r * rows.stride + word));
                    let x = std::mem::transmute::<__m512, __m512bh>(x);
                    acc[r] = [_mm512_dpbf16_ps(acc[r][0], x, b[0]), _mm512_dpbf16_ps(acc[r][1], x, b[1])];
                }
            }
            let acc = acc.map(|sums| sums.map(Zmm));
            add_block(sums, &acc, fresh && start == 0, Some((&row_scales(rows, block), scales[block])));
        }
    }
}

/// A kernel compiled for its features, once for each number R of rows.
macro_rules! kernel {
    ($features:literal, $name:ident($($arg:ident: $ty:ty),*), [$($count:literal),*], $body:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name($($arg: $ty,)* count: usize) {
            // SAFETY: see the file.
            unsafe {
                match count {
                    $($count => {
                        const R: usize = $count;
                        $body
                    })*
                    _ => unreachable!("{count} rows of one pass"),
                }
            }
        }
    };
}

kernel!(
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    wide_plain(panel: &[f32], call: Call<'_>),
    [1, 2, 3, 4, 5, 6, 7, 8],
    plain::<Zmm, 2, R>(panel, call)
);
kernel!("avx2,fma", narrow_plain(panel: &[f32], call: Call<'_>), [1, 2], plain::<Ymm, 4, R>(panel, call));
kernel!(
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    wide_stored(panel: &[bf16], call: Call<'_>),
    [1, 2, 3, 4, 5, 6, 7, 8],
    widened::<Zmm, _, 2, R>(Stored(panel.as_ptr().cast()), Scales::Nothing, call)
);
kernel!(
    "avx2,fma",
    narrow_stored(panel: &[bf16], call: Call<'_>),
    [1, 2],
    widened::<Ymm, _, 4, R>(Stored(panel.as_ptr().cast()), Scales::Nothing, call)
);
kernel!(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma",
    wide_codes(codes: &[u8], encoding: Encoding, scales: &[f32], call: Call<'_>),
    [1, 2, 3, 4, 5, 6, 7, 8],
    widened::<Zmm, _, 2, R>(WideCodes::new(codes.as_ptr(), encoding), Scales::Sums(scales), call)
);
kernel!(
    "avx2,fma",
    narrow_codes(codes: &[u8], encoding: Encoding, scales: &[f32], call: Call<'_>),
    [1, 2],
    widened::<Ymm, _, 4, R>(NarrowCodes::new(codes.as_ptr(), encoding), Scales::Sums(scales), call)
);
kernel!(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma",
    wide_values(codes: &[u8], encoding: Encoding, scales: &[f32], call: Call<'_>),
    [1, 2, 3, 4, 5, 6, 7, 8],
    widened::<Zmm, _, 2, R>(WideCodes::new(codes.as_ptr(), encoding), Scales::Elements(scales), call)
);
kernel!(
    "avx2,fma",
    narrow_values(codes: &[u8], encoding: Encoding, scales: &[f32], call: Call<'_>),
    [1, 2],
    widened::<Ymm, _, 4, R>(NarrowCodes::new(codes.as_ptr(), encoding), Scales::Elements(scales), call)
);
kernel!(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma",
    pairs_of_codes(codes: &[u8], encoding: Encoding, scales: &[f32], call: Call<'_>),
    [1, 2, 3, 4, 5, 6, 7, 8],
    dotted::<R>(WideCodes::new(codes.as_ptr(), encoding), scales, call)
);

/// The words of blocks, `[..][32]`.
#[inline(always)]
unsafe fn unpack_words<L: Wide, W: Words<L, N>, const N: usize>(words: W, out: &mut [f32]) {
    // SAFETY: see the file; chunks have the bytes of the vectors.
    unsafe {
        for (i, out) in out.chunks_exact_mut(PANEL).enumerate() {
            let at = words.start().add(i * W::BYTES);
            fetch_block(at, W::BYTES);
            for (v, word) in words.read(at).into_iter().enumerate() {
                word.store(out.as_mut_ptr().add(v * L::COUNT));
            }
        }
    }
}

/// The values of blocks, `[k][32]`, the last one perhaps without its second input.
#[inline(always)]
unsafe fn unpack_values<L: Wide, W: Words<L, N>, const N: usize>(words: W, out: &mut [f32]) {
    // SAFETY: see the file; chunks have the bytes of the vectors.
    unsafe {
        for (i, out) in out.chunks_mut(2 * PANEL).enumerate() {
            let at = words.start().add(i * W::BYTES);
            fetch_block(at, W::BYTES);
            for (v, word) in words.read(at).into_iter().enumerate() {
                let to = out.as_mut_ptr().add(v * L::COUNT);
                word.upper().store(to);
                if out.len() > PANEL {
                    word.lower().store(to.add(PANEL));
                }
            }
        }
    }
}

/// Asks for the next block of K, which is read soon, and lies there.
#[inline(always)]
unsafe fn fetch_block(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        // SAFETY: a hint, without effect on values.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(BLOCK_K / 2 * bytes + line).cast()) };
    }
}

/// Calls the body with the words that `isa` makes of codes, compiled for its features.
macro_rules! of_codes {
    ($name:ident, $body:ident) => {
        pub(super) unsafe fn $name(isa: Isa, codes: &[u8], encoding: Encoding, out: &mut [f32]) {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma")]
            unsafe fn wide(codes: *const u8, encoding: Encoding, out: &mut [f32]) {
                // SAFETY: see the file.
                unsafe { $body::<Zmm, WideCodes, 2>(WideCodes::new(codes, encoding), out) }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn narrow(codes: *const u8, encoding: Encoding, out: &mut [f32]) {
                // SAFETY: see the file.
                unsafe { $body::<Ymm, NarrowCodes, 4>(NarrowCodes::new(codes, encoding), out) }
            }
            let unpack = if isa.has_byte_tables() { wide } else { narrow };
            // SAFETY: see the file.
            unsafe { unpack(codes.as_ptr(), encoding, out) }
        }
    };
}
of_codes!(unpack_pairs, unpack_words);
of_codes!(unpack_codes, unpack_values);

pub(super) unsafe fn unpack_bf16(isa: Isa, elements: &[bf16], out: &mut [f32]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn wide(elements: *const u8, out: &mut [f32]) {
        // SAFETY: see the file.
        unsafe { unpack_values::<Zmm, Stored, 2>(Stored(elements), out) }
    }
    #[target_feature(enable = "avx2,fma")]
    unsafe fn narrow(elements: *const u8, out: &mut [f32]) {
        // SAFETY: see the file.
        unsafe { unpack_values::<Ymm, Stored, 4>(Stored(elements), out) }
    }
    let unpack = if isa.kind() == Kind::Avx512 { wide } else { narrow };
    // SAFETY: see the file.
    unsafe { unpack(elements.as_ptr().cast(), out) }
}
