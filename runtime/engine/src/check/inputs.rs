//! Inputs: each port exists, is of the right kind, and what it names is there.

use dsv3_stage::{PortSpec, StageEntry};

use super::{CheckedInput, CheckedValue, Checker};
use crate::{
    diagnostics::{Diagnostic, did_you_mean, list, nearest},
    spec::{
        InputSpec, StageSpec, Word,
        files::{self, ExternalFile},
    },
};

/// Ends of names that are files rather than outputs of stages.
const FILE_ENDS: [&str; 9] = ["parquet", "jsonl", "json", "txt", "csv", "zst", "gz", "safetensors", "bin"];

/// The connected ports of a stage; `None` when its type is unknown.
pub(super) fn check(checker: &mut Checker<'_>, stage: &StageSpec) -> Option<Vec<CheckedInput>> {
    let entry = checker.entry(stage);
    let specs = entry.map(|entry| entry.inputs());
    // What misspelt ports were meant to be is not reported a second time as missing.
    let (mut inputs, mut meant) = (Vec::new(), Vec::new());
    for input in &stage.inputs {
        let spec = specs.as_ref().and_then(|specs| specs.iter().find(|spec| spec.name == input.port.text)).copied();
        if let (Some(entry), Some(specs), None) = (entry, &specs, spec) {
            let known: Vec<&str> = specs.iter().map(|spec| spec.name).filter(|name| !given(stage, name)).collect();
            meant.extend(nearest(&input.port.text, known.iter().copied()));
            let message = format!("stage type `{}` has no input `{}`", entry.name, input.port.text);
            checker
                .problems
                .push(Diagnostic::new(input.port.span, message).maybe_help(did_you_mean(&input.port.text, known)));
        }
        let values = values(checker, stage, input, spec);
        if let Some(spec) = spec {
            inputs.push(CheckedInput { spec, values });
        }
    }
    let missing = |spec: &&PortSpec| spec.required && !given(stage, spec.name) && !meant.contains(&spec.name);
    for spec in specs.iter().flatten().filter(missing) {
        let message = format!("stage `{}` lacks its input `{}`", stage.name.text, spec.name);
        let help = format!("{} (kind {}: {})", spec.doc, spec.kind, spec.kind_about);
        checker.problems.push(Diagnostic::new(stage.name.span, message).help(help));
    }
    specs.map(|_| inputs)
}

fn given(stage: &StageSpec, port: &str) -> bool {
    stage.inputs.iter().any(|input| input.port.text == port)
}

/// Everything a port names: outputs of stages one by one; files of one port together, or one by one when it takes many.
fn values(
    checker: &mut Checker<'_>,
    stage: &StageSpec,
    input: &InputSpec,
    spec: Option<PortSpec>,
) -> Vec<CheckedValue> {
    let (mut values, mut files, mut uris) = (Vec::new(), Vec::new(), Vec::new());
    let many = spec.is_some_and(|spec| spec.many);
    for word in &input.values {
        match resolve(checker, word) {
            Resolved::Nothing => {}
            Resolved::Stage(producer, port) => {
                if let Some(spec) = spec {
                    edge(checker, stage, word, spec, &producer, &port);
                }
                values.push(CheckedValue::Stage { stage: producer, port });
            }
            Resolved::Files(found) if many => values.push(CheckedValue::Files { files: found, span: word.span }),
            Resolved::Files(found) => files.push(found),
            Resolved::Remote(uri) if many => values.push(CheckedValue::Remote { uris: vec![uri], span: word.span }),
            Resolved::Remote(uri) => uris.push(uri),
        }
    }
    let span = input.values.first().map_or(input.port.span, |word| word.span);
    if !files.is_empty() {
        values.push(CheckedValue::Files { files: files::join(files), span });
    }
    if !uris.is_empty() {
        values.push(CheckedValue::Remote { uris, span });
    }
    if values.len() > 1 && !many && spec.is_some() {
        let message = format!("input `{}` takes one artifact; {} are given", input.port.text, values.len());
        checker.problem(input.port.span, message);
    }
    values
}

/// What a word means.
enum Resolved {
    Stage(String, String),
    Files(Vec<ExternalFile>),
    Remote(String),
    /// A mistake, which was reported.
    Nothing,
}

fn resolve(checker: &mut Checker<'_>, word: &Word) -> Resolved {
    let text = word.text.as_str();
    if files::is_remote(text) {
        return Resolved::Remote(text.to_owned());
    }
    if text.contains("://") && !text.starts_with("file://") {
        let problem = Diagnostic::new(word.span, format!("`{text}` is of no scheme that can be read"));
        checker.problems.push(problem.help("schemes: file://, s3://, gs:// and az://"));
        return Resolved::Nothing;
    }
    let path = files::locate(text, &checker.reading.base(word.origin), &checker.reading.current_dir);
    let plain = !text.contains(['/', '\\']) && !files::is_pattern(text);
    if plain && let Some((stage, port)) = text.split_once('.') {
        // `corpus.parquet` beside a stage called `corpus` is the file, unless that is also an output.
        let producer = checker.stage(stage).map(|stage| checker.entry(stage));
        let is_output = |entry: StageEntry| entry.outputs().iter().any(|output| output.name == port);
        if producer.is_some_and(|entry| !path.is_file() || entry.is_none_or(is_output)) {
            return Resolved::Stage(stage.to_owned(), port.to_owned());
        }
        let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if !path.exists() && is_name(stage) && is_name(port) && !FILE_ENDS.contains(&port) {
            let known = checker.written.stages.iter().map(|stage| stage.name.text.as_str());
            let problem = Diagnostic::new(word.span, format!("`{text}` names no stage of this pipeline and no file"));
            checker.problems.push(problem.maybe_help(did_you_mean(stage, known)));
            return Resolved::Nothing;
        }
    }
    if plain
        && !path.exists()
        && let Some(stage) = checker.stage(text)
    {
        let outputs = checker.entry(stage).map(|entry| entry.outputs()).unwrap_or_default();
        let outputs: Vec<String> = outputs.iter().map(|output| format!("{text}.{}", output.name)).collect();
        let problem = Diagnostic::new(word.span, format!("`{text}` is a stage; an input takes one of its outputs"));
        checker.problems.push(problem.help(format!("write {}", list(outputs.iter().map(String::as_str)))));
        return Resolved::Nothing;
    }
    match files::expand(&path) {
        Ok(files) => Resolved::Files(files),
        Err(message) => {
            checker.problem(word.span, message);
            Resolved::Nothing
        }
    }
}

/// Checks that the output exists and is of the kind the input takes.
fn edge(checker: &mut Checker<'_>, stage: &StageSpec, word: &Word, spec: PortSpec, producer: &str, port: &str) {
    let Some(from) = checker.stage(producer) else { return };
    let from_name = from.name.clone();
    let Some(outputs) = checker.entry(from).map(|entry: StageEntry| entry.outputs()) else { return };
    match outputs.iter().find(|output| output.name == port) {
        None => {
            let known = outputs.iter().map(|output| output.name);
            let message = format!("{} has no output `{port}`", checker.cite(&from_name));
            checker.problems.push(Diagnostic::new(word.span, message).maybe_help(did_you_mean(port, known)));
        }
        Some(output) if output.kind != spec.kind => {
            let message = format!(
                "input `{}` of {} takes {}, but output `{port}` of {} is {}",
                spec.name,
                checker.cite(&stage.name),
                spec.kind,
                checker.cite(&from_name),
                output.kind
            );
            let fitting: Vec<String> = outputs
                .iter()
                .filter(|output| output.kind == spec.kind)
                .map(|output| format!("{producer}.{}", output.name))
                .collect();
            let help = match fitting.is_empty() {
                true => format!("{}: {}", spec.kind, spec.kind_about),
                false => format!("write {}", list(fitting.iter().map(String::as_str))),
            };
            let problem = Diagnostic::new(word.span, message).help(help).note(from_name.span, "the other stage");
            checker.problems.push(problem);
        }
        Some(_) => {}
    }
}
