//! Activations and gradients as linear layers read them: rounded as the weight's precision says.
//!
//! F32: as they are. BF16: rounded. FP8: the input in tiles of 1×128 along its channels; for the weight gradient its
//! codes are dequantised and requantised in tiles of 128 tokens × 1 channel that start anew at each expert. The output
//! gradient is quantised from its f32 values in both shapes. Values are code · scale in f32. Single layers may keep
//! their input in another form or take other scales (`fp8/exceptions.rs`).

use half::bf16;
use rayon::prelude::*;

use crate::fp8::{E5m6, Encoding, Exceptions, Fill, Fp8, Fp8Scales, decode_rows, round_columns, round_rows};
use crate::isa::Isa;
use crate::swiglu::Cached;
use crate::{Precision, Tensor, bfloat, memory};

/// How a layer's operands other than its weight are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rounding {
    pub(crate) precision: Precision,
    pub(crate) exceptions: Exceptions,
}

/// A layer's input, kept for its weight gradient in as few bytes as the precision needs.
#[derive(Clone)]
pub(crate) enum Saved {
    F32(Tensor),
    Bf16(Tensor),
    Fp8(Fp8),
    E5m6(E5m6),
    /// Nothing of its own: the codes are those that SwiGLU keeps for its backward pass.
    Swiglu(Cached),
}

impl Saved {
    /// Bytes kept, scales included.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(x) | Self::Bf16(x) => x.bytes(),
            Self::Fp8(x) => x.bytes(),
            Self::E5m6(x) => x.bytes(),
            Self::Swiglu(_) => 0,
        }
    }
}

const CHUNK: usize = 1 << 14;

/// Works on `CHUNK` elements at a time of `values` and what lies beside them, on several threads when there are several.
fn by_chunks<T: Sync>(from: &[T], values: &mut [f32], work: impl Fn(&[T], &mut [f32]) + Sync) {
    if values.len() <= CHUNK {
        work(from, values);
    } else {
        values.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(values, from)| work(from, values));
    }
}

fn rounded_bf16(x: &Tensor) -> Tensor {
    let mut values = memory::buffer(x.numel());
    by_chunks(x.as_f32(), &mut values, |x, values| {
        values.copy_from_slice(x);
        bfloat::round(Isa::best(), values);
    });
    Tensor::f32(x.shape(), values)
}

/// The values of `x` `[rows, k]` that the forward product reads, and, if `save`, what the weight gradient will need.
pub(crate) fn input(x: &Tensor, rounding: Rounding, save: bool) -> (Tensor, Option<Saved>) {
    let exceptions = rounding.exceptions;
    match rounding.precision {
        Precision::F32 => (x.clone(), save.then(|| Saved::F32(x.clone()))),
        Precision::Bf16 if !save => (rounded_bf16(x), None),
        Precision::Bf16 => {
            let (mut values, mut narrow) = (memory::buffer(x.numel()), vec![bf16::ZERO; x.numel()]);
            (values.par_chunks_mut(CHUNK), narrow.par_chunks_mut(CHUNK), x.as_f32().par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(values, narrow, x)| {
                    values.copy_from_slice(x);
                    bfloat::round(Isa::best(), values);
                    bfloat::narrow(Isa::best(), values, narrow);
                });
            (Tensor::f32(x.shape(), values), Some(Saved::Bf16(Tensor::bf16(x.shape(), narrow))))
        }
        Precision::Fp8 { format, scales } => {
            let (encoding, scales) = (format.forward(), exceptions.input_scales(scales));
            if save && !exceptions.input_e5m6 {
                let (values, fp8) = Fp8::round_rows(x, encoding, scales);
                return (values, Some(Saved::Fp8(fp8)));
            }
            (rounded_rows(x, encoding, scales), save.then(|| Saved::E5m6(E5m6::quantize_rows(x))))
        }
    }
}

fn rounded_rows(x: &Tensor, encoding: Encoding, scales: Fp8Scales) -> Tensor {
    let mut values = memory::buffer(x.numel());
    let from = x.as_f32();
    let fill: Fill<'_> = &|range, out| out.copy_from_slice(&from[range]);
    round_rows(Isa::best(), &mut values, &mut [], &mut [], x.cols(), encoding, scales, fill);
    Tensor::f32(x.shape(), values)
}

/// The values of a saved input that the weight gradient reads.
pub(crate) fn saved_columns(saved: &Saved, rounding: Rounding, offsets: &[usize]) -> Tensor {
    let Precision::Fp8 { format, scales } = rounding.precision else {
        return saved_plain(saved);
    };
    let (isa, encoding) = (Isa::best(), format.forward());
    let scales = rounding.exceptions.input_scales(scales);
    match saved {
        Saved::Fp8(x) => {
            let cols = x.codes.cols();
            let fill: Fill<'_> = &|range, out| decode_rows(isa, x, range.start / cols, out);
            columns(x.codes.shape(), offsets, encoding, scales, fill)
        }
        Saved::E5m6(x) => {
            let cols = x.shape().last().copied().unwrap_or(1);
            let fill: Fill<'_> = &|range, out| x.decode_rows(isa, range.start / cols, out);
            columns(x.shape(), offsets, encoding, Fp8Scales::Ue8m0, fill)
        }
        Saved::Swiglu(x) => columns(x.shape(), offsets, encoding, scales, &|range, out| x.output(range, out)),
        Saved::F32(_) | Saved::Bf16(_) => saved_plain(saved),
    }
}

/// A saved input as it is.
fn saved_plain(saved: &Saved) -> Tensor {
    match saved {
        Saved::F32(x) => x.clone(),
        Saved::Bf16(x) => {
            let mut values = memory::buffer(x.numel());
            by_chunks(x.as_bf16(), &mut values, |x, values| bfloat::widen(Isa::best(), x, values));
            Tensor::f32(x.shape(), values)
        }
        Saved::Fp8(x) => x.dequantize(),
        Saved::E5m6(x) => x.dequantize(),
        Saved::Swiglu(x) => {
            let mut values = memory::buffer(x.shape().iter().product());
            x.output(0..values.len(), &mut values);
            Tensor::f32(x.shape(), values)
        }
    }
}

/// What `fill` gives, `[rows, cols]`, rounded in tiles of 128 rows by one column.
fn columns(shape: &[usize], offsets: &[usize], encoding: Encoding, scales: Fp8Scales, fill: Fill<'_>) -> Tensor {
    let mut values = memory::buffer(shape.iter().product());
    let cols = shape.last().copied().unwrap_or(1);
    round_columns(Isa::best(), &mut values, &mut [], cols, offsets, encoding, scales, fill);
    Tensor::f32(shape, values)
}

/// The values of `dy` `[rows, n]` that the input gradient reads.
pub(crate) fn gradient_rows(dy: &Tensor, rounding: Rounding) -> Tensor {
    match rounding.precision {
        Precision::F32 => dy.clone(),
        Precision::Bf16 => rounded_bf16(dy),
        Precision::Fp8 { format, scales } => {
            rounded_rows(dy, format.backward(), rounding.exceptions.gradient_scales(scales))
        }
    }
}

/// The values of `dy` `[rows, n]` that the weight gradient reads.
/// `dy` is what [`gradient_to_keep`] kept.
pub(crate) fn gradient_columns(dy: &Tensor, rounding: Rounding, offsets: &[usize]) -> Tensor {
    match rounding.precision {
        // Rounded for the input gradient already.
        Precision::F32 | Precision::Bf16 => dy.clone(),
        Precision::Fp8 { format, scales } => {
            let (from, scales) = (dy.as_f32(), rounding.exceptions.gradient_scales(scales));
            columns(dy.shape(), offsets, format.backward(), scales, &|range, out| out.copy_from_slice(&from[range]))
        }
    }
}

/// What the weight gradient is computed from: `dy` itself, or the rounded `rows` where that rounding serves both products.
pub(crate) fn gradient_to_keep(dy: Tensor, rows: Tensor, precision: Precision) -> Tensor {
    match precision {
        Precision::F32 | Precision::Bf16 => rows,
        Precision::Fp8 { .. } => dy,
    }
}
