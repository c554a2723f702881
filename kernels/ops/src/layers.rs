//! Several linear layers at once, for inference: y_i = x_i · w_iᵀ, one region of parallel work instead of one for each.
//!
//! A layer is that of `linear.rs`, or with `offsets` that of `grouped_linear.rs`. Layers that read one input and round it
//! alike share its rounding.
//!
//! Invariant: the bits are those of the layers one by one.

use crate::activation::{self, Rows};
use crate::gemm;
use crate::grouped_linear::{Group, check};
use crate::isa::Isa;
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
    let groups: Vec<_> = layers.iter().zip(of_layer).map(|(layer, at)| layer.group(&inputs[at])).collect();
    let mut outputs: Vec<_> = layers.iter().map(|layer| memory::buffer(layer.x.rows() * layer.w.outputs())).collect();
    let (mut plain, mut codes) = (Vec::new(), Vec::new());
    for (group, out) in groups.iter().zip(&mut outputs) {
        group.products(out, false, &mut plain, &mut codes);
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
    fn group(&self, rows: &'a Rows) -> Group<'a> {
        let all = [0, self.x.rows()];
        let offsets = self.offsets.unwrap_or(&all);
        check(self.x.shape(), offsets, self.w);
        Group::new(rows, offsets, self.w, true, [self.w.outputs(), self.w.inputs()])
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
