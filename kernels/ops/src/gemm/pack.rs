//! Packing: what the micro-kernel reads, from matrices as they lie.
//!
//! A panel of B is `[k][32]`, zero past the last column. A block of A whose rows are not contiguous along k is packed as
//! groups `[k][step]` of rows, zero past the last row.

use std::ops::Range;

use super::few::Elements;
use super::{Mat, PANEL, transpose_panel};
use crate::isa::Isa;

/// Rows to fetch ahead where they lie too far apart for the processor to do it by itself.
const AHEAD: usize = 16;

/// The right operand of a product, `[k, n]`, in any encoding.
pub(crate) trait Right: Sync {
    /// Whether it has `k` rows and `n` columns.
    fn holds(&self, k: usize, n: usize) -> bool;

    /// The panel where it lies, with the distance between its rows, if the kernel can read it there: a full panel of
    /// f32 contiguous along n. `once` says that only few rows of A will read it.
    fn in_place(&self, ks: Range<usize>, cols: Range<usize>, once: bool) -> Option<(&[f32], usize)>;

    /// Writes rows `ks` (within one K block) of columns `cols` (at most a panel, starting at one) to `out`
    /// `[ks.len()][32]`.
    fn pack(&self, isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]);

    /// The elements, if they are a prepacked weight's, which few rows read as they lie.
    fn prepacked(&self) -> Option<Elements<'_>> {
        None
    }

    /// Scales of the tiles that hold columns `cols` in a K block; 1 unless the operand is one of codes.
    fn scales(&self, _block: usize, _cols: Range<usize>, out: &mut [f32; PANEL]) {
        *out = [1.0; PANEL];
    }
}

impl Right for Mat<'_> {
    fn holds(&self, k: usize, n: usize) -> bool {
        Mat::holds(self, k, n)
    }

    fn in_place(&self, ks: Range<usize>, cols: Range<usize>, once: bool) -> Option<(&[f32], usize)> {
        // Far-apart rows collide in the first-level cache, so a panel read many times is better packed.
        if self.col_stride != 1 || cols.len() != PANEL || !(once || self.row_stride <= PANEL) {
            return None;
        }
        let start = ks.start * self.row_stride + cols.start;
        let len = (ks.len() - 1) * self.row_stride + PANEL;
        Some((&self.data[start..start + len], self.row_stride))
    }

    fn pack(&self, isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let width = cols.len();
        if self.col_stride == 1 {
            for (k, out) in ks.zip(out.chunks_exact_mut(PANEL)) {
                let start = k * self.row_stride + cols.start;
                fetch(self.data, start + AHEAD * self.row_stride);
                fetch(self.data, start + AHEAD * self.row_stride + PANEL / 2);
                copy_padded::<PANEL>(&self.data[start..start + width], out);
            }
        } else if self.row_stride == 1 {
            let start = cols.start * self.col_stride + ks.start;
            transpose_panel(isa, &self.data[start..], self.col_stride, width, ks.len(), out);
        } else {
            for (k, out) in ks.zip(out.chunks_exact_mut(PANEL)) {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = if j < width {
                        self.data[k * self.row_stride + (cols.start + j) * self.col_stride]
                    } else {
                        0.0
                    };
                }
            }
        }
    }
}

/// Asks for the cache line of an element, if there is one.
#[inline(always)]
fn fetch(data: &[f32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(element) = data.get(at) {
        // SAFETY: the element exists; a prefetch changes nothing.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(element).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, at);
}

/// Copies `from`, at most `N` elements, and zeros after it. A full run is a few vector moves, not a call.
#[inline(always)]
fn copy_padded<const N: usize>(from: &[f32], out: &mut [f32]) {
    let out = &mut out[..N];
    match <&[f32; N]>::try_from(from) {
        Ok(full) => out.copy_from_slice(full),
        Err(_) => {
            out[..from.len()].copy_from_slice(from);
            out[from.len()..].fill(0.0);
        }
    }
}

/// Packs rows `rows` and columns `ks` of `a`, `step` (4, 6 or 8) rows side by side; such groups lie `group` elements apart.
pub(super) fn left(a: Mat<'_>, rows: Range<usize>, ks: Range<usize>, (step, group): (usize, usize), out: &mut [f32]) {
    match step {
        8 => left_by::<8>(a, rows, ks, group, out),
        6 => left_by::<6>(a, rows, ks, group, out),
        _ => left_by::<4>(a, rows, ks, group, out),
    }
}

fn left_by<const STEP: usize>(a: Mat<'_>, rows: Range<usize>, ks: Range<usize>, group: usize, out: &mut [f32]) {
    if a.row_stride == 1 {
        // A row of the transpose at a time, since its parts share cache lines.
        for (i, k) in ks.enumerate() {
            let start = k * a.col_stride;
            let from = &a.data[start + rows.start..start + rows.end];
            for line in (0..from.len()).step_by(PANEL / 2) {
                fetch(a.data, start + rows.start + line + AHEAD * a.col_stride);
            }
            for (from, out) in from.chunks(STEP).zip(out.chunks_mut(group)) {
                copy_padded::<STEP>(from, &mut out[i * STEP..]);
            }
        }
        return;
    }
    for (first, out) in rows.clone().step_by(STEP).zip(out.chunks_mut(group)) {
        let width = STEP.min(rows.end - first);
        for (k, out) in ks.clone().zip(out.chunks_exact_mut(STEP)) {
            let start = first * a.row_stride + k * a.col_stride;
            for (i, out) in out.iter_mut().enumerate() {
                *out = if i < width { a.data[start + i * a.row_stride] } else { 0.0 };
            }
        }
    }
}
