//! Between the two layouts of a weight: whole, and matrix by matrix while a stack is read.
//!
//! A panel is `[in][32]`: 32 outputs side by side, zero past the last one; `[experts][⌈out/32⌉]` of them follow each other.
//! **Invariant**: [`Weight::packed_fp8`] and [`Weight::packed_bf16`] give what [`Weight::prepack`] gives, and hold one
//! matrix twice, never the stack.

use half::bf16;
use rayon::prelude::*;

use super::{Layout, Weight};
use crate::gemm::PANEL;
use crate::{DType, Tensor};

impl Weight {
    /// The same weight in the panel layout, for inference.
    ///
    /// # Panics
    /// When the weight is a vector.
    pub fn prepack(&self) -> Self {
        if self.layout == Layout::Panels {
            return self.clone();
        }
        assert!(self.shape.len() >= 2, "only matrices are prepacked");
        let (count, n, k) = (self.count(), self.outputs(), self.inputs());
        let len = count * n.next_multiple_of(PANEL) * k;
        let elements = match self.elements.dtype() {
            DType::F32 => Tensor::f32(&[len], to_panels(self.elements.as_f32(), n, k, len)),
            DType::Bf16 => Tensor::bf16(&[len], to_panels(self.elements.as_bf16(), n, k, len)),
            _ => Tensor::u8(&[len], to_panels(self.elements.as_u8(), n, k, len)),
        };
        Self { layout: Layout::Panels, elements, ..self.clone() }
    }

    /// An E4M3 stack `shape` `[.., out, in]` in the panel layout. `read(i, rows)` writes the row-major codes of matrix i;
    /// `scales` are those of [`Weight::from_fp8`].
    ///
    /// # Errors
    /// Those of `read`.
    ///
    /// # Panics
    /// When the shapes do not fit each other.
    pub fn packed_fp8<E>(
        shape: &[usize],
        scales: Tensor,
        read: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let codes = packed(shape, read)?;
        Ok(Self::from_fp8_parts(shape, Layout::Panels, Tensor::u8(&[codes.len()], codes), scales))
    }

    /// A BF16 stack `shape` `[.., out, in]` in the panel layout. `read(i, rows)` writes the row-major elements of matrix i.
    ///
    /// # Errors
    /// Those of `read`.
    ///
    /// # Panics
    /// When `shape` is that of a vector.
    pub fn packed_bf16<E>(shape: &[usize], read: impl FnMut(usize, &mut [bf16]) -> Result<(), E>) -> Result<Self, E> {
        let elements = packed(shape, read)?;
        let plain = Self::from_plain(Tensor::bf16(&[elements.len()], elements));
        Ok(Self { shape: shape.to_vec(), layout: Layout::Panels, ..plain })
    }

    /// The same weight in the row layout.
    pub(crate) fn in_rows(&self) -> Self {
        Self { layout: Layout::Rows, elements: self.rows_elements(), ..self.clone() }
    }

    /// The elements in row layout.
    pub(super) fn rows_elements(&self) -> Tensor {
        if self.layout == Layout::Rows {
            return self.elements.clone();
        }
        let (n, k) = (self.outputs(), self.inputs());
        match self.elements.dtype() {
            DType::F32 => Tensor::f32(&self.shape, from_panels(self.elements.as_f32(), n, k)),
            DType::Bf16 => Tensor::bf16(&self.shape, from_panels(self.elements.as_bf16(), n, k)),
            _ => Tensor::u8(&self.shape, from_panels(self.elements.as_u8(), n, k)),
        }
    }
}

fn to_panels<T: Copy + Default + Send + Sync>(rows: &[T], n: usize, k: usize, len: usize) -> Vec<T> {
    let mut out = vec![T::default(); len];
    fill_panels(rows, n, k, &mut out);
    out
}

/// Writes a stack's row-major elements to its panels; what lies past the last output keeps its zeros.
fn fill_panels<T: Copy + Send + Sync>(rows: &[T], n: usize, k: usize, out: &mut [T]) {
    if out.is_empty() {
        return;
    }
    let panels = n.div_ceil(PANEL);
    out.par_chunks_mut(PANEL * k).enumerate().for_each(|(at, panel)| {
        let (matrix, first) = (at / panels, at % panels * PANEL);
        for j in 0..PANEL.min(n - first) {
            let row = (matrix * n + first + j) * k;
            for (p, x) in rows[row..row + k].iter().enumerate() {
                panel[p * PANEL + j] = *x;
            }
        }
    });
}

/// Lays out a stack whose matrices `read` writes one after the other.
fn packed<T: Copy + Default + Send + Sync, E>(
    shape: &[usize],
    mut read: impl FnMut(usize, &mut [T]) -> Result<(), E>,
) -> Result<Vec<T>, E> {
    let [count @ .., n, k] = shape else { panic!("only matrices are packed, not {shape:?}") };
    let (count, n, k) = (count.iter().product::<usize>(), *n, *k);
    let each = n.next_multiple_of(PANEL) * k;
    let mut out = vec![T::default(); count * each];
    let mut rows = vec![T::default(); n * k];
    for (matrix, out) in out.chunks_mut(each.max(1)).enumerate() {
        read(matrix, &mut rows)?;
        fill_panels(&rows, n, k, out);
    }
    Ok(out)
}

fn from_panels<T: Copy>(panels: &[T], n: usize, k: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(panels.len());
    for matrix in panels.chunks(n.next_multiple_of(PANEL) * k) {
        for j in 0..n {
            let panel = &matrix[j / PANEL * PANEL * k..];
            out.extend((0..k).map(|p| panel[p * PANEL + j % PANEL]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::testing::values;
    use crate::{Fp8Format, Fp8Scales, Precision};

    #[test]
    fn a_stack_read_matrix_by_matrix_is_the_prepacked_stack() {
        for shape in [&[3, 70, 130][..], &[33, 5]] {
            let master = values(shape, 3);
            let len = shape[shape.len() - 2] * shape[shape.len() - 1];
            let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
            let whole = Weight::encode(&master, &fp8);
            let (codes, scales) = whole.fp8_parts().expect("FP8");
            let read = |i: usize, rows: &mut [u8]| {
                rows.copy_from_slice(&codes.as_u8()[i * len..(i + 1) * len]);
                Ok::<(), Infallible>(())
            };
            let packed = Weight::packed_fp8(shape, scales.clone(), read).expect("no error");
            assert_eq!((packed.layout, packed.shape()), (Layout::Panels, shape));
            assert_eq!(packed.elements.as_u8(), whole.prepack().elements.as_u8());
            assert_eq!(packed.dequantize().as_f32(), whole.dequantize().as_f32());
            let whole = Weight::encode(&master, &Precision::Bf16);
            let read = |i: usize, rows: &mut [bf16]| {
                rows.copy_from_slice(&whole.elements.as_bf16()[i * len..(i + 1) * len]);
                Ok::<(), Infallible>(())
            };
            let packed = Weight::packed_bf16(shape, read).expect("no error");
            assert_eq!(packed.elements.as_bf16(), whole.prepack().elements.as_bf16());
            assert_eq!(packed.in_rows().elements.as_bf16(), whole.elements.as_bf16());
        }
        let refused = Weight::packed_bf16(&[2, 3], |_, _| Err("unreadable"));
        assert_eq!(refused.err(), Some("unreadable"));
    }
}
