//! Between the two layouts of a weight: whole, and matrix by matrix while a stack is read.
//!
//! A panel holds 32 outputs side by side, zero past the last one; `[experts][⌈out/32⌉]` of them follow each other. In F32
//! it is `[in][32]`. BF16 elements and FP8 codes come in blocks of 64 for a pair of inputs (k, k + 1), k even, a last odd
//! one padded with zero. A block of BF16 is two vectors of 16 dwords, columns 0..16 and 16..32, each dword with k + 1 in
//! its low and k in its high word: what a dot product of pairs multiplies in k order. A block of codes is the order from
//! which interleaving the low and the high bytes of their BF16 values, within 16-byte lanes, makes these two vectors.
//! [`Element::place`] and [`Element::depth`] say all this; nothing else does.
//!
//! **Invariant**: [`Weight::packed_fp8`] and [`Weight::packed_bf16`] give what [`Weight::prepack`] gives, and hold one
//! matrix twice, never the stack.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::{Layout, Weight};
use crate::fp8::TILE;
use crate::gemm::{Elements, PANEL, unpack_bf16, unpack_codes};
use crate::isa::Isa;
use crate::{DType, Tensor, scratch};

/// An element of a panel, by its stored type.
pub(crate) trait Element: Copy + Default + Send + Sync {
    /// Where input `p` of output `j` below 32 lies in a panel.
    fn place(p: usize, j: usize) -> usize;

    /// Inputs a panel has room for, 32 elements each.
    fn depth(k: usize) -> usize {
        k.next_multiple_of(2)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn place(p: usize, j: usize) -> usize {
        p * PANEL + j
    }

    fn depth(k: usize) -> usize {
        k
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn place(p: usize, j: usize) -> usize {
        p / 2 * 64 + j * 2 + (1 - p % 2)
    }
}

impl Element for u8 {
    #[inline(always)]
    fn place(p: usize, j: usize) -> usize {
        let (half, column) = (j / 16, j % 16);
        p / 2 * 64 + column / 4 * 16 + half * 8 + column % 4 * 2 + (1 - p % 2)
    }
}

/// Elements of one panel of `k` inputs.
pub(crate) fn panel_len<T: Element>(k: usize) -> usize {
    PANEL * T::depth(k)
}

/// Elements of one matrix of `n` outputs and `k` inputs.
fn matrix_len<T: Element>(n: usize, k: usize) -> usize {
    n.div_ceil(PANEL) * panel_len::<T>(k)
}

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
        let elements = match self.elements.dtype() {
            DType::F32 => flat(Tensor::f32, to_panels(self.elements.as_f32(), count, n, k)),
            DType::Bf16 => flat(Tensor::bf16, to_panels(self.elements.as_bf16(), count, n, k)),
            _ => flat(Tensor::u8, to_panels(self.elements.as_u8(), count, n, k)),
        };
        Self { layout: Layout::Panels, elements, ..self.clone() }
    }

    /// Where input `input` of an output lies in the panel layout.
    pub(super) fn panel_index(&self, matrix: usize, output: usize, input: usize) -> usize {
        let (panel, column) = (matrix * self.outputs().div_ceil(PANEL) + output / PANEL, output % PANEL);
        let k = self.inputs();
        match self.elements.dtype() {
            DType::F32 => panel * panel_len::<f32>(k) + f32::place(input, column),
            DType::Bf16 => panel * panel_len::<bf16>(k) + bf16::place(input, column),
            _ => panel * panel_len::<u8>(k) + u8::place(input, column),
        }
    }

    /// The panels of one matrix.
    ///
    /// # Panics
    /// When the weight is in row layout or has no such matrix.
    pub(crate) fn panels(&self, matrix: usize) -> Elements<'_> {
        assert!(self.layout == Layout::Panels, "a weight in rows has no panels");
        fn of<T: Element>(data: &[T], matrix: usize, n: usize, k: usize) -> &[T] {
            let len = matrix_len::<T>(n, k);
            &data[matrix * len..][..len]
        }
        let (n, k) = (self.outputs(), self.inputs());
        match self.elements.dtype() {
            DType::F32 => Elements::F32(of(self.elements.as_f32(), matrix, n, k)),
            DType::Bf16 => Elements::Bf16(of(self.elements.as_bf16(), matrix, n, k)),
            _ => {
                let tiles = n.div_ceil(TILE) * k.div_ceil(TILE);
                let scales = self.scales.as_ref().map_or(&[][..], |scales| &scales.as_f32()[matrix * tiles..][..tiles]);
                Elements::Codes(of(self.elements.as_u8(), matrix, n, k), self.encoding(), scales)
            }
        }
    }

    /// Decodes inputs `ks` (`ks.start` even, within one tile) of the panel that starts at output `first`, to `[ks][32]`;
    /// codes are multiplied by `scale`.
    pub(super) fn decode_panel(
        &self,
        isa: Isa,
        matrix: usize,
        first: usize,
        ks: Range<usize>,
        scale: f32,
        out: &mut [f32],
    ) {
        let dtype = self.elements.dtype();
        if dtype == DType::F32 {
            let at = self.panel_index(matrix, first, ks.start);
            return out.copy_from_slice(&self.elements.as_f32()[at..at + ks.len() * PANEL]);
        }
        // Index 1 of a block is the element of its first input and first output.
        let at = self.panel_index(matrix, first, ks.start) - 1;
        let len = ks.len().next_multiple_of(2) * PANEL;
        if dtype == DType::Bf16 {
            if unpack_bf16(isa, &self.elements.as_bf16()[at..at + len], out) {
                return;
            }
        } else if unpack_codes(isa, &self.elements.as_u8()[at..at + len], self.encoding(), out) {
            if scale.to_bits() != 1.0_f32.to_bits() {
                out.iter_mut().for_each(|x| *x *= scale);
            }
            return;
        }
        scratch::with_f32(len, |pairs| {
            self.decode(isa, at, scale, pairs);
            if dtype == DType::Bf16 { in_order::<bf16>(pairs, out) } else { in_order::<u8>(pairs, out) }
        });
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

/// Values of a panel in the order of `T`'s blocks, to `[k][32]`.
fn in_order<T: Element>(pairs: &[f32], out: &mut [f32]) {
    let places: [[usize; PANEL]; 2] = std::array::from_fn(|p| std::array::from_fn(|j| T::place(p, j)));
    for (pairs, out) in pairs.chunks_exact(2 * PANEL).zip(out.chunks_mut(2 * PANEL)) {
        for (out, places) in out.chunks_exact_mut(PANEL).zip(&places) {
            for (out, place) in out.iter_mut().zip(places) {
                *out = pairs[*place];
            }
        }
    }
}

fn flat<T>(tensor: impl Fn(&[usize], Vec<T>) -> Tensor, elements: Vec<T>) -> Tensor {
    tensor(&[elements.len()], elements)
}

fn to_panels<T: Element>(rows: &[T], count: usize, n: usize, k: usize) -> Vec<T> {
    let mut out = vec![T::default(); count * matrix_len::<T>(n, k)];
    fill_panels(rows, n, k, &mut out);
    out
}

/// Writes a stack's row-major elements to its panels; what lies past the last output or input keeps its zeros.
fn fill_panels<T: Element>(rows: &[T], n: usize, k: usize, out: &mut [T]) {
    if out.is_empty() {
        return;
    }
    let panels = n.div_ceil(PANEL);
    out.par_chunks_mut(panel_len::<T>(k)).enumerate().for_each(|(at, panel)| {
        let (matrix, first) = (at / panels, at % panels * PANEL);
        for j in 0..PANEL.min(n - first) {
            let row = (matrix * n + first + j) * k;
            for (p, x) in rows[row..row + k].iter().enumerate() {
                panel[T::place(p, j)] = *x;
            }
        }
    });
}

/// Lays out a stack whose matrices `read` writes one after the other.
fn packed<T: Element, E>(shape: &[usize], mut read: impl FnMut(usize, &mut [T]) -> Result<(), E>) -> Result<Vec<T>, E> {
    let [count @ .., n, k] = shape else { panic!("only matrices are packed, not {shape:?}") };
    let (count, n, k) = (count.iter().product::<usize>(), *n, *k);
    let each = matrix_len::<T>(n, k);
    let mut out = vec![T::default(); count * each];
    let mut rows = vec![T::default(); n * k];
    for (matrix, out) in out.chunks_mut(each.max(1)).enumerate() {
        read(matrix, &mut rows)?;
        fill_panels(&rows, n, k, out);
    }
    Ok(out)
}

fn from_panels<T: Element>(panels: &[T], n: usize, k: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(panels.len());
    for matrix in panels.chunks(matrix_len::<T>(n, k).max(1)) {
        for j in 0..n {
            let panel = &matrix[j / PANEL * panel_len::<T>(k)..];
            out.extend((0..k).map(|p| panel[T::place(p, j % PANEL)]));
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
    #[test]
    fn both_layouts_hold_the_same_elements() {
        for shape in [&[2, 33, 7][..], &[64, 128], &[31, 1], &[3, 70, 131], &[5, 0], &[0, 6]] {
            let master = values(shape, 5);
            let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
            for precision in [Precision::F32, Precision::Bf16, fp8] {
                let rows = Weight::encode(&master, &precision);
                let panels = rows.prepack();
                assert_eq!(panels.dequantize().as_f32(), rows.dequantize().as_f32(), "{shape:?} {precision:?}");
                let (n, k) = (rows.outputs(), rows.inputs());
                let values = rows.dequantize();
                let mut out = vec![0.0; 128 * PANEL];
                for first in (0..n).step_by(PANEL) {
                    for start in (0..k).step_by(128) {
                        let ks = start..(start + 128).min(k);
                        let out = &mut out[..ks.len() * PANEL];
                        let scale = panels.scale_of(panels.count() - 1, first, start);
                        panels.decode_panel(Isa::best(), panels.count() - 1, first, ks.clone(), scale, out);
                        for (p, out) in ks.zip(out.chunks(PANEL)) {
                            for (j, x) in out.iter().enumerate() {
                                let row = (panels.count() - 1) * n + first + j;
                                let want = if first + j < n { values.as_f32()[row * k + p] } else { 0.0 };
                                assert_eq!(*x, want, "{shape:?} {precision:?} {p} {j}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn codes_become_vectors_of_pairs_by_interleaving_bytes() {
        for (j, p) in (0..PANEL).flat_map(|j| [(j, 0), (j, 1)]) {
            // Lane, byte of the half that unpacklo or unpackhi takes, word of the result.
            let at = u8::place(p, j);
            let (lane, half, byte) = (at / 16, at % 16 / 8, at % 8);
            assert_eq!(half * 32 + lane * 8 + byte, bf16::place(p, j));
        }
    }
}
