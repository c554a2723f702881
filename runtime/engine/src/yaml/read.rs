//! Events of the parser to the tree of [`Node`]s, on a stack of its own: no recursion, whatever the text holds.
//!
//! Limits keep a hostile text cheap: bytes, nodes after aliases are copied, depth. The parser bounds its own work (255
//! nested collections, 1024 characters of lookahead).

use std::collections::BTreeMap;

use serde_yaml::granit_parser::{Event, Parser, ScalarStyle, Span as ParserSpan, StrInput, Tag};

use super::{Entry, Node, Value, scalar};
use crate::diagnostics::{Diagnostic, Source, Span};

/// Longest text read.
const BYTES_MAX: usize = 32 << 20;
/// Most nodes in the tree, copies made by aliases included.
const NODES_MAX: usize = 400_000;
/// Most bytes of text in the tree, copies made by aliases included.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Deepest nesting.
const DEPTH_MAX: usize = 100;

/// An open collection.
struct Frame {
    /// A map, else a list.
    map: bool,
    anchor: usize,
    span: Span,
    /// Nodes below and the depth of the deepest, for the budget of aliases.
    size: Size,
    items: Vec<Node>,
    entries: Vec<Entry>,
    key: Option<(String, Span)>,
}

#[derive(Clone, Copy, Default)]
struct Size {
    nodes: usize,
    depth: usize,
    /// Bytes of the texts and keys.
    bytes: usize,
}

struct Builder<'a> {
    source: u32,
    text: &'a Source,
    stack: Vec<Frame>,
    anchors: BTreeMap<usize, (Node, Size)>,
    nodes: usize,
    bytes: usize,
    root: Option<Node>,
    documents: usize,
    problems: Vec<Diagnostic>,
}

/// Reads a file's text. `None` when nothing could be read; problems say why.
pub(crate) fn read(source: u32, text: &Source) -> (Option<Node>, Vec<Diagnostic>) {
    if text.text.len() > BYTES_MAX {
        let message = format!("the file has {} bytes; a pipeline of more than {BYTES_MAX} is refused", text.text.len());
        return (None, vec![Diagnostic::new(Span { source, start: 0, end: 0 }, message)]);
    }
    let mut builder = Builder {
        source,
        text,
        stack: Vec::new(),
        anchors: BTreeMap::new(),
        nodes: 0,
        bytes: 0,
        root: None,
        documents: 0,
        problems: Vec::new(),
    };
    let mut parser = Parser::new_from_str(&text.text);
    let complete = builder.drive(&mut parser);
    let root = if complete { builder.root.take() } else { None };
    (root, builder.problems)
}

/// Reads the value of a `--set PATH=VALUE` that begins at byte `from` of the source: a flow collection or a quoted text as
/// YAML, anything else as one plain scalar, so that `*.parquet` and `a: b` need no quotes.
pub(crate) fn read_argument(source: u32, text: &Source, from: usize) -> (Node, Vec<Diagnostic>) {
    let value = &text.text[from..];
    let whole = Span { source, start: from as u32, end: text.text.len() as u32 };
    if !value.trim_start().starts_with(['[', '{', '"', '\'']) {
        return match scalar::resolve(value.trim()) {
            Ok(value) => (Node::new(value, whole), Vec::new()),
            Err(message) => (Node::new(Value::Unknown, whole), vec![Diagnostic::new(whole, message)]),
        };
    }
    // The parser sees the value alone; places are moved behind the path afterwards.
    let alone = Source::new("", value, "");
    let (node, mut problems) = read(source, &alone);
    for problem in &mut problems {
        problem.span.start += from as u32;
        problem.span.end += from as u32;
    }
    let node = node.map(|mut node| {
        shift(&mut node, from as u32);
        node
    });
    (node.unwrap_or_else(|| Node::new(Value::Unknown, whole)), problems)
}

fn shift(node: &mut Node, by: u32) {
    let moved = |span: &mut Span| {
        span.start += by;
        span.end += by;
    };
    moved(&mut node.span);
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| shift(item, by)),
        Value::Map(entries) => {
            for entry in entries {
                moved(&mut entry.key_span);
                shift(&mut entry.value, by);
            }
        }
        _ => {}
    }
}

impl<'a> Builder<'a> {
    /// Feeds every event; false when the text cannot be read to its end.
    fn drive(&mut self, parser: &mut Parser<'a, StrInput<'a>>) -> bool {
        while let Some(next) = parser.next_event() {
            let (event, span) = match next {
                Ok(event) => event,
                Err(error) => {
                    let at = error.marker().byte_offset().unwrap_or(0);
                    let info = error.info();
                    // The parser's own bound on nesting trips before ours when it looks ahead inside one line.
                    let nested = info.contains("recursion limit");
                    self.syntax(at, if nested { "values are nested too deeply" } else { &info });
                    return false;
                }
            };
            if !self.event(event, self.span(&span)) {
                return false;
            }
        }
        true
    }

    fn span(&self, span: &ParserSpan) -> Span {
        let range = span.byte_range().unwrap_or(0..0);
        let (start, end) = (self.text.boundary(range.start), self.text.boundary(range.end));
        let trimmed = self.text.text[start..end.max(start)].trim_end().len();
        Span { source: self.source, start: start as u32, end: (start + trimmed) as u32 }
    }

    fn syntax(&mut self, at: usize, info: &str) {
        let at = self.text.boundary(at);
        let span = Span { source: self.source, start: at as u32, end: at as u32 };
        let (line, _) = self.text.position(at);
        let indent = &self.text.text[self.text.line(line)];
        let tab = indent[..indent.len() - indent.trim_start().len()].contains('\t');
        let help = tab.then(|| "this line is indented with a tab; YAML takes spaces only".to_owned());
        self.problems.push(Diagnostic::new(span, format!("this is not YAML: {info}")).maybe_help(help));
    }

    /// Handles one event; false stops the reading.
    fn event(&mut self, event: Event<'a>, span: Span) -> bool {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    self.problem(span, "a second document starts here; a pipeline is one document");
                    return false;
                }
                true
            }
            Event::Scalar(text, style, anchor, tag) => {
                let node = self.scalar(&text, style, tag.as_deref(), span);
                self.take_bytes(text.len(), span)
                    && self.finish(node, anchor, Size { nodes: 1, depth: 1, bytes: text.len() })
            }
            Event::SequenceStart(_, anchor, tag) => self.open(false, anchor, tag.as_deref(), span),
            Event::MappingStart(_, anchor, tag) => self.open(true, anchor, tag.as_deref(), span),
            Event::SequenceEnd | Event::MappingEnd => self.close(span),
            Event::Alias(anchor) => match self.anchors.get(&anchor).map(|(_, size)| *size) {
                Some(size) => {
                    // Looked at before anything is copied.
                    self.take_bytes(size.bytes, span)
                        && match self.anchors.get(&anchor).cloned() {
                            Some((node, size)) => self.finish(Node { span, ..node }, 0, size),
                            None => false,
                        }
                }
                None => {
                    self.problem(span, "this alias stands inside the value that it repeats");
                    false
                }
            },
            _ => true,
        }
    }

    /// Counts text that is kept; false when there is too much of it.
    fn take_bytes(&mut self, bytes: usize, span: Span) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        let fits = self.bytes <= TEXT_BYTES_MAX;
        if !fits {
            let most = TEXT_BYTES_MAX >> 20;
            self.problem(span, format!("the file holds more than {most} MB of text, copies made by aliases included"));
        }
        fits
    }

    fn problem(&mut self, span: Span, message: impl Into<String>) {
        self.problems.push(Diagnostic::new(span, message));
    }

    fn scalar(&mut self, text: &str, style: ScalarStyle, tag: Option<&Tag>, span: Span) -> Node {
        let value = match tag.map(|tag| (tag, tag.core_suffix())) {
            Some((_, Some("str"))) => Value::Text(text.to_owned()),
            Some((tag, None)) => {
                self.problem(span, format!("the tag `{}` is unknown; a pipeline needs no tags", tag.original()));
                Value::Text(text.to_owned())
            }
            _ if style == ScalarStyle::Plain => match scalar::resolve(text) {
                Ok(value) => value,
                Err(message) => {
                    self.problem(span, message);
                    Value::Unknown
                }
            },
            _ => Value::Text(text.to_owned()),
        };
        Node::new(value, span)
    }

    fn open(&mut self, map: bool, anchor: usize, tag: Option<&Tag>, span: Span) -> bool {
        if let Some(tag) = tag.filter(|tag| tag.core_suffix().is_none()) {
            self.problem(span, format!("the tag `{}` is unknown; a pipeline needs no tags", tag.original()));
        }
        if self.stack.len() >= DEPTH_MAX {
            self.problem(span, format!("values are nested deeper than {DEPTH_MAX} levels here"));
            return false;
        }
        let size = Size { nodes: 1, depth: 0, bytes: 0 };
        self.stack.push(Frame { map, anchor, span, size, items: Vec::new(), entries: Vec::new(), key: None });
        true
    }

    fn close(&mut self, end: Span) -> bool {
        let Some(frame) = self.stack.pop() else { return true };
        let span = Span { end: end.end.max(frame.span.end), ..frame.span };
        let value = if frame.map { Value::Map(self.merge(frame.entries)) } else { Value::List(frame.items) };
        let size = Size { depth: frame.size.depth + 1, ..frame.size };
        self.finish(Node::new(value, span), frame.anchor, size)
    }

    /// Puts a complete node where it belongs: root, list item, key or value.
    fn finish(&mut self, node: Node, anchor: usize, size: Size) -> bool {
        let kept = if anchor > 0 { 2 } else { 1 };
        self.nodes = self.nodes.saturating_add(if size.nodes == 1 { kept } else { size.nodes * kept });
        if self.nodes > NODES_MAX {
            self.problem(
                node.span,
                format!("the file holds more than {NODES_MAX} values, copies made by aliases included"),
            );
            return false;
        }
        if self.stack.len() + size.depth > DEPTH_MAX {
            self.problem(node.span, format!("values are nested deeper than {DEPTH_MAX} levels here"));
            return false;
        }
        if anchor > 0 {
            if !self.take_bytes(size.bytes, node.span) {
                return false;
            }
            self.anchors.insert(anchor, (node.clone(), size));
        }
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(node);
            return true;
        };
        frame.size.nodes += size.nodes;
        frame.size.bytes += size.bytes;
        frame.size.depth = frame.size.depth.max(size.depth);
        if !frame.map {
            frame.items.push(node);
        } else if let Some((key, key_span)) = frame.key.take() {
            frame.entries.push(Entry { key, key_span, value: node });
        } else {
            let span = node.span;
            let key = match node.value {
                Value::Text(text) => text,
                Value::Unknown | Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                    self.text.text[span.start as usize..span.end as usize].to_owned()
                }
                Value::List(_) | Value::Map(_) => {
                    self.problem(span, "a key is a single word or text");
                    "?".to_owned()
                }
            };
            if let Some(frame) = self.stack.last_mut() {
                frame.key = Some((key, span));
            }
        }
        true
    }

    /// Resolves `<<: *anchor` and reports repeated keys at their second occurrence, keeping both copies.
    fn merge(&mut self, entries: Vec<Entry>) -> Vec<Entry> {
        let mut seen: BTreeMap<&str, Span> = BTreeMap::new();
        let mut repeated = Vec::new();
        for entry in entries.iter().filter(|entry| entry.key != "<<") {
            if let Some(first) = seen.insert(&entry.key, entry.key_span) {
                repeated.push(
                    Diagnostic::new(entry.key_span, format!("the key `{}` stands twice in this map", entry.key))
                        .note(first, "first written here"),
                );
            }
        }
        let mut merged: Vec<Entry> = Vec::new();
        for source in entries.iter().filter(|entry| entry.key == "<<") {
            let maps = match &source.value.value {
                Value::List(items) => items.iter().collect(),
                _ => vec![&source.value],
            };
            for map in maps {
                let Some(inherited) = map.entries() else {
                    repeated.push(Diagnostic::new(map.span, "`<<` merges a map or a list of maps"));
                    continue;
                };
                for entry in inherited {
                    if seen.insert(&entry.key, entry.key_span).is_none() {
                        merged.push(entry.clone());
                    }
                }
            }
        }
        self.problems.extend(repeated);
        let mut entries: Vec<Entry> = entries.into_iter().filter(|entry| entry.key != "<<").collect();
        entries.extend(merged);
        entries
    }
}
