//! An FP8 weight as the right operand of a product of codes: words without scales, and the scales beside them.
//!
//! Invariant: which layout, and which form of words, changes no bit of a product (`gemm/codes.rs`).

use std::ops::Range;

use super::{Layout, Operand, Weight};
use crate::fp8::{TILE, pairs_across, pairs_along};
use crate::gemm::{Elements, Form, PANEL, Right, transpose_panel, unpack_pairs};
use crate::isa::Isa;
use crate::{Tensor, scratch};

/// One matrix of an FP8 weight in words of `form`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeOperand<'a> {
    weight: &'a Weight,
    matrix: usize,
    form: Form,
    /// k runs over inputs (y = x·wᵀ) or, in the input gradient, over outputs (dx = dy·w).
    transposed: bool,
}

impl<'a> CodeOperand<'a> {
    /// Matrix `matrix` of `weight`; k runs over its inputs when `transposed`, else over its outputs.
    ///
    /// # Panics
    /// When the weight has no codes.
    pub(crate) fn new(weight: &'a Weight, matrix: usize, transposed: bool, form: Form) -> Self {
        assert!(weight.scales.is_some(), "a product of codes with a weight in {:?}", weight.precision);
        Self { weight, matrix, form, transposed }
    }

    fn plain(&self) -> Operand<'_> {
        let of = if self.transposed { Operand::forward } else { Operand::backward };
        of(self.weight, self.matrix).unscaled()
    }

    /// Pairs of K, first element `ks.start` (even), of columns `cols`, to `[⌈ks / 2⌉][32]`.
    fn pack_pairs(&self, isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let (n, k) = (self.weight.outputs(), self.weight.inputs());
        let (elements, encoding) = (self.weight.elements.as_u8(), self.weight.encoding());
        match (self.weight.layout, self.transposed) {
            (Layout::Panels, true) => {
                // Index 1 of a block is the element of its first input and first output.
                let start = self.weight.panel_index(self.matrix, cols.start, ks.start) - 1;
                let codes = &elements[start..start + ks.len().next_multiple_of(2) * PANEL];
                if unpack_pairs(isa, codes, encoding, out) {
                    return;
                }
                // Later inputs come first in memory.
                pairs_along(isa, codes, encoding, true, out);
                for block in out.chunks_exact_mut(PANEL) {
                    let mut stored = [0.0; PANEL];
                    stored.copy_from_slice(block);
                    for (lane, words) in stored.chunks_exact(8).enumerate() {
                        block[lane * 4..][..4].copy_from_slice(&words[..4]);
                        block[16 + lane * 4..][..4].copy_from_slice(&words[4..]);
                    }
                }
            }
            (Layout::Panels, false) => {
                CodeOperand { weight: &self.weight.in_rows(), ..*self }.pack_pairs(isa, ks, cols, out);
            }
            (Layout::Rows, true) => {
                let words = ks.len().div_ceil(2);
                scratch::with_f32(cols.len() * words, |rows| {
                    for (row, words) in cols.clone().zip(rows.chunks_exact_mut(words)) {
                        let start = (self.matrix * n + row) * k + ks.start;
                        pairs_along(isa, &elements[start..start + ks.len()], encoding, false, words);
                    }
                    transpose_panel(isa, rows, words, cols.len(), words, out);
                });
            }
            (Layout::Rows, false) => {
                let run = |row: usize| {
                    let start = (self.matrix * n + row) * k + cols.start;
                    if row < ks.end { &elements[start..start + cols.len()] } else { &[][..] }
                };
                for (row, out) in ks.clone().step_by(2).zip(out.chunks_exact_mut(PANEL)) {
                    let (here, rest) = out.split_at_mut(cols.len());
                    pairs_across(isa, run(row), run(row + 1), encoding, here);
                    rest.fill(0.0);
                }
            }
        }
    }
}

impl Right for CodeOperand<'_> {
    fn holds(&self, k: usize, n: usize) -> bool {
        let (outputs, inputs) = (self.weight.outputs(), self.weight.inputs());
        let (inner, outer) = if self.transposed { (inputs, outputs) } else { (outputs, inputs) };
        self.matrix < self.weight.count() && (k, n) == (self.form.words(inner), outer)
    }

    fn prepacked(&self) -> Option<Elements<'_>> {
        (self.weight.layout == Layout::Panels && self.transposed).then(|| self.weight.panels(self.matrix))
    }

    fn in_place(&self, _ks: Range<usize>, _cols: Range<usize>, _once: bool) -> Option<(&[f32], usize)> {
        None
    }

    fn pack(&self, isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        match self.form {
            Form::F32 => self.plain().pack(isa, ks, cols, out),
            Form::Pairs => {
                let inner = if self.transposed { self.weight.inputs() } else { self.weight.outputs() };
                self.pack_pairs(isa, ks.start * 2..(ks.end * 2).min(inner), cols, out);
            }
        }
    }

    fn scales(&self, block: usize, cols: Range<usize>, out: &mut [f32; PANEL]) {
        let (down, across) = (self.weight.outputs().div_ceil(TILE), self.weight.inputs().div_ceil(TILE));
        // A K block is a tile, and a panel lies within one.
        let (row, col) = if self.transposed { (cols.start / TILE, block) } else { (block, cols.start / TILE) };
        let scales = self.weight.scales.as_ref().map_or(&[][..], Tensor::as_f32);
        *out = [scales[(self.matrix * down + row) * across + col]; PANEL];
    }
}
