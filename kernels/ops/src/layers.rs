//! Several linear layers at once, for inference: y_i = x_i · w_iᵀ, one region of parallel work instead of one for each.
//!
//! A layer is that of `linear.rs`, or with `offsets` that of `grouped_linear.rs`. Layers that read one input and round it
//! alike share its rounding.
//!
//! Invariant: the bits are those of the layers one by one.

use std::ops::Range;

use crate::activation::{self, Rows};
use crate::fp8::TILE;
use crate::gemm::{self, CodeProduct, Mat, Product, Right, RowScales};
use crate::isa::Isa;
use crate::weight::{CodeOperand, Operand};
use crate::{Tensor, Weight, memory};

/// One of the layers.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// `[rows, in]`; sorted by expert where there are several.
    pub x: &'a Tensor,
    /// First row of every expert, and the number of rows; `None` for a weight of one matrix.
    pub offsets: Option<&'a [usize]>,
    /// `[out, in]` or `[experts, out, in]`.
    pub w: &'a Weight,
}

/// The layers' outputs, `[rows, out]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn forward(layers: &[Layer<'_>]) -> Vec<Tensor> {
    let (inputs, of_layer) = inputs(layers);
    let rows = || of_layer.iter().map(|at| &inputs[*at]);
    let parts: Vec<_> = layers.iter().zip(rows()).map(|(layer, rows)| layer.parts(rows)).collect();
    let mut outputs: Vec<_> = layers.iter().map(|layer| memory::buffer(layer.x.rows() * layer.w.outputs())).collect();
    let (mut plain, mut codes) = (Vec::new(), Vec::new());
    for (((layer, rows), parts), out) in layers.iter().zip(rows()).zip(&parts).zip(&mut outputs) {
        let (n, k) = (layer.w.outputs(), layer.w.inputs());
        let mut rest = &mut out[..];
        for (range, b) in parts {
            let (c, after) = rest.split_at_mut(range.len() * n);
            rest = after;
            let a = |words: usize| range.start * words..range.end * words;
            let product = |a, k, c| Product { m: range.len(), n, k, a, b: &**b, c, c_stride: n, accumulate: false };
            match rows {
                Rows::Values(values) => plain.push(product(Mat::rows(&values.as_f32()[a(k)], k), k, c)),
                Rows::Codes { words, scales, form } => {
                    let tiles = k.div_ceil(TILE);
                    let data = &scales[range.start * tiles..];
                    let row_scales = RowScales { data, row_stride: tiles, block_stride: 1 };
                    let k = form.words(k);
                    let product = product(Mat::rows(&words.as_f32()[a(k)], k), k, c);
                    codes.push(CodeProduct { product, form: *form, row_scales });
                }
            }
        }
    }
    gemm::run_mixed(Isa::best(), &mut plain, &mut codes);
    let shaped = layers.iter().zip(outputs);
    shaped.map(|(layer, out)| Tensor::f32(&[layer.x.rows(), layer.w.outputs()], out)).collect()
}

/// The rounded inputs, and for every layer which is its own.
fn inputs(layers: &[Layer<'_>]) -> (Vec<Rows>, Vec<usize>) {
    let (mut inputs, mut of_layer) = (Vec::new(), Vec::<usize>::with_capacity(layers.len()));
    for (i, layer) in layers.iter().enumerate() {
        let same = |other: &Layer<'_>| {
            std::ptr::eq(other.x.as_f32(), layer.x.as_f32()) && other.w.rounding() == layer.w.rounding()
        };
        let at = match layers[..i].iter().position(same) {
            Some(other) => of_layer[other],
            None => {
                inputs.push(activation::input(layer.x, layer.w.rounding(), false).0);
                inputs.len() - 1
            }
        };
        of_layer.push(at);
    }
    (inputs, of_layer)
}

impl<'a> Layer<'a> {
    /// Rows and matrix of every expert that has any.
    fn parts(&self, rows: &Rows) -> Vec<(Range<usize>, Box<dyn Right + 'a>)> {
        let count = self.x.rows();
        let all = [0, count];
        let offsets = self.offsets.unwrap_or(&all);
        let fits = self.x.cols() == self.w.inputs() && offsets.len() == self.w.count() + 1;
        assert!(fits, "layers: input {:?}, {} offsets, weight {:?}", self.x.shape(), offsets.len(), self.w.shape());
        assert!(
            offsets[0] == 0 && offsets.last() == Some(&count) && offsets.is_sorted(),
            "layers: offsets must run to {count}"
        );
        let some = offsets.windows(2).enumerate().filter(|(_, range)| range[1] > range[0]);
        some.map(|(expert, range)| {
            let right: Box<dyn Right + 'a> = match rows {
                Rows::Values(_) => Box::new(Operand::forward(self.w, expert)),
                Rows::Codes { form, .. } => Box::new(CodeOperand::new(self.w, expert, true, *form)),
            };
            (range[0]..range[1], right)
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;
    use crate::{Fp8Format, Fp8Scales, Precision, grouped_linear, linear};

    #[test]
    fn layers_together_give_the_bits_of_each_alone() {
        let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
        let (x, slots) = (values(&[3, 150], 1), values(&[9, 150], 2));
        let offsets = [0, 0, 4, 5, 9];
        for precisions in [[Precision::F32; 3], [Precision::Bf16; 3], [fp8; 3], [fp8, Precision::F32, Precision::Bf16]]
        {
            let [a, b, c] = precisions;
            let dense = Weight::encode(&values(&[70, 150], 3), &a);
            let other = Weight::encode(&values(&[33, 150], 4), &b);
            let experts = Weight::encode(&values(&[4, 40, 150], 5), &c);
            for packed in [false, true] {
                let [dense, other, experts] =
                    [&dense, &other, &experts].map(|w| if packed { w.prepack() } else { w.clone() });
                let layers = [
                    Layer { x: &x, offsets: None, w: &dense },
                    Layer { x: &slots, offsets: Some(&offsets), w: &experts },
                    Layer { x: &x, offsets: None, w: &other },
                ];
                let got = forward(&layers);
                let want = [
                    linear::forward(&x, &dense),
                    grouped_linear::forward(&slots, &offsets, &experts),
                    linear::forward(&x, &other),
                ];
                for (got, want) in got.iter().zip(&want) {
                    assert_eq!((got.shape(), got.as_f32()), (want.shape(), want.as_f32()), "{precisions:?}");
                }
            }
        }
        assert!(forward(&[]).is_empty());
    }
}
