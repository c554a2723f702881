//! A weight as the right operand of a product; decoded panel by panel as it is packed.
//!
//! Invariant: which layout changes no bit of a decoded element.

use std::ops::Range;

use super::{Layout, Weight};
use crate::gemm::{Elements, Mat, PANEL, Right, transpose_panel};
use crate::isa::Isa;
use crate::{DType, scratch};

/// One matrix of a weight as the right operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    weight: &'a Weight,
    matrix: usize,
    /// k runs over inputs (y = x·wᵀ) or, in the input gradient, over outputs (dx = dy·w).
    transposed: bool,
    /// Whether codes are multiplied by their scales.
    scaled: bool,
}

impl<'a> Operand<'a> {
    /// Matrix `matrix` transposed: k runs over its inputs.
    pub(crate) fn forward(weight: &'a Weight, matrix: usize) -> Self {
        Self { weight, matrix, transposed: true, scaled: true }
    }

    /// Matrix `matrix` as it is: k runs over its outputs.
    pub(crate) fn backward(weight: &'a Weight, matrix: usize) -> Self {
        Self { transposed: false, ..Self::forward(weight, matrix) }
    }

    /// The same codes at scale 1.
    pub(super) fn unscaled(self) -> Self {
        Self { scaled: false, ..self }
    }

    /// Scale of an element.
    fn scale(&self, row: usize, col: usize) -> f32 {
        if self.scaled { self.weight.scale_of(self.matrix, row, col) } else { 1.0 }
    }

    /// Panel layout against its grain: k over outputs.
    fn pack_across(&self, isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in ks.zip(out.chunks_exact_mut(PANEL)) {
            out.fill(0.0);
            for (col, out) in cols.clone().zip(out) {
                let at = self.weight.panel_index(self.matrix, row, col);
                self.weight.decode(isa, at, self.scale(row, col), std::slice::from_mut(out));
            }
        }
    }
}

impl Right for Operand<'_> {
    fn holds(&self, k: usize, n: usize) -> bool {
        let (outputs, inputs) = (self.weight.outputs(), self.weight.inputs());
        self.matrix < self.weight.count()
            && (k, n) == if self.transposed { (inputs, outputs) } else { (outputs, inputs) }
    }

    fn prepacked(&self) -> Option<Elements<'_>> {
        (self.weight.layout == Layout::Panels && self.transposed).then(|| self.weight.panels(self.matrix))
    }

    fn in_place(&self, ks: Range<usize>, cols: Range<usize>, once: bool) -> Option<(&[f32], usize)> {
        let weight = self.weight;
        if weight.elements.dtype() != DType::F32 {
            return None;
        }
        let k = weight.inputs();
        match (weight.layout, self.transposed) {
            (Layout::Panels, true) => {
                let start = (self.matrix * weight.outputs().next_multiple_of(PANEL) + cols.start) * k;
                Some((&weight.elements.as_f32()[start + ks.start * PANEL..start + ks.end * PANEL], PANEL))
            }
            // Rows that several blocks of A read are better packed: far-apart rows collide in the first-level cache.
            (Layout::Rows, false) if once && cols.len() == PANEL => {
                let start = (self.matrix * weight.outputs() + ks.start) * k + cols.start;
                Some((&weight.elements.as_f32()[start..start + (ks.len() - 1) * k + PANEL], k))
            }
            _ => None,
        }
    }

    fn pack(&self, isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let (weight, matrix) = (self.weight, self.matrix);
        let (n, k) = (weight.outputs(), weight.inputs());
        match (weight.layout, self.transposed) {
            (Layout::Panels, true) => {
                let scale = self.scale(cols.start, ks.start);
                weight.decode_panel(isa, matrix, cols.start, ks, scale, out);
            }
            (Layout::Panels, false) => self.pack_across(isa, ks, cols, out),
            (Layout::Rows, true) => {
                let (first, len) = (cols.start, ks.len());
                let start = (matrix * n + first) * k + ks.start;
                if weight.elements.dtype() == DType::F32 {
                    let source = &weight.elements.as_f32()[start..];
                    return transpose_panel(isa, source, k, cols.len(), len, out);
                }
                scratch::with_f32(cols.len() * len, |rows| {
                    for (j, row) in rows.chunks_exact_mut(len).enumerate() {
                        weight.decode(isa, start + j * k, self.scale(first + j, ks.start), row);
                    }
                    transpose_panel(isa, rows, len, cols.len(), len, out);
                });
            }
            (Layout::Rows, false) if weight.elements.dtype() == DType::F32 => {
                Mat::rows(&weight.elements.as_f32()[matrix * n * k..], k).pack(isa, ks, cols, out);
            }
            (Layout::Rows, false) => {
                for (row, out) in ks.zip(out.chunks_exact_mut(PANEL)) {
                    let at = (matrix * n + row) * k + cols.start;
                    let (here, rest) = out.split_at_mut(cols.len());
                    weight.decode(isa, at, self.scale(row, cols.start), here);
                    rest.fill(0.0);
                }
            }
        }
    }
}
