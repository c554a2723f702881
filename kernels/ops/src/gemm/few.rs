//! Few rows of A against a prepacked weight: every panel is streamed once and decoded in registers.
//!
//! A panel's layout is that of `weight/layout.rs`. A block of two inputs becomes vectors of pairs (`few/words.rs`), which
//! are multiplied as they are (FP8 codes, by the dot product of BF16 pairs) or widened to the f32 of k and of k + 1. An
//! output is the chain of `gemm.rs`, block by block, with the scales of `gemm/codes.rs` where A has codes too; where it has
//! not, codes are multiplied by their scale first. So the bits are those of the kernels that pack. Where there is no kernel
//! (portable; AVX2 for more than [`ROWS_NARROW`] rows) the panel is packed for the usual ones, to the same result.

#![allow(unsafe_code)]

use half::bf16;

use super::{Form, PANEL};
use crate::fp8::Encoding;
use crate::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod words;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Rows that pass over a panel together.
const ROWS_MAX: usize = 8;
/// The same in vectors of 8, of which a panel's sums take four a row.
const ROWS_PASS_NARROW: usize = 2;
/// Rows from where on decoding a panel once, into memory, is faster than doing it in registers for every
/// [`ROWS_PASS_NARROW`] of them.
const ROWS_NARROW: usize = 4;
/// Rows up to which AVX-512 reads a panel again for every [`ROWS_MAX`] of them.
const ROWS_WIDE: usize = 16;

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
    /// Scale of row i in block b: `scales[i * scale_strides.0 + b * scale_strides.1]`; null where A holds no codes.
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

/// How many rows [`panel`] takes of such elements; `form` says what A holds.
pub(super) fn rows_most(isa: Isa, elements: Elements<'_>, form: Form) -> usize {
    match isa.kind() {
        // Without their dot product there are no words of pairs (`codes.rs` sees to that), and no kernel.
        _ if form == Form::Pairs && !isa.has_bf16_dot() => 0,
        #[cfg(target_arch = "x86_64")]
        crate::isa::Kind::Avx512 => match (elements, form) {
            (Elements::Codes(..), Form::F32) if !isa.has_byte_tables() => ROWS_NARROW,
            _ => ROWS_WIDE,
        },
        #[cfg(target_arch = "x86_64")]
        crate::isa::Kind::Avx2 => ROWS_NARROW,
        crate::isa::Kind::Portable => 0,
    }
}

/// Multiplies `rows` by panel `index` of a matrix with `k` inputs.
///
/// # Safety
/// [`rows_most`] must allow the rows. They must be valid for `k` elements of A (in f32; words of pairs: ⌈k/2⌉), their
/// scales, or null with strides of 0, for ⌈k/128⌉ blocks, and the outputs for as many rows of `out.cols` columns, which
/// nobody else touches.
///
/// # Panics
/// When the matrix has no such panel.
pub(super) unsafe fn panel(isa: Isa, elements: Elements<'_>, form: Form, index: usize, k: usize, rows: Rows, out: Out) {
    #[cfg(target_arch = "x86_64")]
    {
        let panel = x86::panel_of(elements, index, k);
        let kernel = x86::Kernel::of(isa, elements, form);
        for first in (0..rows.count).step_by(kernel.rows()) {
            let count = kernel.rows().min(rows.count - first);
            // SAFETY: rows below `rows.count`; `rows_most` found the features; the rest is the caller's promise.
            unsafe {
                let scales = rows.scales.wrapping_add(first * rows.scale_strides.0);
                let rows = Rows { a: rows.a.add(first * rows.stride), scales, count, ..rows };
                kernel.run(panel, k, rows, Out { c: out.c.add(first * out.stride), ..out });
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no rows are few without a kernel: {:?}", (isa, elements, form, index, k, rows.count, out.cols));
}

/// Words of pairs, `[..][32]`, of a panel's blocks of codes; false where only the written form can make them.
pub(crate) fn unpack_pairs(isa: Isa, codes: &[u8], encoding: Encoding, out: &mut [f32]) -> bool {
    assert_eq!(codes.len(), 2 * out.len(), "two codes make a word");
    #[cfg(target_arch = "x86_64")]
    if isa.kind() != crate::isa::Kind::Portable {
        // SAFETY: the features are those of the set, and the sizes are checked.
        unsafe { x86::unpack_pairs(isa, codes, encoding, out) };
        return true;
    }
    let _ = (isa, codes, encoding, out);
    false
}

/// The values at scale 1, `[k][32]`, of a panel's blocks of codes, the last one perhaps without its second input; false as
/// above.
pub(crate) fn unpack_codes(isa: Isa, codes: &[u8], encoding: Encoding, out: &mut [f32]) -> bool {
    assert!(codes.len() >= out.len() && out.len().is_multiple_of(PANEL), "a code makes a value");
    #[cfg(target_arch = "x86_64")]
    if isa.kind() != crate::isa::Kind::Portable {
        // SAFETY: as above.
        unsafe { x86::unpack_codes(isa, codes, encoding, out) };
        return true;
    }
    let _ = (isa, codes, encoding, out);
    false
}

/// The same of BF16 elements.
pub(crate) fn unpack_bf16(isa: Isa, elements: &[bf16], out: &mut [f32]) -> bool {
    assert!(elements.len() >= out.len() && out.len().is_multiple_of(PANEL), "an element makes a value");
    #[cfg(target_arch = "x86_64")]
    if isa.kind() != crate::isa::Kind::Portable {
        // SAFETY: as above.
        unsafe { x86::unpack_bf16(isa, elements, out) };
        return true;
    }
    let _ = (isa, elements, out);
    false
}

#[cfg(test)]
mod tests;
