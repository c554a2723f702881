//! The detail of a run's status: what `runs`, `resume` and `report` find again.
//!
//! ```text
//! { pipeline, command, machines: [..], stages: { NAME: { key, outcome } } }
//! ```
//!
//! A run may be walked several times, by `resume` and by `exec` on other machines: each status keeps what the one before
//! it said of other stages, of earlier machines and of the command the run began with.

use dsv3_core::Digest;
use serde_json::{Map, Value, json};

use super::{StageReport, state_name};
use crate::machine::Machine;

/// The detail that follows `before`.
pub(super) fn detail(
    before: Option<Value>,
    pipeline: &str,
    command: Option<&str>,
    machine: &Machine,
    reports: &[StageReport],
    begun: Option<(&str, Digest)>,
) -> Value {
    let before = before.unwrap_or_default();
    let mut stages: Map<String, Value> = before["stages"].as_object().cloned().unwrap_or_default();
    for report in reports {
        let state = json!({ "key": report.key, "outcome": state_name(&report.outcome) });
        stages.insert(report.stage.clone(), state);
    }
    if let Some((stage, key)) = begun {
        stages.insert(stage.to_owned(), json!({ "key": key, "outcome": "running" }));
    }
    let mut machines: Vec<Value> = before["machines"].as_array().cloned().unwrap_or_default();
    let machine = serde_json::to_value(machine).unwrap_or_default();
    if !machines.contains(&machine) {
        machines.push(machine);
    }
    let command = before["command"].as_str().or(command);
    json!({ "pipeline": pipeline, "command": command, "machines": machines, "stages": stages })
}

#[cfg(test)]
mod tests {
    use dsv3_core::Outcome;

    use super::*;

    fn report(stage: &str, outcome: Outcome) -> StageReport {
        StageReport { stage: stage.to_owned(), key: format!("key of {stage}"), outcome, result: None }
    }

    #[test]
    fn a_later_walk_keeps_what_an_earlier_one_said() {
        let (one, two) = (Machine::this(Some(1)), Machine::this(Some(2)));
        let first = detail(None, "p", Some("run p.yaml"), &one, &[report("a", Outcome::Done)], None);
        assert_eq!(first, detail(Some(first.clone()), "p", None, &one, &[], None));
        let begun = detail(Some(first), "p", Some("exec x b"), &two, &[], Some(("b", Digest::of(b"b"))));
        assert_eq!(begun["stages"]["b"], json!({ "key": Digest::of(b"b"), "outcome": "running" }));
        let second = detail(Some(begun), "p", Some("exec x b"), &two, &[report("b", Outcome::Cancelled)], None);
        assert_eq!(second["stages"]["a"]["outcome"], "done");
        assert_eq!(second["stages"]["b"]["outcome"], "cancelled");
        assert_eq!(second["command"], "run p.yaml");
        assert_eq!(second["machines"].as_array().map(Vec::len), Some(2));
    }
}
