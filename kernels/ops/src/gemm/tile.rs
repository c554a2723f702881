//! One thread's part of a product: what is packed when, so that what is read again lies in a near cache.
//!
//! For a group of columns and a few K blocks, panels of B are packed once, a second-level working set; then blocks of
//! [`BLOCK_M`] rows of A pass over them, panel by panel, K block by K block, so that the part of C under way stays in
//! the caches too. A is read where it lies if its rows are contiguous, otherwise packed as the kernel wants it.
//!
//! **Invariant**: K blocks reach each element of C in order; nothing else here can change a bit.

use std::ops::Range;

use super::{Checked, Mat, PANEL, kernel, pack};
use crate::isa::Isa;
use crate::scratch;

/// Rows of A that stay in cache while packed panels pass over them.
const BLOCK_M: usize = 96;
/// K blocks packed before rows are visited.
const BLOCKS: usize = 4;
/// The same where A is packed too, or comes from far away: more panels read each of its elements then.
const BLOCKS_WIDE: usize = 2;
/// Panels times K blocks packed before rows are visited: 256 KiB.
const VIEWS: usize = 16;
/// A whose rows are longer than this does not stay in the caches from one group of columns to the next.
const LONG_ROWS: usize = 1024;
/// Elements between packed groups of rows beyond their length: a cache line, so that they do not collide in the caches.
const GAP: usize = 16;

/// Computes `c[rows, cols]`. The start of `cols` is a multiple of [`PANEL`].
pub(super) fn run(isa: Isa, p: &Checked<'_>, rows: Range<usize>, cols: Range<usize>) {
    let step = kernel::rows_per_call(isa);
    let block = p.form.block();
    let few = rows.len() <= 2 * kernel::ROWS_MAX;
    let blocks_most = match p.a.col_stride {
        _ if few => 1,
        1 if p.a.row_stride < LONG_ROWS => BLOCKS,
        _ => BLOCKS_WIDE,
    };
    let blocks = p.k.div_ceil(block).clamp(1, blocks_most);
    // A few rows read each panel once, so a panel at a time stays in the first-level cache.
    let group = if few { PANEL } else { VIEWS / blocks * PANEL };
    let left = match p.a.col_stride {
        1 => Left::Direct,
        _ => Left::Packed { step, group: step * block + GAP },
    };
    let packed_cols = group.min(cols.len().next_multiple_of(PANEL));
    scratch::with_f32(packed_cols * blocks * block, |packed_b| {
        scratch::with_f32(left.packed_len(blocks), |packed_a| {
            for col in cols.clone().step_by(group) {
                let cols = col..(col + group).min(cols.end);
                for start in (0..p.k).step_by(blocks * block) {
                    let ks = start..(start + blocks * block).min(p.k);
                    panels(isa, p, [rows.clone(), cols.clone(), ks], left, packed_b, packed_a);
                }
            }
        });
    });
}

/// The K blocks of `block` words within `ks`.
fn k_blocks(ks: Range<usize>, block: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    ks.clone().step_by(block).map(move |start| start..(start + block).min(ks.end))
}

/// A panel of B of one K block: its elements, the distance between its rows, and the scales of its columns.
#[derive(Clone, Copy)]
struct View {
    data: *const f32,
    stride: usize,
    scales: [f32; PANEL],
}

/// A few K blocks of a group of panels against all rows.
fn panels(
    isa: Isa,
    p: &Checked<'_>,
    [rows, cols, ks]: [Range<usize>; 3],
    left: Left,
    packed_b: &mut [f32],
    packed_a: &mut [f32],
) {
    let (few_rows, block) = (rows.len() <= 32, p.form.block());
    let mut views = [View { data: std::ptr::null(), stride: 0, scales: [1.0; PANEL] }; VIEWS];
    let panels = cols.clone().step_by(PANEL).map(|col| col..(col + PANEL).min(cols.end));
    let places = panels.flat_map(|panel| k_blocks(ks.clone(), block).map(move |ks| (panel.clone(), ks)));
    for ((view, out), (panel, ks)) in views.iter_mut().zip(packed_b.chunks_mut(PANEL * block)).zip(places) {
        if p.row_scales.is_some() {
            p.b.scales(ks.start / block, panel.clone(), &mut view.scales);
        }
        (view.data, view.stride) = match p.b.in_place(ks.clone(), panel.clone(), few_rows) {
            Some((data, stride)) => (data.as_ptr(), stride),
            None => {
                let out = &mut out[..ks.len() * PANEL];
                p.b.pack(isa, ks, panel, out);
                (out.as_ptr(), PANEL)
            }
        };
    }
    for first in rows.clone().step_by(BLOCK_M) {
        let rows = first..(first + BLOCK_M).min(rows.end);
        left.pack(p.a, rows.clone(), k_blocks(ks.clone(), block), packed_a);
        row_block(isa, p, [rows, cols.clone(), ks.clone()], &views, (left, packed_a));
    }
}

/// How the kernel reads a block of A.
#[derive(Clone, Copy)]
enum Left {
    /// Where it lies, contiguous along k.
    Direct,
    /// From groups of `step` rows side by side, `[k][step]`, each `group` elements after the one before, for each K block.
    Packed { step: usize, group: usize },
}

impl Left {
    fn packed_len(self, blocks: usize) -> usize {
        match self {
            Self::Direct => 0,
            Self::Packed { step, group } => BLOCK_M.div_ceil(step) * group * blocks,
        }
    }

    /// Packs the K blocks `blocks` of `rows`.
    fn pack(self, a: Mat<'_>, rows: Range<usize>, blocks: impl Iterator<Item = Range<usize>>, out: &mut [f32]) {
        match self {
            Self::Direct => {}
            Self::Packed { step, group } => {
                for (ks, out) in blocks.zip(out.chunks_exact_mut(BLOCK_M.div_ceil(step) * group)) {
                    pack::left(a, rows.clone(), ks, (step, group), out);
                }
            }
        }
    }

    /// Where the rows from `first` on, `step` at a time, begin in the `index`th K block, which starts at `ks.start`; the
    /// distances between rows, columns and groups of `step` rows.
    fn at(
        self,
        a: Mat<'_>,
        packed: &[f32],
        (first, step): (usize, usize),
        index: usize,
        ks: &Range<usize>,
    ) -> (*const f32, usize, usize, usize) {
        match self {
            Self::Direct => (a.data[first * a.row_stride + ks.start..].as_ptr(), a.row_stride, 1, step * a.row_stride),
            Self::Packed { step, group } => (packed[index * BLOCK_M.div_ceil(step) * group..].as_ptr(), 1, step, group),
        }
    }
}

/// A few K blocks of a group of panels against one block of rows.
#[allow(unsafe_code)]
fn row_block(
    isa: Isa,
    p: &Checked<'_>,
    [rows, cols, ks]: [Range<usize>; 3],
    views: &[View; VIEWS],
    (left, packed_a): (Left, &[f32]),
) {
    let (step, block) = (kernel::rows_per_call(isa), p.form.block());
    let blocks = ks.len().div_ceil(block);
    for (views, col) in views.chunks(blocks).zip(cols.clone().step_by(PANEL)) {
        for (index, (ks, view)) in k_blocks(ks.clone(), block).zip(views).enumerate() {
            let (a, row_stride, col_stride, group) = left.at(p.a, packed_a, (rows.start, step), index, &ks);
            let call = kernel::Call {
                k: ks.len(),
                a,
                row_stride,
                col_stride,
                group,
                b: view.data,
                b_stride: view.stride,
                // SAFETY: `check` proved that C holds this element.
                c: unsafe { p.c.add(rows.start * p.c_stride + col) },
                c_stride: p.c_stride,
                add: p.accumulate || ks.start > 0,
                scales: p.row_scales.map(|scales| kernel::Scales {
                    rows: scales.from(rows.start, ks.start / block).as_ptr(),
                    row_stride: scales.row_stride,
                    cols: view.scales.as_ptr(),
                }),
            };
            // SAFETY: A, or what was packed of it, holds the rows and the K block by `check`; the view of B holds
            // `ks.len()` rows of a panel; C holds the rows and columns, and no other thread touches this tile.
            unsafe { kernel::run(isa, p.form, call, rows.len(), PANEL.min(cols.end - col)) };
        }
    }
}
