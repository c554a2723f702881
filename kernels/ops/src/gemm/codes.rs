//! Products of FP8 codes: sums of code · code in blocks of [`BLOCK_K`], each multiplied by the scales of its tiles.
//!
//! c_ij (+)= Σ_blocks (fma chain over k of a_ik · b_kj) · s_i · t_j, where s and t are the scales of the tiles that hold the
//! block's part of row i and column j. (Report §3.3.2: partial sums over 128 elements are scaled as they are added up.)
//!
//! Codes are exact in BF16, so an operand has one of two forms, which give the same bits. *F32*: one element a word.
//! *Pairs*: a word holds two BF16 values, that of k in its upper half and that of k + 1 in its lower one (zero past the
//! end). The instruction that multiplies words of pairs adds the upper product first and rounds after each, so it is
//! the same chain at half the instructions; numbers that small that it would flush to zero do not occur, since products
//! of codes are multiples of 2^-32. Words are kept as f32 for their bits: packing only moves them.

use std::ops::Range;

use super::{BLOCK_K, Checked, Mat, PANEL, Product, Right, check, run_checked};
use crate::isa::Isa;

/// What a 32-bit word of an operand holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// One f32.
    F32,
    /// Two BF16 values.
    Pairs,
}

impl Form {
    /// The form in which `isa` multiplies codes fastest.
    pub(crate) fn of_codes(isa: Isa) -> Self {
        if isa.has_bf16_dot() { Self::Pairs } else { Self::F32 }
    }

    /// Words of `k` elements.
    pub(crate) fn words(self, k: usize) -> usize {
        match self {
            Self::F32 => k,
            Self::Pairs => k.div_ceil(2),
        }
    }

    /// Words of a K block.
    pub(super) fn block(self) -> usize {
        self.words(BLOCK_K)
    }
}

/// The word of two values that are exact in BF16, `first` that of k.
#[inline(always)]
pub(crate) fn pair(first: f32, second: f32) -> f32 {
    f32::from_bits(first.to_bits() & 0xffff_0000 | second.to_bits() >> 16)
}

/// Scales of the left operand's tiles: row i in K block b has `data[i * row_stride + b * block_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct RowScales<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) block_stride: usize,
}

impl<'a> RowScales<'a> {
    /// Those of `row` and the rows after it in a K block.
    pub(super) fn from(self, row: usize, block: usize) -> &'a [f32] {
        &self.data[row * self.row_stride + block * self.block_stride..]
    }
}

/// A product of codes; the sizes of its operands are in words of `form`.
pub(crate) struct CodeProduct<'a> {
    pub(crate) product: Product<'a>,
    pub(crate) form: Form,
    pub(crate) row_scales: RowScales<'a>,
}

/// A matrix of words `[k, n]` with the scales of its column tiles, `[blocks, n]`.
#[derive(Clone, Copy)]
pub(crate) struct Scaled<'a> {
    pub(crate) words: Mat<'a>,
    pub(crate) scales: &'a [f32],
    pub(crate) n: usize,
}

impl Right for Scaled<'_> {
    fn holds(&self, k: usize, n: usize) -> bool {
        n == self.n && Right::holds(&self.words, k, n)
    }

    fn in_place(&self, ks: Range<usize>, cols: Range<usize>, once: bool) -> Option<(&[f32], usize)> {
        self.words.in_place(ks, cols, once)
    }

    fn pack(&self, isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        self.words.pack(isa, ks, cols, out);
    }

    fn scales(&self, block: usize, cols: Range<usize>, out: &mut [f32; PANEL]) {
        out[..cols.len()].copy_from_slice(&self.scales[block * self.n..][cols]);
    }
}

/// Runs independent products, tiles of all of them in parallel.
pub(crate) fn run_codes(isa: Isa, products: &mut [CodeProduct<'_>]) {
    run_mixed(isa, &mut [], products);
}

/// As [`run_codes`], with plain products beside them.
pub(crate) fn run_mixed(isa: Isa, plain: &mut [Product<'_>], codes: &mut [CodeProduct<'_>]) {
    assert!(isa.has_bf16_dot() || codes.iter().all(|p| p.form == Form::F32), "pairs need their dot product");
    let mut checked: Vec<_> = plain.iter_mut().map(check).collect();
    checked.extend(codes.iter_mut().map(|CodeProduct { product, form, row_scales }| {
        let blocks = product.k.div_ceil(form.block());
        let last =
            product.m.saturating_sub(1) * row_scales.row_stride + blocks.saturating_sub(1) * row_scales.block_stride;
        assert!(product.m == 0 || blocks == 0 || last < row_scales.data.len(), "gemm: A has too few scales");
        Checked { form: *form, row_scales: Some(*row_scales), ..check(product) }
    }));
    run_checked(isa, &checked);
}
