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
mod tile;
mod transpose;

use std::ops::Range;

use rayon::prelude::*;

pub(crate) use codes::{CodeProduct, Form, RowScales, Scaled, pair, run_codes, run_mixed};
pub(crate) use few::{Elements, unpack_bf16, unpack_codes, unpack_pairs};
pub(crate) use pack::Right;
pub(crate) use transpose::transpose_panel;

use crate::isa::Isa;

/// Length of one chain of fused multiply-adds. Fixed: it is part of the result.
pub(crate) const BLOCK_K: usize = 128;
/// Columns of B packed and multiplied together.
pub(crate) const PANEL: usize = 32;
/// Products below this many multiply-adds stay on the calling thread.
const SERIAL_MADDS_MAX: usize = 1 << 19;

/// And those that besides read no more than this of a prepacked weight where it lies: what waits for memory is shared
/// sooner.
const SERIAL_BYTES_MAX: usize = 1 << 16;
/// Most that a part reads of it, so that no thread waits long for the last part.
const PART_BYTES_MAX: usize = 1 << 17;
/// Least, since what is fetched ahead past its end is lost.
const PART_BYTES_MIN: usize = 1 << 15;

/// Outputs of at most this many elements are cut into one part a thread.
const SMALL_OUTPUT: usize = 1 << 15;
/// And of at most this many into two.
const MEDIUM_OUTPUT: usize = 1 << 18;

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
    let few: Vec<Option<usize>> = products.iter().map(|p| few_bytes(isa, p)).collect();
    let few_total: usize = few.iter().flatten().sum();
    if threads == 1 || total <= SERIAL_MADDS_MAX && few_total <= SERIAL_BYTES_MAX {
        products.iter().for_each(|p| tile(isa, p, 0..p.m, 0..p.n));
        return;
    }
    let part_bytes = (few_total / (2 * threads)).clamp(PART_BYTES_MIN, PART_BYTES_MAX);
    let mut tasks = Vec::new();
    for (p, few) in products.iter().zip(few) {
        let (rows_each, cols_each) = match few {
            Some(bytes) => {
                let cols_each = p.n.div_ceil(bytes.div_ceil(part_bytes).max(1));
                (p.m.max(1), cols_each.next_multiple_of(PANEL).max(PANEL))
            }
            None => {
                // Each part packs what it multiplies, so that a small output is cut into few parts.
                let per_thread = match p.m * p.n {
                    ..=SMALL_OUTPUT if products.len() == 1 => 1,
                    ..=MEDIUM_OUTPUT if products.len() == 1 => 2,
                    _ => 4,
                };
                part_sizes(p.m, p.n, (threads * per_thread * cost(p)).div_ceil(total).max(1))
            }
        };
        for row in (0..p.m).step_by(rows_each) {
            for col in (0..p.n).step_by(cols_each) {
                tasks.push((*p, row..(row + rows_each).min(p.m), col..(col + cols_each).min(p.n)));
            }
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|(product, rows, cols)| tile(isa, &product, rows, cols));
}

/// The elements of B if few rows read them where they lie (`few.rs`).
fn few_elements<'a>(isa: Isa, p: &Checked<'a>, rows: usize) -> Option<Elements<'a>> {
    let is_few = |elements: &Elements<'_>| rows <= few::rows_most(isa, *elements, p.form);
    p.b.prepacked().filter(|elements| p.a.col_stride == 1 && is_few(elements))
}

/// Bytes that all rows of such a product read of B.
fn few_bytes(isa: Isa, p: &Checked<'_>) -> Option<usize> {
    few_elements(isa, p, p.m).map(|elements| match elements {
        Elements::F32(data) => size_of_val(data),
        Elements::Bf16(data) => size_of_val(data),
        Elements::Codes(data, ..) => size_of_val(data),
    })
}

/// Rows and columns of each of about `wanted` parts of an output, cut along its longer side first.
fn part_sizes(m: usize, n: usize, wanted: usize) -> (usize, usize) {
    let (rows_most, cols_most) = (m.div_ceil(64).max(1), n.div_ceil(2 * PANEL).max(1));
    let (row_parts, col_parts) = if m >= n {
        let row_parts = wanted.min(rows_most);
        (row_parts, wanted.div_ceil(row_parts).min(cols_most))
    } else {
        let col_parts = wanted.min(cols_most);
        (wanted.div_ceil(col_parts).min(rows_most), col_parts)
    };
    let rows_each = m.div_ceil(row_parts).next_multiple_of(kernel::ROWS_MAX).max(1);
    let cols_each = n.div_ceil(col_parts).next_multiple_of(PANEL).max(1);
    (rows_each, cols_each)
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
    if let Some(elements) = few_elements(isa, p, rows.len()) {
        return few_rows(isa, p, elements, rows, cols);
    }
    tile::run(isa, p, rows, cols);
}

/// [`tile`] for few rows of a prepacked weight: panel after panel, as they lie.
#[allow(unsafe_code)]
fn few_rows(isa: Isa, p: &Checked<'_>, elements: Elements<'_>, rows: Range<usize>, cols: Range<usize>) {
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
            few::panel(isa, elements, p.form, col / PANEL, k, call, out);
        }
    }
}

#[cfg(test)]
mod tests;
