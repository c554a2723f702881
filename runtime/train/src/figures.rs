//! First, last and late values of every metric of a run, kept in its checkpoints so that a resumed run closes with the
//! same figures as an undisturbed one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Share of a run after which a value counts as late.
const LATE: f64 = 0.75;

/// One metric over a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Its first value.
    pub first: f64,
    /// Its last value.
    pub last: f64,
    late_sum: f64,
    late_count: u64,
}

impl Figure {
    /// Mean over the last quarter of the run; the last value when there is none there.
    pub fn late_mean(&self) -> f64 {
        if self.late_count == 0 { self.last } else { self.late_sum / self.late_count as f64 }
    }
}

/// All metrics of a run, by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures(BTreeMap<String, Figure>);

impl Figures {
    /// Notes a value seen when the run had come to share `progress`. A value that is not finite is left out.
    pub fn note(&mut self, name: &str, value: f64, progress: f64) {
        if !value.is_finite() {
            return;
        }
        let new = || Figure { first: value, last: value, late_sum: 0.0, late_count: 0 };
        let figure = self.0.entry(name.to_owned()).or_insert_with(new);
        figure.last = value;
        if progress >= LATE {
            figure.late_sum += value;
            figure.late_count += 1;
        }
    }

    /// The figure of a metric.
    pub fn get(&self, name: &str) -> Option<&Figure> {
        self.0.get(name)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Figure)> {
        self.0.iter().map(|(name, figure)| (name.as_str(), figure))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_last_and_late() {
        let mut figures = Figures::default();
        for (i, value) in [4.0, 3.0, f64::NAN, 2.0, 1.0].into_iter().enumerate() {
            figures.note("loss", value, i as f64 / 4.0);
        }
        let loss = figures.get("loss").unwrap();
        assert_eq!((loss.first, loss.last, loss.late_mean()), (4.0, 1.0, 1.5));
    }
}
