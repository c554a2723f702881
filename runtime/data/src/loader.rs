//! Order of training samples. Sample s of length T is the window [sT, sT + T + 1) of the flat token stream; sample `cursor`
//! of the run is sample permute(cursor mod n) of epoch cursor / n, n = (tokens - 1) / T.
//!
//! Invariant: constant memory, the same on every rank and for every thread count, resumable from one integer, the cursor.
//! Cursor ranges that a guard excluded are stepped over.

use std::ops::Range;

use dsv3_core::{mix64, permute_index};

use crate::error::{DataError, Result};

/// Draws windows of a token stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loader {
    seq_len: u64,
    samples: u64,
    holdout: u64,
    seed: u64,
    excluded: Vec<Range<u64>>,
}

impl Loader {
    /// A loader over `total_tokens` tokens.
    ///
    /// # Errors
    /// When the stream is shorter than one window of `seq_len + 1`.
    pub fn new(total_tokens: u64, seq_len: usize, seed: u64) -> Result<Self> {
        let seq_len = seq_len as u64;
        let samples = total_tokens.saturating_sub(1).checked_div(seq_len).unwrap_or(0);
        if samples == 0 {
            return Err(DataError::options(format!(
                "{total_tokens} tokens hold no sample of {seq_len} tokens and one more"
            )));
        }
        Ok(Self { seq_len, samples, holdout: 0, seed, excluded: Vec::new() })
    }

    /// Keeps the last `samples` windows of the stream out of training, for validation.
    ///
    /// # Errors
    /// When nothing would be left.
    pub fn with_holdout(mut self, samples: u64) -> Result<Self> {
        if samples >= self.samples + self.holdout {
            return Err(DataError::options(format!(
                "holding out {samples} samples of {} leaves none to train on",
                self.samples + self.holdout
            )));
        }
        self.samples = self.samples + self.holdout - samples;
        self.holdout = samples;
        Ok(self)
    }

    /// Steps over these cursor ranges (in any order, overlaps allowed).
    #[must_use]
    pub fn with_excluded(mut self, mut ranges: Vec<Range<u64>>) -> Self {
        ranges.retain(|range| range.start < range.end);
        ranges.sort_by_key(|range| (range.start, range.end));
        self.excluded = ranges;
        self
    }

    /// Samples drawn before any is drawn again.
    pub fn samples_per_epoch(&self) -> u64 {
        self.samples
    }

    /// Tokens of a sample, without the one that is only a target.
    pub fn seq_len(&self) -> usize {
        self.seq_len as usize
    }

    /// Window of the sample at `cursor`, exclusions apart.
    pub fn window(&self, cursor: u64) -> Range<u64> {
        let (epoch, index) = (cursor / self.samples, cursor % self.samples);
        let key = mix64(mix64(self.seed) ^ mix64(epoch.wrapping_add(0x5EED)));
        self.at(permute_index(index, self.samples, key))
    }

    /// Windows of the next `count` samples from `cursor` on, and the cursor after them.
    pub fn batch(&self, cursor: u64, count: usize) -> (Vec<Range<u64>>, u64) {
        let mut windows = Vec::with_capacity(count);
        let mut cursor = cursor;
        while windows.len() < count {
            cursor = self.skip_excluded(cursor);
            windows.push(self.window(cursor));
            cursor += 1;
        }
        (windows, cursor)
    }

    /// Held-out windows, in stream order.
    pub fn holdout_windows(&self) -> Vec<Range<u64>> {
        (self.samples..self.samples + self.holdout).map(|sample| self.at(sample)).collect()
    }

    fn at(&self, sample: u64) -> Range<u64> {
        let start = sample * self.seq_len;
        start..start + self.seq_len + 1
    }

    fn skip_excluded(&self, mut cursor: u64) -> u64 {
        for range in &self.excluded {
            if range.contains(&cursor) {
                cursor = range.end;
            }
        }
        cursor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_visits_every_window_once_and_epochs_differ() {
        let loader = Loader::new(1001, 10, 3).unwrap();
        let n = loader.samples_per_epoch();
        assert_eq!(n, 100);
        let epoch = |e: u64| (0..n).map(|i| loader.window(e * n + i).start).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..n).map(|s| s * 10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn batches_resume_from_the_cursor_and_step_over_exclusions() {
        let loader = Loader::new(1001, 10, 3).unwrap().with_excluded(vec![4..9, 2..5]);
        let (whole, end) = loader.batch(0, 8);
        let (head, middle) = loader.batch(0, 3);
        let (tail, same_end) = loader.batch(middle, 5);
        assert_eq!((whole, end), ([head, tail].concat(), same_end));
        assert_eq!(end, 15);
    }

    #[test]
    fn holdout_is_never_drawn() {
        let loader = Loader::new(101, 10, 1).unwrap().with_holdout(3).unwrap();
        assert_eq!(loader.holdout_windows(), [70..81, 80..91, 90..101]);
        assert!((0..40).all(|c| loader.window(c).start < 70));
        assert!(Loader::new(10, 10, 0).is_err() && loader.with_holdout(10).is_err());
    }
}
