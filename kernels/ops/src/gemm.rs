//! General matrix product, C (+)= A·B, under the numerics rule of the crate.
//!
//! k is cut into blocks of [`BLOCK_K`]. Within a block an output is one chain of fused multiply-adds from zero in k order;
//! block sums are added in order, to C when accumulating. Nothing else touches the bits: tiles over rows and columns,
//! threads, packing and the instruction set only decide when an output is computed. B is read in panels of
//! [`PANEL`] columns, packed from whatever encoding it has.

mod codes;
mod few;
mod kernel;
mod pack;
mod transpose;

use std::ops::Range;

use rayon::prelude::*;

pub(crate) use codes::{CodeProduct, Form, RowScales, Scaled, pair, run_codes, run_mixed};
pub(crate) use few::Elements;
pub(crate) use pack::Right;
pub(crate) use transpose::transpose_panel;

use crate::isa::Isa;
use crate::scratch;

/// Length of one chain of fused multiply-adds. Fixed: it is part of the result.
pub(crate) const BLOCK_K: usize = 128;
/// Columns of B packed and multiplied together.
pub(crate) const PANEL: usize = 32;
/// Panels packed before rows are visited: a 128 KiB second-level working set.
const GROUP_PANELS: usize = 8;
/// Rows of A that stay in cache while the panels of a group pass over them.
const BLOCK_M: usize = 96;
/// Rows up to which a prepacked weight is decoded as it is read, once for every eight of them.
const FEW_ROWS: usize = 16;
/// Products below this many multiply-adds stay on the calling thread.
const SERIAL_MADDS_MAX: usize = 1 << 19;

/// A strided view of an f32 matrix.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    /// Elements; element (i, j) is `data[i * row_stride + j * col_stride]`.
    pub(crate) data: &'a [f32],
    /// Distance between rows, in elements.
    pub(crate) row_stride: usize,
    /// Distance between columns, in elements.
    pub(crate) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major `[.., cols]`.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: cols, col_stride: 1 }
    }

    /// The transpose of row-major `[.., cols]`.
    pub(crate) fn transposed(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: 1, col_stride: cols }
    }

    /// Whether element (rows-1, cols-1) exists.
    fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// One product of a batch: `c[m, n] (+)= a[m, k] · b[k, n]`.
pub(crate) struct Product<'a> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: Mat<'a>,
    pub(crate) b: &'a dyn Right,
    /// Row-major with `c_stride` elements between rows.
    pub(crate) c: &'a mut [f32],
    pub(crate) c_stride: usize,
    /// Add to `c` instead of replacing it.
    pub(crate) accumulate: bool,
}

/// One product in the calling thread.
pub(crate) fn run_serial(mut product: Product<'_>) {
    let checked = check(&mut product);
    tile(Isa::best(), &checked, 0..checked.m, 0..checked.n);
}

/// `c[m, n] (+)= a[m, k] · b[k, n]` on the threads of the current rayon pool when the product is worth it. `c` is
/// row-major with `c_stride` elements between rows.
pub(crate) fn gemm(
    m: usize,
    n: usize,
    k: usize,
    a: Mat<'_>,
    b: Mat<'_>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    run(Isa::best(), &mut [Product { m, n, k, a, b: &b, c, c_stride, accumulate }]);
}

/// A product whose sizes were checked, with C as a pointer so that tiles of it can be written from several threads.
#[derive(Clone, Copy)]
struct Checked<'a> {
    m: usize,
    n: usize,
    k: usize,
    form: Form,
    row_scales: Option<RowScales<'a>>,
    a: Mat<'a>,
    b: &'a dyn Right,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
}

// SAFETY: the pointer comes from a `&mut [f32]` borrowed for 'a; `run` gives every thread its own tile of it.
#[allow(unsafe_code)]
unsafe impl Send for Checked<'_> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Checked<'_> {}

fn check<'a>(product: &'a mut Product<'_>) -> Checked<'a> {
    let Product { m, n, k, a, b, c, c_stride, accumulate } = product;
    let (m, n) = (*m, *n);
    assert!(a.holds(m, *k), "gemm: A has too few elements for {m} x {k}");
    assert!(b.holds(*k, n), "gemm: B has too few elements for {k} x {n}");
    assert!(m == 0 || n == 0 || (m - 1) * *c_stride + n <= c.len(), "gemm: C has too few elements for {m} x {n}");
    assert!(m <= 1 || n <= *c_stride, "gemm: rows of C overlap");
    let (a, b, c) = (*a, *b, c.as_mut_ptr());
    Checked { m, n, k: *k, form: Form::F32, row_scales: None, a, b, c, c_stride: *c_stride, accumulate: *accumulate }
}

/// Runs independent products, tiles of all of them in parallel.
pub(crate) fn run(isa: Isa, products: &mut [Product<'_>]) {
    run_checked(isa, &products.iter_mut().map(check).collect::<Vec<_>>());
}

fn run_checked(isa: Isa, products: &[Checked<'_>]) {
    let cost = |p: &Checked<'_>| p.m.max(4) * p.n * p.k;
    let total: usize = products.iter().map(cost).sum();
    let threads = rayon::current_num_threads();
    if threads == 1 || total <= SERIAL_MADDS_MAX {
        products.iter().for_each(|p| tile(isa, p, 0..p.m, 0..p.n));
        return;
    }
    let mut tasks = Vec::new();
    for p in products {
        let wanted = (threads * 4 * cost(p)).div_ceil(total).max(1);
        let (m, n) = (p.m, p.n);
        let row_parts = wanted.min(m.div_ceil(64)).max(1);
        let col_parts = wanted.div_ceil(row_parts).min(n.div_ceil(PANEL)).max(1);
        let rows_each = m.div_ceil(row_parts).next_multiple_of(8);
        let cols_each = n.div_ceil(col_parts).next_multiple_of(PANEL);
        for row in (0..m).step_by(rows_each) {
            for col in (0..n).step_by(cols_each) {
                tasks.push((*p, row..(row + rows_each).min(m), col..(col + cols_each).min(n)));
            }
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|(product, rows, cols)| tile(isa, &product, rows, cols));
}

/// Computes `c[rows, cols]`. The start of `cols` is a multiple of [`PANEL`].
#[allow(unsafe_code)]
fn tile(isa: Isa, p: &Checked<'_>, rows: Range<usize>, cols: Range<usize>) {
    if p.k == 0 && !p.accumulate {
        for row in rows.clone() {
            // SAFETY: `check` proved that C holds every row and column of the product; this tile belongs to this call.
            unsafe { std::slice::from_raw_parts_mut(p.c.add(row * p.c_stride + cols.start), cols.len()).fill(0.0) };
        }
        return;
    }
    let few = |elements: &Elements<'_>| {
        rows.len() <= FEW_ROWS && p.a.col_stride == 1 && few::has_kernel(isa, *elements, p.form == Form::Pairs)
    };
    if let Some(elements) = p.b.prepacked().filter(few) {
        return few_rows(p, elements, rows, cols);
    }
    // A few rows read each panel once, so a panel at a time stays in the first-level cache.
    let group = if rows.len() <= 2 * kernel::ROWS_MAX { PANEL } else { GROUP_PANELS * PANEL };
    scratch::with_f32(group * BLOCK_K, |packed_b| {
        for col in cols.clone().step_by(group) {
            let group_cols = col..(col + group).min(cols.end);
            for block in (0..p.k).step_by(p.form.block()) {
                let ks = block..(block + p.form.block()).min(p.k);
                panels(isa, p, rows.clone(), group_cols.clone(), ks, packed_b);
            }
        }
    });
}

/// [`tile`] for few rows of a prepacked weight: panel after panel, as they lie.
#[allow(unsafe_code)]
fn few_rows(p: &Checked<'_>, elements: Elements<'_>, rows: Range<usize>, cols: Range<usize>) {
    // An odd k ends with half a word, which holds a zero, and so does the panel.
    let k = if p.form == Form::Pairs { 2 * p.k } else { p.k };
    let (scales, scale_strides) = match p.row_scales {
        None => (std::ptr::null(), (0, 0)),
        Some(scales) => (scales.from(rows.start, 0).as_ptr(), (scales.row_stride, scales.block_stride)),
    };
    for col in cols.clone().step_by(PANEL) {
        let a = p.a.data[rows.start * p.a.row_stride..].as_ptr();
        let call = few::Rows { a, stride: p.a.row_stride, scales, scale_strides, count: rows.len() };
        // SAFETY: `check` proved that C holds these rows and columns, and A the rows; this tile belongs to this call.
        unsafe {
            let c = p.c.add(rows.start * p.c_stride + col);
            let out = few::Out { c, stride: p.c_stride, cols: PANEL.min(cols.end - col), add: p.accumulate };
            few::panel(elements, col / PANEL, k, call, out);
        }
    }
}

/// One K block of a group of panels against all rows.
#[allow(unsafe_code)]
fn panels(isa: Isa, p: &Checked<'_>, rows: Range<usize>, cols: Range<usize>, ks: Range<usize>, packed_b: &mut [f32]) {
    let add = p.accumulate || ks.start > 0;
    let few_rows = rows.len() <= 32;
    let mut views = [(std::ptr::null::<f32>(), 0usize); GROUP_PANELS];
    for ((view, out), col) in
        views.iter_mut().zip(packed_b.chunks_mut(PANEL * BLOCK_K)).zip(cols.clone().step_by(PANEL))
    {
        let panel = col..(col + PANEL).min(cols.end);
        *view = match p.b.in_place(ks.clone(), panel.clone(), few_rows) {
            Some((data, stride)) => (data.as_ptr(), stride),
            None => {
                p.b.pack(isa, ks.clone(), panel, &mut out[..ks.len() * PANEL]);
                (out.as_ptr(), PANEL)
            }
        };
    }
    let mut col_scales = [[1.0; PANEL]; GROUP_PANELS];
    if p.row_scales.is_some() {
        for (out, col) in col_scales.iter_mut().zip(cols.clone().step_by(PANEL)) {
            p.b.scales(ks.start / p.form.block(), col..(col + PANEL).min(cols.end), out);
        }
    }
    let step = kernel::rows_per_call(isa);
    let packs_a = p.a.col_stride != 1;
    let pack_len = if packs_a { BLOCK_M * BLOCK_K } else { 0 };
    scratch::with_f32(pack_len, |packed_a| {
        for first in rows.clone().step_by(BLOCK_M) {
            let block = first..(first + BLOCK_M).min(rows.end);
            if packs_a {
                pack::left(p.a, block.clone(), ks.clone(), step, packed_a);
            }
            for ((view, col), scales) in views.iter().zip(cols.clone().step_by(PANEL)).zip(&col_scales) {
                for row in block.clone().step_by(step) {
                    let (a, row_stride, col_stride) = if packs_a {
                        (packed_a[(row - first) * ks.len()..].as_ptr(), 1, step)
                    } else {
                        (p.a.data[row * p.a.row_stride + ks.start..].as_ptr(), p.a.row_stride, 1)
                    };
                    let call = kernel::Call {
                        k: ks.len(),
                        a,
                        row_stride,
                        col_stride,
                        b: view.0,
                        b_stride: view.1,
                        // SAFETY: `check` proved that C holds this element.
                        c: unsafe { p.c.add(row * p.c_stride + col) },
                        c_stride: p.c_stride,
                        add,
                        scales: p.row_scales.map(|rows| kernel::Scales {
                            rows: rows.from(row, ks.start / p.form.block()).as_ptr(),
                            row_stride: rows.row_stride,
                            cols: scales.as_ptr(),
                        }),
                    };
                    // SAFETY: A holds the rows and the K block by `check`; the view of B holds `ks.len()` rows of a panel;
                    // C holds the rows and columns, and no other thread touches this tile.
                    unsafe { kernel::run(isa, p.form, call, step.min(block.end - row), PANEL.min(cols.end - col)) };
                }
            }
        }
    });
}

#[cfg(test)]
mod tests;
