//! Rotary positions on interleaved pairs, with YaRN.
//!
//! Pair (2i, 2i+1) of the rotated part turns by the angle p·θ_i: (a, b) → (a cos − b sin, a sin + b cos), and stays
//! where it is (the checkpoint's layout). θ_i = base^(−2i/dim). YaRN blends θ_i with θ_i/s by a ramp that is linear in
//! the dimension *index* (report §7, code form; `reference/deepseek-v3.md` §7 and §14). Angles are f32 products, as
//! published implementations compute them; cosine and sine are taken in f64 and rounded once.
//! The backward pass turns by the opposite angle.

use std::f64::consts::PI;
use std::sync::Arc;

use crate::memory::buffer;
use crate::vector::for_row_chunks;
use crate::{Back, Grads, Job, Tape, Tensor, Var, VarId};

/// Tokens a thread rotates at a time.
const CHUNK_TOKENS: usize = 32;

/// YaRN context extension.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// s, by how much the context grows.
    pub factor: f32,
    /// Pairs that turn more often than this within the original context keep their frequency.
    pub beta_fast: f32,
    /// Pairs that turn less often than this are slowed down by `factor`.
    pub beta_slow: f32,
    /// Numerator of the cosine and sine multiplier.
    pub mscale: f32,
    /// Its denominator; squared, it multiplies attention logits. 0 means absent.
    pub mscale_all_dim: f32,
    /// Context length before extension, tokens.
    pub original_context: usize,
}

impl Yarn {
    /// 0.1·m·ln s + 1, or 1 when nothing is extended.
    fn attention_multiplier(&self, m: f32) -> f32 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * m * self.factor.ln() + 1.0 }
    }

    /// First and last index of the ramp.
    fn ramp_bounds(&self, dim: usize, theta: f32) -> (f64, f64) {
        let index = |turns: f32| {
            let wavelength_ratio = self.original_context as f64 / (f64::from(turns) * 2.0 * PI);
            dim as f64 * wavelength_ratio.ln() / (2.0 * f64::from(theta).ln())
        };
        let low = index(self.beta_fast).floor().max(0.0);
        let high = index(self.beta_slow).ceil().min(dim as f64 - 1.0);
        (low, if low == high { high + 0.001 } else { high })
    }
}

/// What attention logits are multiplied by: 1/√width, times m² under YaRN with m = 0.1·mscale_all_dim·ln s + 1.
pub fn softmax_scale(qk_head_dim: usize, yarn: Option<&Yarn>) -> f32 {
    let m = yarn.map_or(1.0, |yarn| yarn.attention_multiplier(yarn.mscale_all_dim));
    m * m / (qk_head_dim as f32).sqrt()
}

#[derive(Debug)]
struct Table {
    dim: usize,
    max_positions: usize,
    /// Cosine and sine, interleaved: `[max_positions, dim / 2, 2]`.
    turns: Vec<f32>,
}

/// Cosines and sines of every position. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Table>);

impl RopeTable {
    /// Tabulates positions `0..max_positions` for a rotated part `dim` wide.
    ///
    /// # Panics
    /// When `dim` is odd.
    pub fn new(dim: usize, theta: f32, yarn: Option<&Yarn>, max_positions: usize) -> Self {
        assert!(dim.is_multiple_of(2), "rotary width {dim} is odd");
        let frequencies = frequencies(dim, theta, yarn);
        let multiplier = yarn.map_or(1.0, |yarn| {
            yarn.attention_multiplier(yarn.mscale) / yarn.attention_multiplier(yarn.mscale_all_dim)
        });
        let mut turns = Vec::with_capacity(max_positions * dim);
        for position in 0..max_positions {
            for frequency in &frequencies {
                let angle = f64::from(position as f32 * frequency);
                turns.push(angle.cos() as f32 * multiplier);
                turns.push(angle.sin() as f32 * multiplier);
            }
        }
        Self(Arc::new(Table { dim, max_positions, turns }))
    }

    /// Width of the rotated part.
    pub fn dim(&self) -> usize {
        self.0.dim
    }

    /// Number of positions tabulated.
    pub fn max_positions(&self) -> usize {
        self.0.max_positions
    }
}

fn frequencies(dim: usize, theta: f32, yarn: Option<&Yarn>) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let period = f64::from(theta).powf(2.0 * i as f64 / dim as f64) as f32;
            let Some(yarn) = yarn else { return 1.0 / period };
            let (low, high) = yarn.ramp_bounds(dim, theta);
            let kept = 1.0 - (((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32);
            1.0 / (yarn.factor * period) * (1.0 - kept) + 1.0 / period * kept
        })
        .collect()
}

/// Rotates columns `start..start + table.dim()` of every head of `x` `[tokens, heads, d]` (or `[tokens, d]`); token t
/// stands at `positions[t]`.
///
/// # Panics
/// When the columns do not exist, or a position is not in the table.
pub fn forward(x: &Tensor, start: usize, positions: &[u32], table: &RopeTable) -> Tensor {
    let mut out = buffer(x.numel());
    out.copy_from_slice(x.as_f32());
    rotate(&mut out, x.cols(), start, positions, table, 1.0);
    Tensor::f32(x.shape(), out)
}

/// [`forward`] with its backward pass.
pub fn on_tape(tape: &mut Tape, x: &Var, start: usize, positions: &Arc<[u32]>, table: &RopeTable) -> Var {
    let value = forward(&x.value, start, positions, table);
    let input = x.id();
    let (positions, table, width) = (positions.clone(), table.clone(), x.value.cols());
    tape.push(value, |out| Box::new(RopeBack { input, out, width, start, positions, table }))
}

/// `direction` is 1 to turn forwards, -1 to turn back.
fn rotate(data: &mut [f32], width: usize, start: usize, positions: &[u32], table: &RopeTable, direction: f32) {
    if positions.is_empty() {
        return;
    }
    let dim = table.dim();
    let per_token = data.len() / positions.len();
    assert!(
        start + dim <= width && per_token * positions.len() == data.len() && per_token.is_multiple_of(width),
        "rope of columns {start}..{} of rows {width} wide, {} elements, {} positions",
        start + dim,
        data.len(),
        positions.len(),
    );
    for_row_chunks(data, per_token, CHUNK_TOKENS, per_token, |first, chunk| {
        for (token, row) in chunk.chunks_exact_mut(per_token).enumerate() {
            let turns = &table.0.turns[positions[first + token] as usize * dim..][..dim];
            for head in row.chunks_exact_mut(width) {
                for (pair, turn) in head[start..start + dim].chunks_exact_mut(2).zip(turns.chunks_exact(2)) {
                    let (a, b, cos, sin) = (pair[0], pair[1], turn[0], direction * turn[1]);
                    pair[0] = a * cos - b * sin;
                    pair[1] = a * sin + b * cos;
                }
            }
        }
    });
}

struct RopeBack {
    input: VarId,
    out: VarId,
    width: usize,
    start: usize,
    positions: Arc<[u32]>,
    table: RopeTable,
}

impl Back for RopeBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let mut dy = grads.take(self.out)?;
        rotate(dy.as_f32_mut(), self.width, self.start, &self.positions, &self.table, -1.0);
        grads.add(self.input, dy);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, values};

    /// The 671B model's extension to 163840 tokens.
    fn published() -> Yarn {
        Yarn { factor: 40.0, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0, original_context: 4096 }
    }

    #[test]
    fn the_published_ramp_and_scale() {
        assert_eq!(published().ramp_bounds(64, 10000.0), (10.0, 23.0));
        assert!((softmax_scale(192, Some(&published())) - 0.135_233_8).abs() < 1e-6);
        assert!((softmax_scale(192, None) - 0.072_168_8).abs() < 1e-6);
        let (plain, scaled) = (frequencies(64, 10000.0, None), frequencies(64, 10000.0, Some(&published())));
        assert_eq!(plain[..11], scaled[..11]);
        for (plain, scaled) in plain[23..].iter().zip(&scaled[23..]) {
            assert!((plain / 40.0 - scaled).abs() <= 1e-6 * scaled);
        }
        let middle = plain[15] * (1.0 - 5.0 / 13.0) + plain[15] / 40.0 * (5.0 / 13.0);
        assert!((scaled[15] - middle).abs() < 1e-6 * middle);
        assert!((RopeTable::new(4, 10000.0, Some(&published()), 1).0.turns[0] - 1.0).abs() < 1e-7);
    }

    #[test]
    fn a_short_context_clamps_the_ramp() {
        let yarn = Yarn { original_context: 16, ..published() };
        let (low, high) = yarn.ramp_bounds(8, 10000.0);
        assert!(low == 0.0 && high <= 7.0 && high > low);
    }

    #[test]
    fn pairs_turn_by_position_times_frequency() {
        let table = RopeTable::new(4, 10000.0, None, 4000);
        let x = values(&[2, 3, 7], 1);
        let y = forward(&x, 2, &[0, 3999], &table);
        assert_eq!(x.as_f32()[..21], y.as_f32()[..21]);
        for head in 0..3 {
            let at = 21 + head * 7;
            let (x, y) = (&x.as_f32()[at..at + 7], &y.as_f32()[at..at + 7]);
            assert_eq!((x[..2].to_vec(), x[6]), (y[..2].to_vec(), y[6]));
            for (pair, frequency) in [1.0_f64, 0.01].into_iter().enumerate() {
                let (a, b) = (f64::from(x[2 + 2 * pair]), f64::from(x[3 + 2 * pair]));
                let (sin, cos) = (3999.0 * frequency).sin_cos();
                assert!((f64::from(y[2 + 2 * pair]) - (a * cos - b * sin)).abs() < 1e-5);
                assert!((f64::from(y[3 + 2 * pair]) - (a * sin + b * cos)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn gradients() {
        let table = RopeTable::new(4, 100.0, Some(&published()), 50);
        let positions: Arc<[u32]> = [7, 0, 49].into();
        let run = |t: &mut Tape, x: &[Var], _: &[crate::Param]| on_tape(t, &x[0], 1, &positions, &table);
        check_gradients("rope", vec![values(&[3, 2, 5], 2)], vec![], run, 1e-3);
        check_gradients("rope without heads", vec![values(&[3, 5], 2)], vec![], run, 1e-3);
    }
}
