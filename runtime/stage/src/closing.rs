//! What a stage says at its end besides its outputs: figures with floors, and the lineage.

use std::collections::BTreeMap;

use dsv3_core::{Bound, Figure};
use serde_json::{Map, Value};

/// Closing figures and lineage of a stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Closing {
    /// By name, without the stage's name.
    pub figures: BTreeMap<String, Figure>,
    /// What happened on the way, by subject.
    pub lineage: Map<String, Value>,
}

impl Closing {
    pub(crate) fn set(&mut self, name: &str, value: f64, floor: Option<(Bound, f64)>) {
        let figure = match floor {
            None => Figure::new(value),
            Some((bound, floor)) => Figure::with_floor(value, bound, floor),
        };
        self.figures.insert(name.to_owned(), figure);
    }

    pub(crate) fn note(&mut self, name: &str, note: &str) {
        if let Some(figure) = self.figures.get_mut(name) {
            figure.note = Some(note.to_owned());
        }
    }
}
