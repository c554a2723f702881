//! `--set PATH=VALUE`: replaces one field before anything is checked. A bare name that is a declared param sets the
//! param; every other path starts at the root. Problems in a value point into the argument itself.

use crate::{
    diagnostics::{Diagnostic, Source, Span, did_you_mean},
    yaml::{Node, Value, read_argument},
};

/// Root fields that a bare name may set.
const ROOT_FIELDS: [&str; 5] = ["name", "store", "seed", "threads", "device"];

pub(super) fn apply(root: &mut Node, index: u32, source: &Source, problems: &mut Vec<Diagnostic>) {
    let whole = Span { source: index, start: 0, end: source.text.len() as u32 };
    let Some((path, _)) = source.text.split_once('=') else {
        problems.push(Diagnostic::new(whole, "`--set` takes PATH=VALUE").help("for example `--set seed=11`"));
        return;
    };
    let path_span = Span { end: path.len() as u32, ..whole };
    let (mut value, found) = read_argument(index, source, path.len() + 1);
    problems.extend(found);
    value.origin = index;
    let path = path.trim();
    let declared: Vec<String> = root
        .get("params")
        .and_then(Node::entries)
        .map(|entries| entries.iter().map(|entry| entry.key.clone()).collect())
        .unwrap_or_default();
    let parts: Vec<&str> = if declared.iter().any(|name| name == path) {
        vec!["params", path]
    } else if !path.contains(['.', '[']) && !ROOT_FIELDS.contains(&path) {
        let known = declared.iter().map(String::as_str).chain(ROOT_FIELDS);
        let problem = Diagnostic::new(path_span, format!("`{path}` is neither a param nor a field of the pipeline"));
        problems.push(problem.maybe_help(did_you_mean(path, known)));
        return;
    } else {
        path.split(['.', '[']).map(|part| part.trim_end_matches(']')).collect()
    };
    if parts.iter().any(|part| part.is_empty()) {
        problems.push(Diagnostic::new(path_span, format!("`{path}` is not a dotted path")));
        return;
    }
    match place(root, &parts, path_span) {
        Ok(slot) => *slot = value,
        Err(problem) => problems.push(problem),
    }
}

fn place<'a>(root: &'a mut Node, parts: &[&str], span: Span) -> Result<&'a mut Node, Diagnostic> {
    let mut node = root;
    for (i, part) in parts.iter().enumerate() {
        node = step(node, &parts[..i].join("."), part, span)?;
    }
    Ok(node)
}

/// One step downwards, from the node at the path `above`.
fn step<'a>(node: &'a mut Node, above: &str, part: &str, span: Span) -> Result<&'a mut Node, Diagnostic> {
    // A stage cannot be made this way: a misspelt name must not become a new stage without a type.
    if above == "stages" && node.get(part).is_none() {
        let known = node.entries().into_iter().flatten().map(|entry| entry.key.as_str());
        let problem = Diagnostic::new(span, format!("no stage is called `{part}`"));
        return Err(problem.maybe_help(did_you_mean(part, known)));
    }
    if matches!(node.value, Value::Map(_) | Value::Null) {
        return node.slot(part, span).ok_or_else(|| Diagnostic::new(span, format!("`{above}` is not a map")));
    }
    let description = node.describe();
    match &mut node.value {
        Value::List(items) => {
            let count = items.len();
            let item = part.parse::<usize>().ok().and_then(|index| items.get_mut(index));
            item.ok_or_else(|| {
                Diagnostic::new(span, format!("`{above}` is a list of {count}; `{part}` is not a place in it"))
            })
        }
        _ => Err(Diagnostic::new(span, format!("`{above}` is {description}, not a map"))),
    }
}
