//! Closing figures against the floors and remarks that the pipeline adds to those of the stage. They are not part of the
//! key, so a cached result is judged by what the pipeline says now.

use std::collections::BTreeMap;

use dsv3_core::{Bound, Figure};

use crate::{plan::PlannedStage, spec::Floor};

/// The figures of a stage as the pipeline judges them. A metric with a floor that the stage did not measure misses it.
pub(crate) fn judge(stage: &PlannedStage, metrics: &BTreeMap<String, Figure>) -> BTreeMap<String, Figure> {
    let mut figures = metrics.clone();
    for (name, floor) in &stage.floors {
        let measured = metrics.get(name);
        let value = measured.map_or(f64::NAN, |figure| figure.value);
        let (bound, bar) = match floor {
            Floor::Min(bar) => (Bound::AtLeast, *bar),
            Floor::Max(bar) => (Bound::AtMost, *bar),
        };
        let mut figure = Figure::with_floor(value, bound, bar);
        figure.note = match measured {
            Some(measured) => measured.note.clone(),
            None => Some("the stage did not measure this".to_owned()),
        };
        figures.insert(name.clone(), figure);
    }
    for (name, note) in &stage.notes {
        if let Some(figure) = figures.get_mut(name) {
            figure.note = Some(note.clone());
        }
    }
    figures
}
