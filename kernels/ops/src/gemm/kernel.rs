//! The micro-kernel: rows of A against one panel of B, a few rows at a time in registers.
//!
//! Every output is one chain `acc = fma(a, b, acc)` from zero over the K block, then stored or added to C. Lanes are
//! different columns, so a vector width never changes a sum. While a few rows are multiplied, their part of C and the next
//! rows of A are fetched into the first-level cache.

#![allow(unsafe_code)]

use super::{Form, PANEL};
use crate::isa::{Isa, Kind};

/// Most rows any kernel takes at once.
pub(super) const ROWS_MAX: usize = 8;

/// K steps between two rounds of fetching ahead: a cache line of a row of A.
const STEPS: usize = 16;

/// Operands of one call.
#[derive(Clone, Copy)]
pub(super) struct Call {
    /// Length of the K block.
    pub(super) k: usize,
    /// Element (i, p) of the first [`rows_per_call`] rows is `a[i * row_stride + p * col_stride]`.
    pub(super) a: *const f32,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
    /// Elements from the first of so many rows to the first of the next.
    pub(super) group: usize,
    /// Element (p, j) is `b[p * b_stride + j]`, j below 32.
    pub(super) b: *const f32,
    pub(super) b_stride: usize,
    /// Element (i, j) is `c[i * c_stride + j]`.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Add the block's sum to C instead of storing it.
    pub(super) add: bool,
    /// Factors of the block's sum before that: a row's, then a column's.
    pub(super) scales: Option<Scales>,
}

/// Factors of the outputs of one call.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    /// Row i has `rows[i * row_stride]`.
    pub(super) rows: *const f32,
    pub(super) row_stride: usize,
    /// One for each column of the panel.
    pub(super) cols: *const f32,
}

impl Call {
    /// The same from the next `rows` rows on, which are a group of A.
    fn below(self, rows: usize) -> Self {
        let scales = self.scales.map(|s| Scales { rows: s.rows.wrapping_add(rows * s.row_stride), ..s });
        let (a, c) = (self.a.wrapping_add(self.group), self.c.wrapping_add(rows * self.c_stride));
        Self { a, c, scales, ..self }
    }
}

/// Rows the kernel of `isa` holds in registers.
pub(super) fn rows_per_call(isa: Isa) -> usize {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => 8,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => 6,
        Kind::Portable => 4,
    }
}

/// Multiplies `rows` rows by `cols` columns (at most a panel).
///
/// # Safety
/// The elements of A and C and the factors named by the sizes must be valid, and `call.k` rows of 32 elements of B; nobody
/// else may touch those of C. Pairs need an `isa` that has their dot product.
pub(super) unsafe fn run(isa: Isa, form: Form, mut call: Call, rows: usize, cols: usize) {
    let half = cols <= PANEL / 2;
    if cols == PANEL || cols == PANEL / 2 {
        // SAFETY: passed on.
        return unsafe { columns(isa, form, call, rows, half) };
    }
    let step = rows_per_call(isa);
    for first in (0..rows).step_by(step) {
        let rows = step.min(rows - first);
        let mut edge = [0f32; ROWS_MAX * PANEL];
        // SAFETY: `edge` holds the rows of a panel; A and B are as the caller promised.
        unsafe { columns(isa, form, Call { c: edge.as_mut_ptr(), c_stride: PANEL, add: false, ..call }, rows, half) };
        for (i, sums) in edge.chunks_exact(PANEL).enumerate().take(rows) {
            // SAFETY: within the rows and columns of C that the caller promised, which nobody else touches.
            let c = unsafe { std::slice::from_raw_parts_mut(call.c.add(i * call.c_stride), cols) };
            if call.add {
                c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
            } else {
                c.copy_from_slice(&sums[..cols]);
            }
        }
        call = call.below(step);
    }
}

/// All columns of a panel, or the first half of them.
unsafe fn columns(isa: Isa, form: Form, call: Call, rows: usize, half: bool) {
    // SAFETY: an `Isa` exists only where its features were detected; operands are as the caller of `run` promised.
    unsafe {
        match isa.kind() {
            #[cfg(target_arch = "x86_64")]
            _ if form == Form::Pairs => wide_pairs(call, rows, half),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => wide(call, rows, half),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => narrow(call, rows, half),
            Kind::Portable => portable(call, rows, half),
        }
    }
}

/// A vector of f32.
pub(super) trait Lanes: Copy {
    const COUNT: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// Asks for the cache line at `p`, which need not exist.
    #[inline(always)]
    unsafe fn fetch(_p: *const f32) {}
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * b + acc`, rounded once.
    unsafe fn fma(self, b: Self, acc: Self) -> Self;
}

/// `R` rows by the first `width` columns of a panel, `V` vectors at a time.
#[inline(always)]
unsafe fn block<L: Lanes, const R: usize, const V: usize>(call: Call, width: usize) {
    let mut col = 0;
    while col < width {
        // SAFETY: rows below R and columns below 32, as the caller of `run` promised.
        unsafe {
            let mut acc = [[L::zero(); V]; R];
            for r in 0..R {
                for v in 0..V {
                    L::fetch(call.c.wrapping_add(r * call.c_stride + col + v * L::COUNT));
                }
            }
            let (mut a, mut b) = (call.a, call.b.add(col));
            let line_stride = if call.col_stride == 1 { call.row_stride } else { STEPS };
            let mut left = call.k;
            while left > 0 {
                for r in 0..R {
                    L::fetch(a.wrapping_add(call.group + r * line_stride));
                }
                for _ in 0..left.min(STEPS) {
                    let mut bs = [L::zero(); V];
                    for v in 0..V {
                        bs[v] = L::load(b.add(v * L::COUNT));
                    }
                    for r in 0..R {
                        let x = L::splat(*a.add(r * call.row_stride));
                        for v in 0..V {
                            acc[r][v] = x.fma(bs[v], acc[r][v]);
                        }
                    }
                    a = a.wrapping_add(call.col_stride);
                    b = b.wrapping_add(call.b_stride);
                }
                left -= left.min(STEPS);
            }
            if let Some(scales) = call.scales {
                for r in 0..R {
                    let row = L::splat(*scales.rows.add(r * scales.row_stride));
                    for v in 0..V {
                        acc[r][v] = acc[r][v].mul(row).mul(L::load(scales.cols.add(col + v * L::COUNT)));
                    }
                }
            }
            if call.add {
                for r in 0..R {
                    for v in 0..V {
                        let c = call.c.add(r * call.c_stride + col + v * L::COUNT);
                        L::load(c).add(acc[r][v]).store(c);
                    }
                }
            } else {
                for r in 0..R {
                    for v in 0..V {
                        acc[r][v].store(call.c.add(r * call.c_stride + col + v * L::COUNT));
                    }
                }
            }
        }
        col += V * L::COUNT;
    }
}

/// All rows: `$full` at a time, then the rest.
macro_rules! by_rows {
    ($lanes:ty, $vectors:literal, $width:expr, $call:ident, $rows:ident, $full:literal, $($r:literal),*) => {{
        let (mut call, mut left) = ($call, $rows);
        while left >= $full {
            // SAFETY: the caller's promise for all rows.
            unsafe { block::<$lanes, $full, $vectors>(call, $width) };
            call = call.below($full);
            left -= $full;
        }
        match left {
            // SAFETY: as above.
            $($r => unsafe { block::<$lanes, $r, $vectors>(call, $width) },)*
            _ => {}
        }
    }};
}

/// Lanes of which two vectors are a panel.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn by_sixteen<L: Lanes>(call: Call, rows: usize, half: bool) {
    if half {
        by_rows!(L, 1, PANEL / 2, call, rows, 8, 1, 2, 3, 4, 5, 6, 7)
    } else {
        by_rows!(L, 2, PANEL, call, rows, 8, 1, 2, 3, 4, 5, 6, 7)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn wide(call: Call, rows: usize, half: bool) {
    // SAFETY: the features of the lanes are this function's; operands are as the caller of `run` promised.
    unsafe { by_sixteen::<x86::Zmm>(call, rows, half) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn wide_pairs(call: Call, rows: usize, half: bool) {
    // SAFETY: the features of the lanes are this function's; operands are as the caller of `run` promised.
    unsafe { by_sixteen::<x86::ZmmPairs>(call, rows, half) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn narrow(call: Call, rows: usize, half: bool) {
    by_rows!(x86::Ymm, 2, if half { PANEL / 2 } else { PANEL }, call, rows, 6, 1, 2, 3, 4, 5)
}

unsafe fn portable(call: Call, rows: usize, half: bool) {
    by_rows!(Four, 2, if half { PANEL / 2 } else { PANEL }, call, rows, 4, 1, 2, 3)
}

/// Four lanes in plain Rust.
#[derive(Clone, Copy)]
struct Four([f32; 4]);

impl Lanes for Four {
    const COUNT: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 4])
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises four elements; unaligned is allowed.
        Self(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as for `load`.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, acc: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], acc.0[i])))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Ymm, Zmm};

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Vectors of the x86 kernels. SAFETY of every method: only called from functions compiled for its features.

    use std::arch::x86_64::*;

    use super::Lanes;

    #[derive(Clone, Copy)]
    pub(in super::super) struct Zmm(pub(in super::super) __m512);
    /// BF16 pairs when multiplied, f32 otherwise.
    #[derive(Clone, Copy)]
    pub(super) struct ZmmPairs(__m512);
    #[derive(Clone, Copy)]
    pub(in super::super) struct Ymm(pub(in super::super) __m256);

    macro_rules! lanes {
        ($name:ident, $count:literal, $zero:ident, $splat:ident, $load:ident, $store:ident, $add:ident, $mul:ident, $fma:ident) => {
            impl Lanes for $name {
                const COUNT: usize = $count;
                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: see the module.
                    Self(unsafe { $zero() })
                }
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: see the module.
                    Self(unsafe { $splat(x) })
                }
                #[inline(always)]
                unsafe fn load(p: *const f32) -> Self {
                    // SAFETY: see the module; the caller promises the elements.
                    Self(unsafe { $load(p) })
                }
                #[inline(always)]
                unsafe fn store(self, p: *mut f32) {
                    // SAFETY: see the module; the caller promises the elements.
                    unsafe { $store(p, self.0) }
                }
                #[inline(always)]
                unsafe fn fetch(p: *const f32) {
                    // SAFETY: see the module; a prefetch touches nothing.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: see the module.
                    Self(unsafe { $add(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn mul(self, other: Self) -> Self {
                    // SAFETY: see the module.
                    Self(unsafe { $mul(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn fma(self, b: Self, acc: Self) -> Self {
                    // SAFETY: see the module.
                    Self(unsafe { $fma(self.0, b.0, acc.0) })
                }
            }
        };
    }

    lanes!(
        Zmm,
        16,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps
    );
    lanes!(
        ZmmPairs,
        16,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_mul_ps,
        dot_pairs
    );

    /// acc + a's upper half · b's upper half, rounded, then the lower halves: the order of `Isa::has_bf16_dot`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn dot_pairs(a: __m512, b: __m512, acc: __m512) -> __m512 {
        // SAFETY: both are 512 bits without invalid values.
        unsafe {
            _mm512_dpbf16_ps(
                acc,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    }
    lanes!(
        Ymm,
        8,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps
    );
}
