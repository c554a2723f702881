//! Mean and spread of one figure over several runs.
//!
//! ```text
//! mean = Σ x / n      deviation = sqrt(Σ (x - mean)² / (n - 1))
//! ```

use serde::Serialize;

/// Mean and sample standard deviation of the runs that measured a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Runs that measured it; values that are not finite do not count.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Sample standard deviation; none for a single run.
    pub deviation: Option<f64>,
}

impl Spread {
    /// Of the finite ones among `values`; none when there is none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some(Self { n, mean, deviation: (n > 1).then(|| (squares / (n - 1) as f64).sqrt()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        let spread = Spread::of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert_eq!((spread.n, spread.mean), (8, 5.0));
        assert!((spread.deviation.unwrap() - (32.0f64 / 7.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn what_was_not_measured_does_not_count() {
        assert_eq!(Spread::of([f64::NAN, 3.0]), Some(Spread { n: 1, mean: 3.0, deviation: None }));
        assert_eq!(Spread::of([f64::NAN, f64::INFINITY]), None);
        assert_eq!(Spread::of([]), None);
    }
}
