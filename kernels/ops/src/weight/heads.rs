//! kv_b cut into the weights of absorbed attention: for every head W_UKᵀ and W_UV, in panels, encoded as kv_b is.
//!
//! kv_b `[heads · (dn + dv), rank]` holds W_UK (dn rows) and W_UV (dv rows) of one head after the other.
//! **Invariant**: an element has the value it has in kv_b, bit for bit. Codes keep their scale where no tile of 128×128 of the
//! parts needs two of kv_b's; otherwise the parts are F32.

use super::{Layout, Weight};
use crate::fp8::TILE;
use crate::{DType, Tensor};

/// Where a part of every head lies in kv_b.
#[derive(Clone, Copy)]
struct Part {
    heads: usize,
    /// Rows of a head.
    pitch: usize,
    /// The first of them that is the part's, and how many are.
    first: usize,
    rows: usize,
    rank: usize,
    /// Whether a matrix is `[rank, rows]`, not `[rows, rank]`.
    transposed: bool,
}

impl Part {
    fn shape(self) -> [usize; 3] {
        if self.transposed { [self.heads, self.rank, self.rows] } else { [self.heads, self.rows, self.rank] }
    }

    /// `elements` `[heads · pitch, rank]` to [`Part::shape`].
    fn cut<T: Copy>(self, elements: &[T]) -> Vec<T> {
        let mut out = Vec::with_capacity(self.shape().iter().product());
        for head in 0..self.heads {
            let start = (head * self.pitch + self.first) * self.rank;
            let part = &elements[start..start + self.rows * self.rank];
            if self.transposed {
                out.extend((0..self.rank).flat_map(|col| part.iter().skip(col).step_by(self.rank)));
            } else {
                out.extend_from_slice(part);
            }
        }
        out
    }

    /// The scales of kv_b's tiles `[.., ⌈rank/128⌉]` to those of the part's, if it has no tile that needs two.
    fn cut_scales(self, scales: &[f32]) -> Option<Vec<f32>> {
        let (down, across) = (self.rows.div_ceil(TILE), self.rank.div_ceil(TILE));
        let mut out = Vec::with_capacity(self.heads * down * across);
        for head in 0..self.heads {
            let start = head * self.pitch + self.first;
            let tile = |i: usize| {
                let (first, end) = (start + i * TILE, start + self.rows.min((i + 1) * TILE));
                ((end - 1) / TILE == first / TILE).then_some(first / TILE)
            };
            let tiles: Vec<usize> = (0..down).map(tile).collect::<Option<_>>()?;
            if self.transposed {
                out.extend((0..across).flat_map(|col| tiles.iter().map(move |tile| scales[tile * across + col])));
            } else {
                out.extend(tiles.iter().flat_map(|tile| &scales[tile * across..][..across]));
            }
        }
        Some(out)
    }
}

impl Weight {
    /// Of kv_b `[heads · (dn + dv), rank]`: W_UKᵀ `[heads, rank, dn]` and W_UV `[heads, dv, rank]`, in panels.
    ///
    /// # Panics
    /// When it has other rows.
    pub(crate) fn absorbed(&self, heads: usize, dn: usize, dv: usize) -> [Self; 2] {
        let (pitch, rank) = (dn + dv, self.inputs());
        assert_eq!(self.outputs(), heads * pitch, "kv_b {:?} for {heads} heads of {dn} + {dv}", self.shape());
        let keys = Part { heads, pitch, first: 0, rows: dn, rank, transposed: true };
        [keys, Part { first: dn, rows: dv, transposed: false, ..keys }].map(|part| self.part(part).prepack())
    }

    fn part(&self, part: Part) -> Self {
        let (shape, rows) = (part.shape(), self.rows_elements());
        let scales = self.scales.as_ref().and_then(|scales| part.cut_scales(scales.as_f32()));
        match (rows.dtype(), scales) {
            (DType::F32, _) => Self::from_plain(Tensor::f32(&shape, part.cut(rows.as_f32()))),
            (DType::Bf16, _) => Self::from_plain(Tensor::bf16(&shape, part.cut(rows.as_bf16()))),
            (_, Some(scales)) => {
                let [count, n, k] = shape;
                let scales = Tensor::f32(&[count, n.div_ceil(TILE), k.div_ceil(TILE)], scales);
                let elements = Tensor::u8(&shape, part.cut(rows.as_u8()));
                Self { shape: shape.to_vec(), layout: Layout::Rows, elements, scales: Some(scales), ..self.clone() }
            }
            _ => Self::from_plain(Tensor::f32(&shape, part.cut(self.dequantize().as_f32()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;
    use crate::{Fp8Format, Fp8Scales, Precision};

    #[test]
    fn parts_hold_the_values_of_the_whole() {
        // Heads of a tile, of two, of half a tile, and values across two.
        let sizes = [(3, 64, 64, 130, true), (2, 128, 128, 256, true), (4, 16, 48, 40, true), (3, 16, 32, 60, false)];
        for (heads, dn, dv, rank, in_codes) in sizes {
            let master = values(&[heads * (dn + dv), rank], 3);
            let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
            for precision in [Precision::F32, Precision::Bf16, fp8] {
                let whole = Weight::encode(&master, &precision);
                for from in [whole.clone(), whole.prepack()] {
                    let [keys, vals] = from.absorbed(heads, dn, dv);
                    let is_code = vals.elements.dtype() == DType::U8;
                    assert_eq!(is_code, in_codes && precision == fp8, "{heads} x {dn} + {dv}");
                    assert_eq!((keys.shape(), vals.shape()), (&[heads, rank, dn][..], &[heads, dv, rank][..]));
                    let (keys, vals, all) = (keys.dequantize(), vals.dequantize(), whole.dequantize());
                    for (row, col) in (0..heads * (dn + dv)).flat_map(|row| (0..rank).map(move |col| (row, col))) {
                        let (head, at) = (row / (dn + dv), row % (dn + dv));
                        let got = if at < dn {
                            keys.as_f32()[(head * rank + col) * dn + at]
                        } else {
                            vals.as_f32()[(head * dv + at - dn) * rank + col]
                        };
                        assert_eq!(
                            got.to_bits(),
                            all.as_f32()[row * rank + col].to_bits(),
                            "{precision:?} {row} {col}"
                        );
                    }
                }
            }
        }
    }
}
