//! `${params.x}` and `${env.X}`: the whole template language. A text that is exactly one placeholder takes the param's
//! type; inside a longer text the value is written out. `$${` is a literal `${`.

use std::collections::BTreeMap;

use crate::{
    diagnostics::{Diagnostic, Origin, Span, did_you_mean},
    yaml::{ENVIRONMENT, Node, Value},
};

struct Lookup<'a> {
    params: BTreeMap<String, Node>,
    env: Option<&'a BTreeMap<String, String>>,
    /// Texts under `params` themselves may use the environment only.
    inside_params: bool,
    origins: Vec<Origin>,
    problems: &'a mut Vec<Diagnostic>,
}

/// Replaces every placeholder of the tree, those of `params` first; returns where the values of params were written.
pub(super) fn substitute(
    root: &mut Node,
    env: Option<&BTreeMap<String, String>>,
    problems: &mut Vec<Diagnostic>,
) -> Vec<Origin> {
    let mut lookup = Lookup { params: BTreeMap::new(), env, inside_params: true, origins: Vec::new(), problems };
    let Value::Map(entries) = &mut root.value else { return Vec::new() };
    for entry in entries.iter_mut().filter(|entry| entry.key == "params") {
        lookup.walk(&mut entry.value);
        for param in entry.value.entries().into_iter().flatten() {
            lookup.params.entry(param.key.clone()).or_insert_with(|| param.value.clone());
        }
    }
    lookup.inside_params = false;
    for entry in entries.iter_mut().filter(|entry| entry.key != "params") {
        lookup.walk(&mut entry.value);
    }
    lookup.origins
}

/// One piece of a text.
enum Piece<'a> {
    Literal(&'a str),
    Name(&'a str),
    Open,
}

fn pieces(text: &str) -> Vec<Piece<'_>> {
    let (mut rest, mut pieces) = (text, Vec::new());
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            pieces.push(Piece::Literal(&rest[..at - 1]));
            pieces.push(Piece::Literal("${"));
            rest = &rest[at + 2..];
            continue;
        }
        pieces.push(Piece::Literal(&rest[..at]));
        match rest[at..].find('}') {
            Some(end) => {
                pieces.push(Piece::Name(&rest[at + 2..at + end]));
                rest = &rest[at + end + 1..];
            }
            None => {
                pieces.push(Piece::Open);
                rest = "";
            }
        }
    }
    pieces.push(Piece::Literal(rest));
    pieces.retain(|piece| !matches!(piece, Piece::Literal("")));
    pieces
}

impl Lookup<'_> {
    fn walk(&mut self, node: &mut Node) {
        match &mut node.value {
            Value::List(items) => items.iter_mut().for_each(|item| self.walk(item)),
            Value::Map(entries) => entries.iter_mut().for_each(|entry| self.walk(&mut entry.value)),
            Value::Text(text) if text.contains("${") => {
                let text = std::mem::take(text);
                self.replace(node, &text);
            }
            _ => {}
        }
    }

    fn replace(&mut self, node: &mut Node, text: &str) {
        let pieces = pieces(text);
        if let [Piece::Name(name)] = pieces.as_slice() {
            let span = node.span;
            match self.value(name, span) {
                Some(found) => {
                    *node = found;
                    place_at(node, span);
                }
                None => node.value = Value::Unknown,
            }
            return;
        }
        let (mut whole, mut known) = (String::new(), true);
        for (i, piece) in pieces.iter().enumerate() {
            match piece {
                Piece::Literal(literal) => whole.push_str(literal),
                Piece::Open => {
                    known = false;
                    let problem = Diagnostic::new(node.span, "`${` is not closed by `}`");
                    self.problems.push(problem.help("write `$${` for the two characters themselves"));
                }
                Piece::Name(name) => {
                    let Some(found) = self.value(name, node.span) else {
                        known = false;
                        continue;
                    };
                    if i == 0 {
                        node.origin = found.origin;
                    }
                    match &found.value {
                        Value::Text(text) => whole.push_str(text),
                        Value::Unknown => known = false,
                        Value::List(_) | Value::Map(_) | Value::Null => self.problems.push(Diagnostic::new(
                            node.span,
                            format!("`{name}` is {}, which cannot stand inside a longer text", found.describe()),
                        )),
                        _ => whole.push_str(&found.to_json().to_string()),
                    }
                }
            }
        }
        node.value = if known { Value::Text(whole) } else { Value::Unknown };
    }

    fn value(&mut self, name: &str, span: Span) -> Option<Node> {
        if let Some(variable) = name.strip_prefix("env.") {
            let text = match self.env {
                Some(env) => env.get(variable).cloned(),
                None => std::env::var(variable).ok(),
            };
            let Some(text) = text else {
                let problem = Diagnostic::new(span, format!("the environment has no variable `{variable}`"));
                self.problems.push(problem.help(format!("set it: `export {variable}=...`")));
                return None;
            };
            return Some(Node { value: Value::Text(text), span, origin: ENVIRONMENT });
        }
        let problem = match name.strip_prefix("params.") {
            Some(_) if self.inside_params => Diagnostic::new(span, "a param may not refer to another param"),
            Some(param) => match self.params.get(param) {
                Some(found) => {
                    let found = found.clone();
                    self.origins.push(Origin { used: span, written: found.span, param: param.to_owned() });
                    return Some(found);
                }
                None => Diagnostic::new(span, format!("no param is called `{param}`"))
                    .maybe_help(did_you_mean(param, self.params.keys().map(String::as_str))),
            },
            None => Diagnostic::new(span, format!("`${{{name}}}` is not known"))
                .help("there are `${params.NAME}` and `${env.NAME}`; write `$${` for the two characters themselves"),
        };
        self.problems.push(problem);
        None
    }
}

/// A substituted value stands where its placeholder stood; relative paths keep the folder of the text that wrote them.
fn place_at(node: &mut Node, span: Span) {
    node.span = span;
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| place_at(item, span)),
        Value::Map(entries) => {
            for entry in entries {
                entry.key_span = span;
                place_at(&mut entry.value, span);
            }
        }
        _ => {}
    }
}
