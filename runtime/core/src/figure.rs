//! Closing figures: what a stage measured at its end, with the floor it is expected to meet.

use serde::{Deserialize, Deserializer, Serialize};

/// Which side of its floor a figure should lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bound {
    /// The figure should be at least the floor.
    #[serde(rename = ">=")]
    AtLeast,
    /// The figure should be at most the floor.
    #[serde(rename = "<=")]
    AtMost,
}

/// One closing figure. A missed floor is shown, it fails nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured; JSON null when it is not finite.
    #[serde(deserialize_with = "nan_if_null")]
    pub value: f64,
    /// What it should reach.
    pub floor: Option<f64>,
    /// Whether it did; none without a floor.
    pub ok: Option<bool>,
    /// Side of the floor; none without a floor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<Bound>,
    /// A remark for the closing table, such as that the figure shows no ability.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Figure {
    /// A figure without a floor.
    pub fn new(value: f64) -> Self {
        Self { value, floor: None, ok: None, bound: None, note: None }
    }

    /// A figure with a floor.
    pub fn with_floor(value: f64, bound: Bound, floor: f64) -> Self {
        let ok = match bound {
            Bound::AtLeast => value >= floor,
            Bound::AtMost => value <= floor,
        };
        Self { value, floor: Some(floor), ok: Some(ok), bound: Some(bound), note: None }
    }
}

fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_that_is_not_a_number_misses_its_floor_and_survives_json() {
        let figure = Figure::with_floor(f64::NAN, Bound::AtMost, 1.0);
        assert_eq!(figure.ok, Some(false));
        let text = serde_json::to_string(&figure).unwrap();
        assert_eq!(text, r#"{"value":null,"floor":1.0,"ok":false,"bound":"<="}"#);
        assert!(serde_json::from_str::<Figure>(&text).unwrap().value.is_nan());
    }
}
