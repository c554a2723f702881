//! Activations and gradients as linear layers read them: rounded as the weight's precision says.
//!
//! F32: as they are. BF16: rounded. FP8: the input in tiles of 1×128 along its channels; for the weight gradient its
//! codes are dequantised and requantised in tiles of 128 tokens × 1 channel that start anew at each expert. The output
//! gradient is quantised from its f32 values in both shapes. Products read the codes and, apart from them, the scales
//! (`gemm/codes.rs`). Single layers may keep their input in another form or take other scales (`fp8/exceptions.rs`).

use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use crate::fp8::{
    E5m6, Encoding, Exceptions, Fill, Fp8, Fp8Scales, Rule, Source, View, decode_rows, tile_rows, words_of_columns,
    words_of_rows,
};
use crate::gemm::Form;
use crate::isa::Isa;
use crate::permute::{self, Dispatch};
use crate::swiglu::Cached;
use crate::{Precision, Tensor, bfloat, memory};

/// How a layer's operands other than its weight are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rounding {
    pub(crate) precision: Precision,
    pub(crate) exceptions: Exceptions,
}

/// `[rows, k]` as the left operand of a product over k.
#[derive(Clone)]
pub(crate) enum Rows {
    /// F32 values.
    Values(Tensor),
    /// Codes as words `[rows, form.words(k)]`, with the scales of 1×128 tiles `[rows, ⌈k/128⌉]`.
    Codes { words: Tensor, scales: Vec<f32>, form: Form },
}

/// `[tokens, cols]` as an operand of a product over tokens.
pub(crate) enum Columns {
    /// F32 values.
    Values(Tensor),
    /// Codes.
    Codes(ColumnCodes),
}

/// Words `[.., cols]` and scales of 128×1 tiles `[tiles, cols]`, both anew at each expert.
pub(crate) struct ColumnCodes {
    words: Tensor,
    scales: Vec<f32>,
    pub(crate) form: Form,
}

impl ColumnCodes {
    /// Words and scales of the tokens between each two `offsets`, those of the tensor.
    pub(crate) fn segments(&self, cols: usize, offsets: &[usize]) -> Vec<(&[f32], &[f32])> {
        let (mut words, mut scales) = (self.words.as_f32(), &self.scales[..]);
        let segments = offsets.windows(2).map(|range| {
            let (here, after, here_scales, after_scales);
            (here, after) =
                words.split_at(tile_rows(range).map(|tile| self.form.words(tile.len())).sum::<usize>() * cols);
            (here_scales, after_scales) = scales.split_at(tile_rows(range).count() * cols);
            (words, scales) = (after, after_scales);
            (here, here_scales)
        });
        segments.collect()
    }
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
    /// Nothing of its own: rows of a tensor that other ops keep, gathered again.
    Gathered(Tensor, Arc<Dispatch>),
}

impl Saved {
    /// Bytes kept, scales included.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(x) | Self::Bf16(x) => x.bytes(),
            Self::Fp8(x) => x.bytes(),
            Self::E5m6(x) => x.bytes(),
            Self::Swiglu(_) | Self::Gathered(..) => 0,
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

/// What the forward product reads of `x` `[rows, k]`, and, if `save`, what the weight gradient will need.
pub(crate) fn input(x: &Tensor, rounding: Rounding, save: bool) -> (Rows, Option<Saved>) {
    let exceptions = rounding.exceptions;
    match rounding.precision {
        Precision::F32 => (Rows::Values(x.clone()), save.then(|| Saved::F32(x.clone()))),
        Precision::Bf16 if !save => (Rows::Values(rounded_bf16(x)), None),
        Precision::Bf16 => {
            let (mut values, mut narrow) = (memory::buffer(x.numel()), memory::buffer::<bf16>(x.numel()));
            (values.par_chunks_mut(CHUNK), narrow.par_chunks_mut(CHUNK), x.as_f32().par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(values, narrow, x)| {
                    values.copy_from_slice(x);
                    bfloat::round(Isa::best(), values);
                    bfloat::narrow(Isa::best(), values, narrow);
                });
            (Rows::Values(Tensor::f32(x.shape(), values)), Some(Saved::Bf16(Tensor::bf16(x.shape(), narrow))))
        }
        Precision::Fp8 { format, scales } => {
            let (encoding, scales) = (format.forward(), exceptions.input_scales(scales));
            if save && !exceptions.input_e5m6 {
                let form = Form::of_codes(Isa::best());
                let (words, fp8) = Fp8::round_rows(x, encoding, scales, View::Words(form));
                let scales = fp8.scales.as_f32().to_vec();
                return (Rows::Codes { words, scales, form }, Some(Saved::Fp8(fp8)));
            }
            (rows_of_codes(x, encoding, scales), save.then(|| Saved::E5m6(E5m6::quantize_rows(x))))
        }
    }
}

/// The values, code · scale where there are codes, that stand for `x` in a product.
pub(crate) fn input_values(x: &Tensor, rounding: Rounding) -> Tensor {
    match rounding.precision {
        Precision::F32 => x.clone(),
        Precision::Bf16 => rounded_bf16(x),
        Precision::Fp8 { format, scales } => {
            let scales = rounding.exceptions.input_scales(scales);
            let rule = Rule { encoding: format.forward(), scales, view: View::Values };
            Tensor::f32(x.shape(), words_of_rows(x, rule, &mut []).0)
        }
    }
}

fn rows_of_codes(x: &Tensor, encoding: Encoding, scales: Fp8Scales) -> Rows {
    let form = Form::of_codes(Isa::best());
    let (words, scales) = words_of_rows(x, Rule { encoding, scales, view: View::Words(form) }, &mut []);
    Rows::Codes { words: Tensor::f32(&[words.len()], words), scales, form }
}

/// What the weight gradient reads of a saved input.
pub(crate) fn saved_columns(saved: &Saved, rounding: Rounding, offsets: &[usize]) -> Columns {
    let Precision::Fp8 { format, scales } = rounding.precision else {
        return Columns::Values(saved_plain(saved));
    };
    let (isa, encoding) = (Isa::best(), format.forward());
    let scales = rounding.exceptions.input_scales(scales);
    match saved {
        Saved::Fp8(x) => {
            let cols = x.codes.cols();
            let fill: Fill<'_> = &|range, out| decode_rows(isa, x, range.start / cols, out);
            columns(x.codes.shape(), offsets, encoding, scales, Source::Computed(fill))
        }
        Saved::E5m6(x) => {
            let cols = x.shape().last().copied().unwrap_or(1);
            let fill: Fill<'_> = &|range, out| x.decode_rows(isa, range.start / cols, out);
            columns(x.shape(), offsets, encoding, Fp8Scales::Ue8m0, Source::Computed(fill))
        }
        Saved::Swiglu(x) => {
            let fill: Fill<'_> = &|range, out| x.output(range, out);
            columns(x.shape(), offsets, encoding, scales, Source::Computed(fill))
        }
        Saved::F32(_) | Saved::Bf16(_) | Saved::Gathered(..) => Columns::Values(saved_plain(saved)),
    }
}

/// A saved input as it is.
fn saved_plain(saved: &Saved) -> Tensor {
    match saved {
        Saved::F32(x) => x.clone(),
        Saved::Gathered(x, dispatch) => permute::forward(x, dispatch),
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

/// `source`, `[rows, cols]`, rounded in tiles of 128 rows by one column.
fn columns(shape: &[usize], offsets: &[usize], encoding: Encoding, scales: Fp8Scales, source: Source<'_>) -> Columns {
    let (cols, form) = (shape.last().copied().unwrap_or(1), Form::of_codes(Isa::best()));
    let rule = Rule { encoding, scales, view: View::Words(form) };
    let (words, scales) = words_of_columns(source, cols, offsets, rule, &mut []);
    Columns::Codes(ColumnCodes { words: Tensor::f32(&[words.len()], words), scales, form })
}

/// What the input gradient reads of `dy` `[rows, n]`.
pub(crate) fn gradient_rows(dy: &Tensor, rounding: Rounding) -> Rows {
    match rounding.precision {
        Precision::F32 => Rows::Values(dy.clone()),
        Precision::Bf16 => Rows::Values(rounded_bf16(dy)),
        Precision::Fp8 { format, scales } => {
            rows_of_codes(dy, format.backward(), rounding.exceptions.gradient_scales(scales))
        }
    }
}

/// What the weight gradient reads of `dy` `[rows, n]`, which is what [`gradient_to_keep`] kept.
pub(crate) fn gradient_columns(dy: &Tensor, rounding: Rounding, offsets: &[usize]) -> Columns {
    match rounding.precision {
        // Rounded for the input gradient already.
        Precision::F32 | Precision::Bf16 => Columns::Values(dy.clone()),
        Precision::Fp8 { format, scales } => {
            let scales = rounding.exceptions.gradient_scales(scales);
            columns(dy.shape(), offsets, format.backward(), scales, Source::Plain(dy.as_f32()))
        }
    }
}

/// What the weight gradient is computed from: `dy` itself, or the rounded `rows` where that rounding serves both products.
pub(crate) fn gradient_to_keep(dy: Tensor, rows: Rows) -> Tensor {
    match rows {
        Rows::Values(values) => values,
        Rows::Codes { .. } => dy,
    }
}
