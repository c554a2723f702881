//! Block-scaled FP8: codes with one f32 scale per tile of 128.
//!
//! For a tile with largest magnitude amax, s = amax / top (top = 448 for E4M3, 57344 for E5M2; amax = 0 gives s = 1),
//! code = RNE(x · (top / amax)) saturating, value = code · s. With UE8M0 scales s = 2^⌈log₂(amax / top)⌉, taken from the
//! bits of the f32 quotient, and code = RNE(x / s). NaN stays NaN. What single layers do otherwise is in `exceptions.rs`,
//! the 12-bit cache of one of them in `e5m6.rs`. DeepSeek-V3 report §3.3; reference §14.
//!
//! Invariant: a conversion is exact bit for bit on every instruction set and for any number of threads.

mod codec;
pub mod e5m6;
mod exceptions;
mod tiles;

use std::sync::Arc;

pub(crate) use codec::{decode_run, pairs_across, pairs_along};
pub use e5m6::E5m6;
pub use exceptions::Exceptions;
use tiles::round_blocks;
pub(crate) use tiles::{Fill, Rule, Source, View, decode_rows, tile_rows};
use tiles::{Rounded, round_columns, round_rows};

use crate::gemm::Form;
use crate::isa::Isa;
use crate::{Tensor, memory};

/// Values that share a scale lie in runs or squares of this size.
pub const TILE: usize = 128;

/// Which FP8 format each operand of a linear layer takes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Fp8Format {
    /// E4M3 for every tensor; the report's choice.
    #[default]
    E4m3,
    /// E5M2 for every tensor.
    E5m2,
    /// E4M3 for activations and weights, E5M2 for the output gradient in both backward products.
    Hybrid,
}

impl Fp8Format {
    /// Encoding of weights and activations.
    pub fn forward(self) -> Encoding {
        match self {
            Self::E4m3 | Self::Hybrid => Encoding::E4m3,
            Self::E5m2 => Encoding::E5m2,
        }
    }

    /// Encoding of output gradients.
    pub fn backward(self) -> Encoding {
        match self {
            Self::E4m3 => Encoding::E4m3,
            Self::E5m2 | Self::Hybrid => Encoding::E5m2,
        }
    }
}

/// How a tile's scale is represented.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Fp8Scales {
    /// amax / top as f32.
    #[default]
    F32,
    /// The power of two at or above it (UE8M0).
    Ue8m0,
}

/// Format of one code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// 4 exponent bits, 3 mantissa bits, no infinity.
    E4m3,
    /// 5 exponent bits, 2 mantissa bits.
    E5m2,
}

impl Encoding {
    /// Largest finite magnitude.
    pub fn top(self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::E5m2 => 57344.0,
        }
    }

    /// Code of `value` at scale 1: round to nearest even, saturating.
    pub fn encode(self, value: f32) -> u8 {
        codec::encode_one(value, self)
    }

    /// Value of `code` at scale 1.
    pub fn decode(self, code: u8) -> f32 {
        codec::decode_one(code, self)
    }
}

/// Which values share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// One row, 128 columns; scales `[rows, ⌈cols/128⌉]`.
    Row128,
    /// 128 rows, one column, starting anew in each segment of rows; scales `[tiles, cols]`.
    Col128,
    /// 128 rows, 128 columns; scales `[.., ⌈rows/128⌉, ⌈cols/128⌉]`.
    Block128,
}

/// FP8 codes with their scales.
#[derive(Clone, Debug)]
pub struct Fp8 {
    /// `[.., rows, cols]`, U8.
    pub codes: Tensor,
    /// F32, shape as [`Tile`] says.
    pub scales: Tensor,
    /// Which values share a scale.
    pub tile: Tile,
    /// Format of the codes.
    pub encoding: Encoding,
    /// Row segments of a [`Tile::Col128`]; empty otherwise.
    pub offsets: Arc<[usize]>,
}

/// Words and scales of `x` `[.., cols]` in tiles of one row by 128 columns; `codes` may be empty.
pub(crate) fn words_of_rows(x: &Tensor, rule: Rule, codes: &mut [u8]) -> (Vec<f32>, Vec<f32>) {
    let (cols, rows) = (x.cols(), x.numel() / x.cols().max(1));
    let mut words = memory::buffer(rows * rule.view.words(cols));
    let mut scales = vec![0.0; rows * cols.div_ceil(TILE)];
    let out = Rounded { words: &mut words, codes, scales: &mut scales };
    round_rows(Isa::best(), Source::Plain(x.as_f32()), rows, cols, rule, out);
    (words, scales)
}

/// Words and scales of `source` `[rows, cols]` in tiles of 128 rows by one column; `codes` may be empty.
pub(crate) fn words_of_columns(
    source: Source<'_>,
    cols: usize,
    offsets: &[usize],
    rule: Rule,
    codes: &mut [u8],
) -> (Vec<f32>, Vec<f32>) {
    let word_rows: usize = tile_rows(offsets).map(|range| rule.view.words(range.len())).sum();
    let mut words = memory::buffer(word_rows * cols);
    let mut scales = vec![0.0; tile_rows(offsets).count() * cols];
    let out = Rounded { words: &mut words, codes, scales: &mut scales };
    round_columns(Isa::best(), source, cols, offsets, rule, out);
    (words, scales)
}

impl Fp8 {
    /// Quantises `x` `[.., cols]` in tiles of one row by 128 columns.
    ///
    /// # Panics
    /// When `x` is not F32.
    pub fn quantize_rows(x: &Tensor, encoding: Encoding, scales: Fp8Scales) -> Self {
        Self::round_rows(x, encoding, scales, View::Words(Form::F32)).1
    }

    /// As [`Fp8::quantize_rows`], with what a product reads.
    pub(crate) fn round_rows(x: &Tensor, encoding: Encoding, scales: Fp8Scales, view: View) -> (Tensor, Self) {
        let cols = x.cols();
        let rows = x.numel() / cols.max(1);
        let mut codes = memory::buffer(x.numel());
        let (words, factors) = words_of_rows(x, Rule { encoding, scales, view }, &mut codes);
        let mut factor_shape = x.shape().to_vec();
        if let Some(last) = factor_shape.last_mut() {
            *last = cols.div_ceil(TILE);
        }
        let fp8 = Self {
            codes: Tensor::u8(x.shape(), codes),
            scales: Tensor::f32(&factor_shape, factors),
            tile: Tile::Row128,
            encoding,
            offsets: Arc::new([]),
        };
        (Tensor::f32(&[rows, view.words(cols)], words), fp8)
    }

    /// Quantises `x` `[rows, cols]` in tiles of 128 rows by one column. `offsets` bound the row segments (experts) at
    /// which tiles start anew: `[0, rows]` for one.
    ///
    /// # Panics
    /// When `x` is not F32 or `offsets` do not run from 0 to its row count.
    pub fn quantize_columns(x: &Tensor, offsets: &Arc<[usize]>, encoding: Encoding, scales: Fp8Scales) -> Self {
        let (cols, rows) = (x.cols(), x.numel() / x.cols().max(1));
        assert!(offsets.first() == Some(&0) && offsets.last() == Some(&rows), "offsets must run from 0 to {rows}");
        let mut codes = vec![0; x.numel()];
        let rule = Rule { encoding, scales, view: View::Words(Form::F32) };
        let (words, factors) = words_of_columns(Source::Plain(x.as_f32()), cols, offsets, rule, &mut codes);
        memory::give_back(words);
        Self {
            codes: Tensor::u8(x.shape(), codes),
            scales: Tensor::f32(&[factors.len() / cols.max(1), cols], factors),
            tile: Tile::Col128,
            encoding,
            offsets: offsets.clone(),
        }
    }

    /// Quantises `w` `[rows, cols]`, or a stack of such, in blocks of 128 by 128.
    ///
    /// # Panics
    /// When `w` is not F32 or has fewer than two dimensions.
    pub fn quantize_blocks(w: &Tensor, encoding: Encoding, scales: Fp8Scales) -> Self {
        let shape = w.shape();
        assert!(shape.len() >= 2, "block tiles need a matrix, not shape {shape:?}");
        let (rows, cols) = (shape[shape.len() - 2], shape[shape.len() - 1]);
        let (codes, factors) = round_blocks(Isa::best(), w.as_f32(), rows, cols, encoding, scales);
        let mut scale_shape = shape[..shape.len() - 2].to_vec();
        scale_shape.extend([rows.div_ceil(TILE), cols.div_ceil(TILE)]);
        Self {
            codes: Tensor::u8(shape, codes),
            scales: Tensor::f32(&scale_shape, factors),
            tile: Tile::Block128,
            encoding,
            offsets: Arc::new([]),
        }
    }

    /// The values, F32, in the shape of the codes.
    pub fn dequantize(&self) -> Tensor {
        Tensor::f32(self.codes.shape(), tiles::dequantize(Isa::best(), self))
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }
}
