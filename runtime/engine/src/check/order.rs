//! An order in which every stage comes after its inputs, or the cycles that forbid one.

use std::collections::{BTreeMap, BTreeSet};

use super::{CheckedInput, CheckedValue, Checker};
use crate::diagnostics::Diagnostic;

/// Indices of the stages of the file, each after its inputs, otherwise in the order of the file. Stages on a cycle are
/// left out after the cycle was reported.
pub(super) fn check(checker: &mut Checker<'_>, inputs: &[Option<Vec<CheckedInput>>]) -> Vec<usize> {
    let stages = &checker.written.stages;
    let index: BTreeMap<&str, usize> =
        stages.iter().enumerate().rev().map(|(i, stage)| (stage.name.text.as_str(), i)).collect();
    let edges: Vec<BTreeSet<usize>> = inputs
        .iter()
        .map(|inputs| {
            let values = inputs.iter().flatten().flat_map(|input| &input.values);
            values
                .filter_map(|value| match value {
                    CheckedValue::Stage { stage, .. } => index.get(stage.as_str()).copied(),
                    _ => None,
                })
                .collect()
        })
        .collect();
    let mut order = Vec::new();
    let mut placed = BTreeSet::new();
    while let Some(next) = (0..stages.len()).find(|i| !placed.contains(i) && edges[*i].is_subset(&placed)) {
        placed.insert(next);
        order.push(next);
    }
    let mut reported = BTreeSet::new();
    for start in (0..stages.len()).filter(|i| !placed.contains(i)) {
        if let Some(cycle) = cycle(start, &edges, &placed)
            && reported.insert(cycle.iter().copied().collect::<BTreeSet<_>>())
        {
            let names: Vec<&str> = cycle.iter().chain(&cycle[..1]).map(|i| stages[*i].name.text.as_str()).collect();
            let span = stages[cycle[0]].name.span;
            let message = format!("these stages wait for each other: {}", names.join(" <- "));
            checker.problems.push(Diagnostic::new(span, message));
        }
    }
    order
}

/// A cycle through `start`, if it lies on one.
fn cycle(start: usize, edges: &[BTreeSet<usize>], placed: &BTreeSet<usize>) -> Option<Vec<usize>> {
    let mut came_from: BTreeMap<usize, usize> = BTreeMap::new();
    let mut frontier = vec![start];
    while let Some(at) = frontier.pop() {
        for next in edges[at].iter().copied().filter(|next| !placed.contains(next)) {
            if next == start {
                let mut path = vec![at];
                while let Some(before) = path.last().filter(|last| **last != start).and_then(|last| came_from.get(last))
                {
                    path.push(*before);
                }
                path.reverse();
                return Some(path);
            }
            if let std::collections::btree_map::Entry::Vacant(slot) = came_from.entry(next) {
                slot.insert(at);
                frontier.push(next);
            }
        }
    }
    None
}
