//! The texts that problems point into: the pipeline file and each `--set` argument, with line tables.
//!
//! Invariant: a [`Span`] is a byte range of one source on character boundaries; lines and columns count from 1, columns
//! in characters.

use std::{ops::Range, path::PathBuf};

/// A byte range in one of the [`Sources`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Index of the source.
    pub source: u32,
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

/// One text.
#[derive(Clone, Debug)]
pub struct Source {
    /// What stands before `:LINE:COL`: the path as the user gave it, or the `--set` argument.
    pub name: String,
    /// Content, without a byte order mark.
    pub text: String,
    /// Folder that relative paths written in this text start from.
    pub base: PathBuf,
    line_starts: Vec<usize>,
}

impl Source {
    /// Wraps `text`, dropping a leading byte order mark.
    pub fn new(name: impl Into<String>, text: impl Into<String>, base: impl Into<PathBuf>) -> Self {
        let mut text = text.into();
        if text.starts_with('\u{feff}') {
            text.drain(..'\u{feff}'.len_utf8());
        }
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { name: name.into(), text, base: base.into(), line_starts }
    }

    /// The nearest character boundary at or before `at`.
    pub fn boundary(&self, at: usize) -> usize {
        let mut at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        at
    }

    /// Line and column of a byte.
    pub fn position(&self, at: usize) -> (usize, usize) {
        let at = self.boundary(at);
        let line = self.line_starts.partition_point(|start| *start <= at) - 1;
        (line + 1, self.text[self.line_starts[line]..at].chars().count() + 1)
    }

    /// Byte range of a line (counted from 1) without its line feed.
    pub(crate) fn line(&self, line: usize) -> Range<usize> {
        let start = self.line_starts[line - 1];
        let end = self.line_starts.get(line).map_or(self.text.len(), |next| next - 1);
        start..end
    }

    /// Number of lines.
    pub(crate) fn lines(&self) -> usize {
        self.line_starts.len()
    }
}

/// A place where `${params.x}` stands, and the place where `x` got its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The placeholder.
    pub used: Span,
    /// The value under `params`, or of a `--set`.
    pub written: Span,
    /// The param's name.
    pub param: String,
}

/// The texts of one pipeline: the file first, then the `--set` arguments.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    texts: Vec<Source>,
    origins: Vec<Origin>,
}

impl Sources {
    /// Adds a text and returns its index.
    pub fn add(&mut self, source: Source) -> u32 {
        self.texts.push(source);
        self.texts.len() as u32 - 1
    }

    /// The text at `index`.
    pub fn get(&self, index: u32) -> Option<&Source> {
        self.texts.get(index as usize)
    }

    /// Remembers where values of params were written.
    pub fn add_origins(&mut self, origins: Vec<Origin>) {
        self.origins.extend(origins);
    }

    /// The params whose values stand at `used`.
    pub(crate) fn origins(&self, used: Span) -> impl Iterator<Item = &Origin> {
        self.origins.iter().filter(move |origin| origin.used == used)
    }

    /// `FILE:LINE:COL` of the start of `span`.
    pub fn locate(&self, span: Span) -> String {
        self.get(span.source).map_or_else(String::new, |source| {
            let (line, column) = source.position(span.start as usize);
            format!("{}:{line}:{column}", source.name)
        })
    }
}
