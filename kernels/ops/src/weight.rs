//! Weights as products read them: F32, BF16 or block-scaled FP8, `[out, in]` or a stack `[experts, out, in]`.
//!
//! Two layouts of the same elements. *Rows*: row-major, as checkpoints store them; training uses it. *Panels*, made by
//! [`Weight::prepack`] for inference: 32 outputs side by side (`weight/layout.rs`), zero past the last one, so that a
//! product of any height reads each byte once, in order. FP8 scales stay `[.., ⌈out/128⌉, ⌈in/128⌉]` in both.
//!
//! Invariant: products, [`Weight::dequantize`] and [`Weight::fp8_parts`] give the same bits in either layout.

mod codes;
mod heads;
mod layout;
mod operand;

pub(crate) use codes::CodeOperand;
#[cfg(test)]
pub(crate) use layout::Element;
pub(crate) use layout::panel_len;
pub(crate) use operand::Operand;

use crate::activation::Rounding;
use crate::fp8::{self, Encoding, Exceptions, Fp8, Fp8Format, Fp8Scales, TILE, Tile};
use crate::isa::Isa;
use crate::{DType, Tensor, bfloat};

/// How a weight is stored and its products taken.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Precision {
    /// Plain f32.
    #[default]
    F32,
    /// Operands rounded to BF16, product in f32.
    Bf16,
    /// Operands in block-scaled FP8; sums of 128 products of codes, scaled as they are added up in f32.
    Fp8 {
        /// Format of weights, activations and gradients.
        #[serde(default)]
        format: Fp8Format,
        /// Representation of the scales.
        #[serde(default)]
        scales: Fp8Scales,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Rows,
    Panels,
}

/// An encoded weight, `[out, in]` or `[experts, out, in]`; a vector has precision F32 or BF16. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Weight {
    shape: Vec<usize>,
    precision: Precision,
    exceptions: Exceptions,
    layout: Layout,
    /// F32, Bf16, or U8 codes, by precision; flat in the panel layout.
    elements: Tensor,
    /// F32 scales of FP8 codes, `[.., ⌈out/128⌉, ⌈in/128⌉]`.
    scales: Option<Tensor>,
}

impl Weight {
    /// Encodes an F32 master of any shape (FP8: two dimensions or more).
    ///
    /// # Panics
    /// When the master is not F32, or is a vector and the precision FP8.
    pub fn encode(master: &Tensor, precision: &Precision) -> Self {
        match *precision {
            Precision::F32 => Self::from_plain(master.clone()),
            Precision::Bf16 => Self::from_plain(master.to_bf16()),
            Precision::Fp8 { format, scales } => {
                let Fp8 { codes, scales: factors, .. } = Fp8::quantize_blocks(master, format.forward(), scales);
                Self { precision: *precision, scales: Some(factors), ..Self::rows(codes) }
            }
        }
    }

    /// An FP8 weight as checkpoints hold it: E4M3 codes `[.., out, in]` (U8) and F32 scales `[.., ⌈out/128⌉, ⌈in/128⌉]`
    /// (what `weight_scale_inv` holds) that multiply them.
    ///
    /// # Panics
    /// When the shapes do not fit each other.
    pub fn from_fp8(codes: Tensor, scales: Tensor) -> Self {
        let shape = codes.shape().to_vec();
        Self::from_fp8_parts(&shape, Layout::Rows, codes, scales)
    }

    fn from_fp8_parts(shape: &[usize], layout: Layout, codes: Tensor, scales: Tensor) -> Self {
        assert!(codes.dtype() == DType::U8 && shape.len() >= 2, "FP8 codes must be a U8 matrix, not {shape:?}");
        let mut expected = shape.to_vec();
        for size in expected.iter_mut().rev().take(2) {
            *size = size.div_ceil(TILE);
        }
        assert_eq!(scales.shape(), expected, "scales of FP8 codes of shape {shape:?}");
        let precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
        Self { shape: shape.to_vec(), layout, precision, scales: Some(scales), ..Self::rows(codes) }
    }

    /// A weight whose elements are F32 or BF16 already.
    ///
    /// # Panics
    /// On another dtype.
    pub fn from_plain(elements: Tensor) -> Self {
        let precision = match elements.dtype() {
            DType::F32 => Precision::F32,
            DType::Bf16 => Precision::Bf16,
            other => panic!("a plain weight is F32 or BF16, not {other:?}"),
        };
        Self { precision, ..Self::rows(elements) }
    }

    fn rows(elements: Tensor) -> Self {
        let shape = elements.shape().to_vec();
        let exceptions = Exceptions::default();
        Self { shape, precision: Precision::F32, exceptions, layout: Layout::Rows, elements, scales: None }
    }

    /// The same elements in a layer that takes its products with `exceptions`.
    #[must_use]
    pub fn with_exceptions(self, exceptions: Exceptions) -> Self {
        Self { exceptions, ..self }
    }

    /// Shape, `[.., out, in]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How products with it are taken. FP8 from a checkpoint reads as E4M3 with F32 scales.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// What products with it do otherwise than the precision says.
    pub fn exceptions(&self) -> Exceptions {
        self.exceptions
    }

    /// How the other operands of its products are rounded.
    pub(crate) fn rounding(&self) -> Rounding {
        Rounding { precision: self.precision, exceptions: self.exceptions }
    }

    /// Resident bytes of elements and scales.
    pub fn bytes(&self) -> usize {
        self.elements.bytes() + self.scales.as_ref().map_or(0, Tensor::bytes)
    }

    /// Outputs of one matrix (1 for a vector).
    pub(crate) fn outputs(&self) -> usize {
        self.shape.iter().rev().nth(1).copied().unwrap_or(1)
    }

    /// Inputs of one matrix.
    pub(crate) fn inputs(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Matrices in the stack.
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().rev().skip(2).product()
    }

    fn encoding(&self) -> Encoding {
        match self.precision {
            Precision::Fp8 { format, .. } => format.forward(),
            _ => Encoding::E4m3,
        }
    }

    /// The elements of an F32 weight, row-major.
    ///
    /// # Panics
    /// When the weight is encoded otherwise or prepacked.
    pub fn plain(&self) -> &[f32] {
        assert!(self.layout == Layout::Rows, "a prepacked weight has no plain elements");
        self.elements.as_f32()
    }

    /// The values products use, F32, row-major.
    pub fn dequantize(&self) -> Tensor {
        match (self.precision, self.rows_elements()) {
            (Precision::Fp8 { .. }, codes) => {
                let scales = self.scales.clone().unwrap_or_else(|| Tensor::zeros(&[0]));
                let offsets = std::sync::Arc::new([]);
                Fp8 { codes, scales, tile: Tile::Block128, encoding: self.encoding(), offsets }.dequantize()
            }
            (_, plain) => plain.to_f32(),
        }
    }

    /// Row-major codes `[.., out, in]` and scales of an FP8 weight, as a checkpoint stores them.
    pub fn fp8_parts(&self) -> Option<(Tensor, Tensor)> {
        self.scales.as_ref().map(|scales| (self.rows_elements(), scales.clone()))
    }

    /// Rows `indices` of a matrix `[rows, cols]`, F32 `[indices.len(), cols]`: an embedding lookup.
    ///
    /// # Panics
    /// When the weight is not a matrix in row layout or an index is outside it.
    pub fn gather_rows(&self, indices: &[u32]) -> Tensor {
        assert!(self.layout == Layout::Rows && self.shape.len() == 2, "rows are gathered from a matrix in row layout");
        let cols = self.inputs();
        let mut out = crate::memory::buffer(indices.len() * cols);
        for (row, out) in indices.iter().zip(out.chunks_mut(cols.max(1))) {
            let row = *row as usize;
            assert!(row < self.shape[0], "row {row} of a weight of shape {:?}", self.shape);
            for col in (0..cols).step_by(TILE) {
                let end = (col + TILE).min(cols);
                self.decode(Isa::best(), row * cols + col, self.scale_of(0, row, col), &mut out[col..end]);
            }
        }
        Tensor::f32(&[indices.len(), cols], out)
    }

    /// Decodes `out.len()` elements from flat index `at`; codes are multiplied by `scale`.
    fn decode(&self, isa: Isa, at: usize, scale: f32, out: &mut [f32]) {
        match self.elements.dtype() {
            DType::F32 => out.copy_from_slice(&self.elements.as_f32()[at..at + out.len()]),
            DType::Bf16 => bfloat::widen(isa, &self.elements.as_bf16()[at..at + out.len()], out),
            _ => {
                let codes = &self.elements.as_u8()[at..at + out.len()];
                fp8::decode_run(isa, codes, self.encoding(), scale, out);
            }
        }
    }

    /// Scale of the tile of element (`row`, `col`) of matrix `matrix`; 1 where there are no codes.
    fn scale_of(&self, matrix: usize, row: usize, col: usize) -> f32 {
        let (down, across) = (self.outputs().div_ceil(TILE), self.inputs().div_ceil(TILE));
        self.scales.as_ref().map_or(1.0, |scales| scales.as_f32()[(matrix * down + row / TILE) * across + col / TILE])
    }
}
