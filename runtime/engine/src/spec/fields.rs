//! Reading single fields of the tree, each mistake a problem at its place.

use crate::{
    diagnostics::{Diagnostic, Span, did_you_mean, nearest},
    spec::Word,
    yaml::{Entry, Node, Value},
};

/// Collects problems while fields are read.
pub(super) struct Fields<'a> {
    pub(super) problems: &'a mut Vec<Diagnostic>,
}

impl Fields<'_> {
    pub(super) fn problem(&mut self, span: Span, message: impl Into<String>) {
        self.problems.push(Diagnostic::new(span, message));
    }

    /// The entries of a map with these keys; others are reported. Nothing at all counts as an empty map.
    pub(super) fn map<'n>(&mut self, node: &'n Node, at: Span, what: &str, known: &[&str]) -> &'n [Entry] {
        let entries = self.open_map(node, at, what);
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_str()) && !entry.key.starts_with("x-"))
        {
            let free = known.iter().copied().filter(|name| !entries.iter().any(|entry| entry.key == *name));
            let help = did_you_mean(&entry.key, free);
            let problem = Diagnostic::new(entry.key_span, format!("unknown key `{}` in {what}", entry.key));
            self.problems.push(problem.maybe_help(help));
        }
        entries
    }

    /// The entries of a map with any keys.
    pub(super) fn open_map<'n>(&mut self, node: &'n Node, at: Span, what: &str) -> &'n [Entry] {
        match &node.value {
            Value::Map(entries) => entries,
            Value::Null | Value::Unknown => &[],
            _ => {
                let span = if node.span == Span::default() { at } else { node.span };
                self.problem(span, format!("{what} is a map; this is {}", node.describe()));
                &[]
            }
        }
    }

    pub(super) fn text(&mut self, node: &Node, at: Span, what: &str) -> Option<Word> {
        match &node.value {
            Value::Unknown => None,
            Value::Text(text) => Some(Word { text: text.clone(), span: node.span, origin: node.origin }),
            _ => {
                let span = if node.value == Value::Null { at } else { node.span };
                self.problem(span, format!("{what} is a text; this is {}", node.describe()));
                None
            }
        }
    }

    pub(super) fn integer(&mut self, node: &Node, at: Span, what: &str, low: i128, high: i128) -> Option<i128> {
        let mut node = node.clone();
        node.take_environment_type();
        node.take_integral();
        match node.value {
            Value::Unknown => None,
            Value::Int(value) if (low..=high).contains(&value) => Some(value),
            Value::Int(value) => {
                self.problem(node.span, format!("{what} is {low} to {high}; this is {value}"));
                None
            }
            _ => {
                let span = if node.value == Value::Null { at } else { node.span };
                self.problem(span, format!("{what} is an integer; this is {}", node.describe()));
                None
            }
        }
    }
}

/// Whether `key` is absent and no misspelt key can have meant it.
pub(super) fn lacks(entries: &[Entry], key: &str, known: &[&str]) -> bool {
    let given = |name: &str| entries.iter().any(|entry| entry.key == name);
    let free = || known.iter().copied().filter(|name| !given(name));
    !given(key)
        && !entries.iter().any(|entry| nearest(&entry.key, free()) == Some(key) && !known.contains(&entry.key.as_str()))
}

/// The first entry under `key`: of a repeated key both copies were checked as maps, the first one counts.
pub(super) fn first<'n>(entries: &'n [Entry], key: &str) -> Option<&'n Entry> {
    entries.iter().find(|entry| entry.key == key)
}
