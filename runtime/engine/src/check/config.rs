//! Configs against their types, then each stage's own checks with what is known of its inputs.

use std::collections::{BTreeMap, BTreeSet};

use dsv3_stage::{InputFacts, OutputFacts, PortFacts, Problem, Problems, StageEntry};
use serde_json::Value;

use super::{CheckedInput, CheckedStage, CheckedValue, Checker};
use crate::{
    diagnostics::{Diagnostic, Span},
    schema,
    spec::StageSpec,
    yaml::Node,
};

/// The stages in order; those with a problem are left out, and what they would say of their outputs is unknown.
pub(super) fn check(
    checker: &mut Checker<'_>,
    order: &[usize],
    mut inputs: Vec<Option<Vec<CheckedInput>>>,
    mut hooks: Vec<BTreeMap<String, String>>,
) -> Vec<CheckedStage> {
    let written = checker.written;
    let mut known: BTreeMap<&str, OutputFacts> = BTreeMap::new();
    let mut stages = Vec::new();
    let cyclic = (0..written.stages.len()).filter(|i| !order.contains(i));
    for i in order.iter().copied().chain(cyclic) {
        let stage = &written.stages[i];
        let Some(entry) = checker.entry(stage) else { continue };
        let Some(config) = resolve(checker, stage, &entry) else { continue };
        let connected = inputs[i].take().unwrap_or_default();
        if !order.contains(&i) {
            continue;
        }
        let mut facts = input_facts(&connected, &known);
        stage.hooks.iter().for_each(|(port, _)| facts.push_hook(&port.text));
        let mut problems = Problems::default();
        if complete(&entry, &connected) {
            entry.check(&config, &facts, &mut problems);
        }
        let mut lines = Vec::new();
        if problems.is_empty() {
            let outputs = entry.facts(&config, &facts);
            lines = entry.describe(&config, &facts, checker.at_tokens);
            known.insert(&stage.name.text, outputs);
        }
        for problem in problems {
            place(checker, stage, problem);
        }
        let hooks = std::mem::take(&mut hooks[i]);
        let name = stage.name.text.clone();
        let (floors, notes, retention) = (stage.floors.clone(), stage.notes.clone(), stage.retention.clone());
        stages.push(CheckedStage {
            name,
            entry,
            config,
            inputs: connected,
            hooks,
            floors,
            notes,
            retention,
            facts: lines,
        });
    }
    stages
}

/// The config with its defaults, when it fits its type.
fn resolve(checker: &mut Checker<'_>, stage: &StageSpec, entry: &StageEntry) -> Option<Value> {
    let root = entry.config_schema();
    let mut node: Node = stage.config.clone();
    let found = schema::check(&root, &root, &mut node, stage.config_span, "config");
    if !found.is_empty() {
        checker.problems.extend(found);
        return None;
    }
    match entry.resolve_config(&node.to_json()) {
        Ok(config) => Some(config),
        Err(error) => {
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            checker.problem(stage.config_span, format!("`config` does not fit stage type `{}`: {cause}", entry.name));
            None
        }
    }
}

/// Whether every required port has something, so that a stage's own checks need not ask.
fn complete(entry: &StageEntry, connected: &[CheckedInput]) -> bool {
    let filled: BTreeSet<&str> =
        connected.iter().filter(|input| !input.values.is_empty()).map(|input| input.spec.name).collect();
    entry.inputs().iter().all(|spec| !spec.required || filled.contains(spec.name))
}

fn input_facts(connected: &[CheckedInput], known: &BTreeMap<&str, OutputFacts>) -> InputFacts {
    let mut facts = InputFacts::default();
    for input in connected {
        for value in &input.values {
            let one = match value {
                CheckedValue::Stage { stage, port } => {
                    let said = known.get(stage.as_str()).and_then(|outputs| outputs.get(port));
                    PortFacts::Upstream(said.cloned().unwrap_or_default())
                }
                CheckedValue::Files { files, .. } => {
                    PortFacts::External(files.iter().map(|file| file.path.display().to_string()).collect())
                }
                CheckedValue::Remote { uris, .. } => PortFacts::External(uris.clone()),
            };
            facts.push(input.spec.name, one);
        }
    }
    facts
}

/// A stage's problem at its place: the deepest node of its path that was written.
fn place(checker: &mut Checker<'_>, stage: &StageSpec, problem: Problem) {
    let (area, rest) = problem.path.split_once('.').unwrap_or((problem.path.as_str(), ""));
    let span: Span = match area {
        "config" => {
            let (node, key, found) = stage.config.follow(rest);
            match (found, key) {
                (true, Some(key)) if node.entries().is_some() => key,
                (true, _) => node.span,
                (false, Some(key)) => key,
                (false, None) => stage.config_span,
            }
        }
        "inputs" => stage
            .inputs
            .iter()
            .find(|input| input.port.text == rest)
            .map_or(stage.name.span, |input| input.values.first().unwrap_or(&input.port).span),
        "hooks" => {
            let hook = stage.hooks.iter().find(|(port, _)| port.text == rest);
            hook.map_or(stage.name.span, |(_, name)| name.span)
        }
        _ => stage.name.span,
    };
    let message = match problem.path.is_empty() || problem.message.contains(&problem.path) {
        true => format!("stage `{}`: {}", stage.name.text, problem.message),
        false => format!("`{}` of stage `{}`: {}", problem.path, stage.name.text, problem.message),
    };
    checker.problems.push(Diagnostic::new(span, message).maybe_help(problem.help));
}
