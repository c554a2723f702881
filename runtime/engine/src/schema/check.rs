//! A value against the JSON Schema of its type: every problem at once, each at its place.
//!
//! Covers what `schemars` writes for configuration structs: `type`, `properties`, `required`, `additionalProperties`,
//! `enum`, `const`, `oneOf`/`anyOf` (told apart by the constant fields of their branches), `allOf`, `$ref`, `items`,
//! `prefixItems`, bounds of numbers, lengths. Serde has the last word afterwards; this walk exists because serde stops
//! at the first problem and knows no places.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use crate::{
    diagnostics::{Diagnostic, Span, did_you_mean, list, nearest},
    yaml::{Node, Value},
};

/// References followed at most on the way down; recursive types are fine, a cycle of references is not.
const REFS_MAX: usize = 64;

/// Checks `node` against `schema`, whose `$defs` are those of `root`. Integral floats become integers where an integer is
/// wanted (`14.8e12`), and values of the environment take the wanted type.
pub(crate) fn check(root: &Json, schema: &Json, node: &mut Node, at: Span, path: &str) -> Vec<Diagnostic> {
    let mut checker = Checker { root, problems: Vec::new() };
    checker.value(schema, node, at, path);
    checker.problems
}

struct Checker<'a> {
    root: &'a Json,
    problems: Vec<Diagnostic>,
}

/// The JSON Schema types a schema admits; empty when it does not say.
fn types(schema: &Map<String, Json>) -> Vec<&str> {
    match schema.get("type") {
        Some(Json::String(one)) => vec![one],
        Some(Json::Array(many)) => many.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    }
}

fn type_name(name: &str) -> &str {
    match name {
        "string" => "a text",
        "integer" => "an integer",
        "number" => "a number",
        "boolean" => "true or false",
        "array" => "a list",
        "object" => "a map",
        "null" => "nothing",
        other => other,
    }
}

fn alternatives(names: &[&str]) -> String {
    let names: Vec<&str> = names.iter().filter(|name| **name != "null").map(|name| type_name(name)).collect();
    names.join(" or ")
}

/// Whether `node` is of the JSON Schema type `name`; converts it when it can be read as such.
fn is_type(node: &mut Node, name: &str) -> bool {
    if name != "string" {
        node.take_environment_type();
    }
    if name == "integer" {
        node.take_integral();
    }
    match &node.value {
        Value::Unknown => true,
        Value::Null => name == "null",
        Value::Bool(_) => name == "boolean",
        Value::Int(_) => matches!(name, "integer" | "number"),
        Value::Float(_) => name == "number",
        Value::Text(_) => name == "string",
        Value::List(_) => name == "array",
        Value::Map(_) => name == "object",
    }
}

impl<'a> Checker<'a> {
    /// Follows `$ref`s; `None` when the schema admits everything.
    fn resolve(&self, mut schema: &'a Json) -> Option<&'a Map<String, Json>> {
        for _ in 0..REFS_MAX {
            let object = schema.as_object()?;
            let Some(reference) = object.get("$ref").and_then(Json::as_str) else { return Some(object) };
            schema = self.root.pointer(reference.strip_prefix('#')?)?;
        }
        None
    }

    fn report(&mut self, problem: Diagnostic) {
        self.problems.push(problem);
    }

    fn value(&mut self, schema: &'a Json, node: &mut Node, at: Span, path: &str) {
        if node.value == Value::Unknown {
            return;
        }
        if schema == &Json::Bool(false) {
            return self.report(Diagnostic::new(at, format!("`{path}` may not be given")));
        }
        let Some(schema) = self.resolve(schema) else { return };
        for part in schema.get("allOf").and_then(Json::as_array).into_iter().flatten() {
            self.value(part, node, at, path);
        }
        for word in ["oneOf", "anyOf"] {
            if let Some(branches) = schema.get(word).and_then(Json::as_array) {
                self.branches(branches, node, at, path);
            }
        }
        let wanted = types(schema);
        if !wanted.is_empty() && !wanted.iter().any(|name| is_type(node, name)) {
            return self.mismatch(&alternatives(&wanted), node, at, path);
        }
        self.constants(schema, node, at, path);
        self.bounds(schema, node, path);
        match &mut node.value {
            Value::Map(_) => self.object(schema, node, at, path),
            Value::List(items) => {
                let prefix = schema.get("prefixItems").and_then(Json::as_array);
                for (i, item) in items.iter_mut().enumerate() {
                    let one = prefix.and_then(|prefix| prefix.get(i)).or_else(|| schema.get("items"));
                    if let Some(one) = one {
                        let span = item.span;
                        self.value(one, item, span, &format!("{path}[{i}]"));
                    }
                }
            }
            _ => {}
        }
    }

    fn mismatch(&mut self, wanted: &str, node: &Node, at: Span, path: &str) {
        let span = if node.value == Value::Null { at } else { node.span };
        let help = match node.text() {
            Some("yes" | "on" | "Yes" | "On") if wanted.contains("true") => Some("write `true`".to_owned()),
            Some("no" | "off" | "No" | "Off") if wanted.contains("true") => Some("write `false`".to_owned()),
            Some(text) if wanted.contains("integer") && text.contains('_') => {
                Some("digits are written without `_`".to_owned())
            }
            _ => None,
        };
        let message = format!("`{path}` takes {wanted}; this is {}", node.describe());
        self.report(Diagnostic::new(span, message).maybe_help(help));
    }

    fn constants(&mut self, schema: &Map<String, Json>, node: &Node, at: Span, path: &str) {
        let allowed: Vec<&Json> = match (schema.get("enum"), schema.get("const")) {
            (Some(Json::Array(values)), _) => values.iter().collect(),
            (_, Some(value)) => vec![value],
            _ => return,
        };
        let json = node.to_json();
        if !allowed.contains(&&json) {
            self.not_allowed(&allowed, node, at, path);
        }
    }

    fn not_allowed(&mut self, allowed: &[&Json], node: &Node, at: Span, path: &str) {
        let words: Vec<String> = allowed
            .iter()
            .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
            .filter(|word| word != "null")
            .collect();
        let span = if node.value == Value::Null { at } else { node.span };
        let problem = Diagnostic::new(span, format!("`{path}` cannot be {}", node.describe()));
        let near = node.text().and_then(|text| did_you_mean(text, words.iter().map(String::as_str)));
        let help = near.unwrap_or_else(|| format!("allowed: {}", list(words.iter().map(String::as_str))));
        self.report(problem.help(help));
    }

    fn bounds(&mut self, schema: &Map<String, Json>, node: &Node, path: &str) {
        let number = match &node.value {
            Value::Int(value) => Some(*value as f64),
            Value::Float(value) => Some(*value),
            _ => None,
        };
        let limit = |word: &str| schema.get(word).and_then(Json::as_f64);
        if let Some(number) = number {
            let format_range = schema.get("format").and_then(Json::as_str).and_then(range_of_format);
            let (low, high) = format_range.unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
            let broken = [
                (limit("minimum").unwrap_or(f64::NEG_INFINITY).max(low), "at least", number),
                (limit("maximum").unwrap_or(f64::INFINITY).min(high), "at most", -number),
            ];
            for (bound, word, value) in broken {
                let signed = if word == "at most" { -bound } else { bound };
                if value < signed {
                    let message = format!("`{path}` is {word} {bound}; this is {}", node.describe());
                    self.report(Diagnostic::new(node.span, message));
                }
            }
            if limit("exclusiveMinimum").is_some_and(|bound| number <= bound) {
                let bound = limit("exclusiveMinimum").unwrap_or_default();
                self.report(Diagnostic::new(
                    node.span,
                    format!("`{path}` is above {bound}; this is {}", node.describe()),
                ));
            }
            if limit("exclusiveMaximum").is_some_and(|bound| number >= bound) {
                let bound = limit("exclusiveMaximum").unwrap_or_default();
                self.report(Diagnostic::new(
                    node.span,
                    format!("`{path}` is below {bound}; this is {}", node.describe()),
                ));
            }
        }
        let length = match &node.value {
            Value::Text(text) => Some((text.chars().count(), "minLength", "maxLength", "characters")),
            Value::List(items) => Some((items.len(), "minItems", "maxItems", "items")),
            _ => None,
        };
        if let Some((length, low, high, unit)) = length {
            if limit(low).is_some_and(|bound| (length as f64) < bound) {
                let bound = limit(low).unwrap_or_default();
                self.report(Diagnostic::new(
                    node.span,
                    format!("`{path}` has {length} {unit}; at least {bound} are needed"),
                ));
            }
            if limit(high).is_some_and(|bound| (length as f64) > bound) {
                let bound = limit(high).unwrap_or_default();
                self.report(Diagnostic::new(
                    node.span,
                    format!("`{path}` has {length} {unit}; at most {bound} are taken"),
                ));
            }
        }
    }

    fn object(&mut self, schema: &'a Map<String, Json>, node: &mut Node, at: Span, path: &str) {
        let none = Map::new();
        let properties = schema.get("properties").and_then(Json::as_object);
        let others = schema.get("additionalProperties");
        let Value::Map(entries) = &mut node.value else { return };
        let given: Vec<String> = entries.iter().map(|entry| entry.key.clone()).collect();
        // What misspelt keys were meant to be is not reported a second time as missing.
        let mut meant: Vec<String> = Vec::new();
        for entry in entries {
            let below = format!("{path}.{}", entry.key);
            if let Some(property) = properties.and_then(|properties| properties.get(&entry.key)) {
                self.value(property, &mut entry.value, entry.key_span, &below);
            } else if others == Some(&Json::Bool(false)) {
                let known = properties.unwrap_or(&none).keys().map(String::as_str);
                let (taken, free): (Vec<&str>, Vec<&str>) = known.partition(|name| given.iter().any(|g| g == name));
                meant.extend(nearest(&entry.key, free.iter().copied()).map(str::to_owned));
                let problem = Diagnostic::new(entry.key_span, format!("unknown key `{}` in `{path}`", entry.key));
                // `--set` with a misspelt key leaves the well-spelt one of the file beside it.
                let twin = match nearest(&entry.key, free.iter().copied()) {
                    None => nearest(&entry.key, taken),
                    Some(_) => None,
                };
                let help = twin.map(|twin| format!("did you mean `{twin}`, which is given too?"));
                self.report(problem.maybe_help(help.or_else(|| did_you_mean(&entry.key, free))));
            } else if let Some(other) = others {
                self.value(other, &mut entry.value, entry.key_span, &below);
            }
        }
        for name in schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str) {
            if !given.iter().any(|given| given == name) && !meant.iter().any(|meant| meant == name) {
                let about = properties
                    .and_then(|properties| properties.get(name)?.get("description")?.as_str())
                    .map(|text| format!("{name}: {}", text.lines().next().unwrap_or_default()));
                self.report(Diagnostic::new(at, format!("`{path}` lacks `{name}`")).maybe_help(about));
            }
        }
    }

    /// `oneOf` and `anyOf`: an option, an enum of words, or structs told apart by a constant field.
    fn branches(&mut self, branches: &'a [Json], node: &mut Node, at: Span, path: &str) {
        let resolved: Vec<&Map<String, Json>> = branches.iter().filter_map(|branch| self.resolve(branch)).collect();
        if resolved.len() < branches.len() {
            return;
        }
        if resolved.iter().all(|branch| branch.contains_key("const") || branch.contains_key("enum")) {
            let allowed = resolved.iter().flat_map(|branch| {
                let many = branch.get("enum").and_then(Json::as_array).into_iter().flatten();
                branch.get("const").into_iter().chain(many)
            });
            let allowed: Vec<&Json> = allowed.collect();
            if !allowed.contains(&&node.to_json()) {
                self.not_allowed(&allowed, node, at, path);
            }
            return;
        }
        if node.value == Value::Null && resolved.iter().any(|branch| types(branch).contains(&"null")) {
            return;
        }
        if let Some(chosen) = self.by_tag(branches, &resolved, node, at, path) {
            if let Some(branch) = chosen {
                self.value(branch, node, at, path);
            }
            return;
        }
        if let Some(tags) = external_tags(&resolved)
            && node.entries().is_some()
        {
            return self.by_key(branches, &tags, node, at, path);
        }
        self.best_branch(branches, &resolved, node, at, path);
    }

    /// Variants told apart by their only key, as `{steps: 10}` or `{tokens: 1e6}`.
    fn by_key(&mut self, branches: &'a [Json], tags: &[Option<&'a str>], node: &mut Node, at: Span, path: &str) {
        let names: Vec<&str> = tags.iter().copied().flatten().collect();
        let keys: Vec<(String, Span)> =
            node.entries().into_iter().flatten().map(|entry| (entry.key.clone(), entry.key_span)).collect();
        let known = |key: &str| names.contains(&key);
        for (key, span) in keys.iter().filter(|(key, _)| !known(key)) {
            let problem = Diagnostic::new(*span, format!("unknown key `{key}` in `{path}`"));
            self.report(problem.maybe_help(did_you_mean(key, names.iter().copied())));
        }
        let good: Vec<&(String, Span)> = keys.iter().filter(|(key, _)| known(key)).collect();
        match good.as_slice() {
            [(key, _)] if keys.len() == 1 => {
                if let Some(branch) = tags.iter().position(|tag| *tag == Some(key.as_str())) {
                    self.value(&branches[branch], node, at, path);
                }
            }
            [] if !keys.is_empty() => {}
            [_] => {}
            [] => self.report(Diagnostic::new(at, format!("`{path}` takes one of {}", list(names)))),
            [_, (_, second), ..] => {
                self.report(Diagnostic::new(*second, format!("`{path}` takes exactly one of {}", list(names))));
            }
        }
    }

    /// `Some(Some(branch))` when a tag names a branch, `Some(None)` when the tag is missing or wrong (reported), `None`
    /// when the branches have no tag or the value is no map.
    fn by_tag(
        &mut self,
        branches: &'a [Json],
        resolved: &[&'a Map<String, Json>],
        node: &Node,
        at: Span,
        path: &str,
    ) -> Option<Option<&'a Json>> {
        let entries = node.entries()?;
        let mut tags: BTreeMap<&str, Vec<(&Json, &'a Json)>> = BTreeMap::new();
        for (branch, schema) in branches.iter().zip(resolved) {
            for (name, property) in schema.get("properties").and_then(Json::as_object).into_iter().flatten() {
                if let Some(value) = property.get("const") {
                    tags.entry(name).or_default().push((value, branch));
                }
            }
        }
        let structs = resolved.iter().filter(|branch| !types(branch).contains(&"null")).count();
        let (tag, values) = tags.into_iter().find(|(_, values)| values.len() == structs)?;
        let names: Vec<&str> = values.iter().filter_map(|(value, _)| value.as_str()).collect();
        let Some(entry) = entries.iter().find(|entry| entry.key == tag) else {
            let problem = Diagnostic::new(at, format!("`{path}` lacks `{tag}`"));
            self.report(problem.help(format!("allowed: {}", list(names))));
            return Some(None);
        };
        let given = entry.value.to_json();
        if let Some((_, branch)) = values.iter().find(|(value, _)| **value == given) {
            return Some(Some(branch));
        }
        let allowed: Vec<&Json> = values.iter().map(|(value, _)| *value).collect();
        self.not_allowed(&allowed, &entry.value, entry.key_span, &format!("{path}.{tag}"));
        Some(None)
    }

    /// Without a tag: the branch with no problems, else the problems of the branch that fits best.
    fn best_branch(
        &mut self,
        branches: &'a [Json],
        resolved: &[&'a Map<String, Json>],
        node: &mut Node,
        at: Span,
        path: &str,
    ) {
        let mut best: Option<(usize, Vec<Diagnostic>)> = None;
        let mut wanted: Vec<&str> = Vec::new();
        for (branch, schema) in branches.iter().zip(resolved) {
            let names = types(schema);
            wanted.extend(names.iter().filter(|name| !wanted.contains(name)).copied().collect::<Vec<_>>());
            let fits = names.is_empty() || names.iter().any(|name| is_type(&mut node.clone(), name));
            if !fits || names == ["null"] {
                continue;
            }
            let mut attempt = node.clone();
            let mut inner = Checker { root: self.root, problems: Vec::new() };
            inner.value(branch, &mut attempt, at, path);
            if inner.problems.is_empty() {
                *node = attempt;
                return;
            }
            if best.as_ref().is_none_or(|(count, _)| inner.problems.len() < *count) {
                best = Some((inner.problems.len(), inner.problems));
            }
        }
        match best {
            Some((_, problems)) => self.problems.extend(problems),
            None => self.mismatch(&alternatives(&wanted), node, at, path),
        }
    }
}

/// The only key of each variant; none where a variant is a word or nothing. `None` when variants are not of this form.
fn external_tags<'a>(branches: &[&'a Map<String, Json>]) -> Option<Vec<Option<&'a str>>> {
    let tag = |branch: &&'a Map<String, Json>| {
        let properties = branch.get("properties").and_then(Json::as_object);
        match properties {
            None if !types(branch).contains(&"object") && !branch.contains_key("$ref") => Some(None),
            Some(properties) if properties.len() == 1 => {
                let name = properties.keys().next()?.as_str();
                (branch.get("required")?.as_array()?.as_slice() == [Json::from(name)]).then_some(Some(name))
            }
            _ => None,
        }
    };
    let tags: Vec<Option<&str>> = branches.iter().map(tag).collect::<Option<_>>()?;
    let names: std::collections::BTreeSet<&str> = tags.iter().copied().flatten().collect();
    (names.len() > 1 && names.len() == tags.iter().flatten().count()).then_some(tags)
}

/// Range of an integer format; 64-bit ranges are checked when the number is read.
fn range_of_format(format: &str) -> Option<(f64, f64)> {
    Some(match format {
        "uint8" => (0.0, f64::from(u8::MAX)),
        "uint16" => (0.0, f64::from(u16::MAX)),
        "uint32" => (0.0, f64::from(u32::MAX)),
        "uint" | "uint64" => (0.0, f64::INFINITY),
        "int8" => (f64::from(i8::MIN), f64::from(i8::MAX)),
        "int16" => (f64::from(i16::MIN), f64::from(i16::MAX)),
        "int32" => (f64::from(i32::MIN), f64::from(i32::MAX)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
