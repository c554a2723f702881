//! Activations and gradients as linear layers read them: rounded as the weight's precision says.
//!
//! F32: as they are. BF16: rounded. FP8: the input in tiles of 1×128 along its channels; for the weight gradient its
//! codes are dequantised and requantised in tiles of 128 tokens × 1 channel that start anew at each expert. The output
//! gradient is quantised from its f32 values in both shapes. Values are code · scale in f32.

use half::bf16;
use rayon::prelude::*;

use crate::fp8::{Fp8, round_columns, round_rows, round_rows_values};
use crate::isa::{Isa, simd_fn};
use crate::weight::widen;
use crate::{Precision, Tensor};

/// A layer's input, kept for its weight gradient in as few bytes as the precision needs.
#[derive(Clone)]
pub(crate) enum Saved {
    F32(Tensor),
    Bf16(Tensor),
    Fp8(Fp8),
}

simd_fn! {
    /// Rounds to BF16 in place: nearest, ties to even.
    fn round_bf16(values: &mut [f32]) {
        for x in values {
            let bits = x.to_bits();
            let rounded = bits.wrapping_add(0x7fff).wrapping_add((bits >> 16) & 1) & 0xffff_0000;
            let quiet = (bits | 0x40_0000) & 0xffff_0000;
            *x = f32::from_bits(if bits & 0x7fff_ffff > f32::INFINITY.to_bits() { quiet } else { rounded });
        }
    }
}

simd_fn! {
    /// Drops the low half of values already rounded to BF16.
    fn narrow_bf16(values: &[f32], out: &mut [bf16]) {
        for (o, x) in out.iter_mut().zip(values) {
            *o = bf16::from_bits((x.to_bits() >> 16) as u16);
        }
    }
}

const CHUNK: usize = 1 << 15;

fn rounded_bf16(mut values: Vec<f32>) -> Vec<f32> {
    values.par_chunks_mut(CHUNK).for_each(|chunk| round_bf16(Isa::best(), chunk));
    values
}

/// The values of `x` `[rows, k]` that the forward product reads, and, if `save`, what the weight gradient will need.
pub(crate) fn input(x: &Tensor, precision: Precision, save: bool) -> (Tensor, Option<Saved>) {
    match precision {
        Precision::F32 => (x.clone(), save.then(|| Saved::F32(x.clone()))),
        Precision::Bf16 => {
            let values = rounded_bf16(x.as_f32().to_vec());
            let saved = save.then(|| {
                let mut narrow = vec![bf16::ZERO; values.len()];
                narrow
                    .par_chunks_mut(CHUNK)
                    .zip(values.par_chunks(CHUNK))
                    .for_each(|(o, x)| narrow_bf16(Isa::best(), x, o));
                Saved::Bf16(Tensor::bf16(x.shape(), narrow))
            });
            (Tensor::f32(x.shape(), values), saved)
        }
        Precision::Fp8 { format, scales } => {
            let values = x.as_f32().to_vec();
            if save {
                let (values, fp8) = round_rows(Isa::best(), values, x.cols(), format.forward(), scales);
                (Tensor::f32(x.shape(), values), Some(Saved::Fp8(fp8)))
            } else {
                let mut values = values;
                round_rows_values(Isa::best(), &mut values, x.cols(), format.forward(), scales);
                (Tensor::f32(x.shape(), values), None)
            }
        }
    }
}

/// The values of a saved input that the weight gradient reads.
pub(crate) fn saved_columns(saved: &Saved, precision: Precision, offsets: &[usize]) -> Tensor {
    match (saved, precision) {
        (Saved::F32(x), _) => x.clone(),
        (Saved::Bf16(x), _) => {
            let mut values = vec![0.0; x.numel()];
            values.par_chunks_mut(CHUNK).zip(x.as_bf16().par_chunks(CHUNK)).for_each(|(o, x)| widen(Isa::best(), x, o));
            Tensor::f32(x.shape(), values)
        }
        (Saved::Fp8(x), Precision::Fp8 { format, scales }) => {
            let mut values = x.dequantize().into_f32();
            round_columns(Isa::best(), &mut values, &mut [], x.codes.cols(), offsets, format.forward(), scales);
            Tensor::f32(x.codes.shape(), values)
        }
        (Saved::Fp8(x), _) => x.dequantize(),
    }
}

/// The values of `dy` `[rows, n]` that the input gradient reads.
pub(crate) fn gradient_rows(dy: &Tensor, precision: Precision) -> Tensor {
    match precision {
        Precision::F32 => dy.clone(),
        Precision::Bf16 => Tensor::f32(dy.shape(), rounded_bf16(dy.as_f32().to_vec())),
        Precision::Fp8 { format, scales } => {
            let mut values = dy.as_f32().to_vec();
            round_rows_values(Isa::best(), &mut values, dy.cols(), format.backward(), scales);
            Tensor::f32(dy.shape(), values)
        }
    }
}

/// The values of `dy` `[rows, n]` that the weight gradient reads.
pub(crate) fn gradient_columns(dy: Tensor, precision: Precision, offsets: &[usize]) -> Tensor {
    let shape = dy.shape().to_vec();
    match precision {
        Precision::F32 => dy,
        Precision::Bf16 => Tensor::f32(&shape, rounded_bf16(dy.into_f32())),
        Precision::Fp8 { format, scales } => {
            let cols = dy.cols();
            let mut values = dy.into_f32();
            round_columns(Isa::best(), &mut values, &mut [], cols, offsets, format.backward(), scales);
            Tensor::f32(&shape, values)
        }
    }
}
