//! YAML text as a tree of positioned nodes.
//!
//! The tree is built from the event stream of serde_yaml's parser, so that problems do not stop the reading: maps are
//! lists of entries in which a repeated key stands as often as it was written, and every scalar keeps its place. Checks
//! then walk the tree and report everything they find.

mod read;
mod scalar;

use serde_json::Value as Json;

pub(crate) use read::{read, read_argument};

use crate::diagnostics::Span;

/// [`Node::origin`] of a value taken from an environment variable: paths start from the current directory, and the text
/// takes the type that is wanted.
pub(crate) const ENVIRONMENT: u32 = u32::MAX;

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// Where the value is used.
    pub(crate) span: Span,
    /// Source whose folder relative paths in this value start from: that of the text that wrote it, which differs from
    /// `span.source` after a `${params.x}` that the command line set.
    pub(crate) origin: u32,
}

/// What a node holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Something that was reported already and fits everywhere, so that one mistake is one problem.
    Unknown,
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One `key: value` of a map.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) key_span: Span,
    pub(crate) value: Node,
}

impl Node {
    /// A node without children.
    pub(crate) fn new(value: Value, span: Span) -> Self {
        Self { value, span, origin: span.source }
    }

    /// What a reader would call it: `a list`, `the text "x"`.
    pub(crate) fn describe(&self) -> String {
        match &self.value {
            Value::Unknown | Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("{value}"),
            Value::Int(value) => format!("the integer {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Text(text) if text.chars().count() > 40 => "a text".to_owned(),
            Value::Text(text) => format!("the text {text:?}"),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        }
    }

    /// A text that came from the environment becomes the number or truth value it spells.
    pub(crate) fn take_environment_type(&mut self) {
        if self.origin == ENVIRONMENT
            && let Value::Text(text) = &self.value
            && let Ok(value) = scalar::resolve(text)
        {
            self.value = value;
        }
    }

    /// A float without a fraction becomes an integer: `14.8e12` counts tokens.
    pub(crate) fn take_integral(&mut self) {
        if let Value::Float(value) = self.value
            && value.fract() == 0.0
            && value.abs() < 9.0e15
        {
            self.value = Value::Int(value as i128);
        }
    }

    /// The text of a text node.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The entries of a map node.
    pub(crate) fn entries(&self) -> Option<&[Entry]> {
        match &self.value {
            Value::Map(entries) => Some(entries),
            _ => None,
        }
    }

    /// The value under `key` in a map node.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entries()?.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// The entry of a map node, made when absent; `None` when this node is neither a map nor empty.
    pub(crate) fn slot(&mut self, key: &str, span: Span) -> Option<&mut Node> {
        if self.value == Value::Null {
            self.value = Value::Map(Vec::new());
        }
        let Value::Map(entries) = &mut self.value else { return None };
        let at = match entries.iter().position(|entry| entry.key == key) {
            Some(at) => at,
            None => {
                let value = Node::new(Value::Null, span);
                entries.push(Entry { key: key.to_owned(), key_span: span, value });
                entries.len() - 1
            }
        };
        Some(&mut entries[at].value)
    }

    /// Follows a path as `config.model.layers[3].name` downwards as far as it exists; the nearest node is returned, with
    /// whether the whole path was found.
    pub(crate) fn follow(&self, path: &str) -> (&Node, Option<Span>, bool) {
        let (mut node, mut key_span) = (self, None);
        for part in path.split('.').filter(|part| !part.is_empty()) {
            let (name, indices) = part.split_once('[').unwrap_or((part, ""));
            if !name.is_empty() {
                let Some(entry) = node.entries().and_then(|entries| entries.iter().find(|entry| entry.key == name))
                else {
                    return (node, key_span, false);
                };
                (node, key_span) = (&entry.value, Some(entry.key_span));
            }
            for index in indices.split('[').filter(|index| !index.is_empty()) {
                let item = match &node.value {
                    Value::List(items) => index.trim_end_matches(']').parse::<usize>().ok().and_then(|i| items.get(i)),
                    _ => None,
                };
                let Some(item) = item else { return (node, key_span, false) };
                (node, key_span) = (item, None);
            }
        }
        (node, key_span, true)
    }

    /// The same as plain JSON; of a repeated key the first wins, since the problem was reported.
    pub(crate) fn to_json(&self) -> Json {
        match &self.value {
            Value::Unknown | Value::Null => Json::Null,
            Value::Bool(value) => Json::Bool(*value),
            Value::Int(value) => match (i64::try_from(*value), u64::try_from(*value)) {
                (Ok(value), _) => value.into(),
                (_, Ok(value)) => value.into(),
                _ => Json::Null,
            },
            Value::Float(value) => serde_json::Number::from_f64(*value).map_or(Json::Null, Json::Number),
            Value::Text(text) => Json::String(text.clone()),
            Value::List(items) => Json::Array(items.iter().map(Node::to_json).collect()),
            Value::Map(entries) => {
                let mut map = serde_json::Map::new();
                for entry in entries {
                    map.entry(entry.key.clone()).or_insert_with(|| entry.value.to_json());
                }
                Json::Object(map)
            }
        }
    }
}

#[cfg(test)]
mod tests;
