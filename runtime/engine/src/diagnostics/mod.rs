//! Problems of a pipeline, each at its place in the text, all reported at once.
//!
//! Invariant: the order is that of the text, duplicates are dropped, and each problem prints its own `FILE:LINE:COL`.

mod render;
mod source;
mod suggest;

use std::fmt;

use serde_json::{Value, json};
pub use source::{Origin, Source, Sources, Span};
pub(crate) use suggest::{did_you_mean, list, nearest};

/// One problem.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    /// What is wrong.
    pub message: String,
    /// Where; the default span means the file as a whole.
    pub span: Span,
    /// What to do about it.
    pub help: Option<String>,
    /// Other places that matter, each with a word on why.
    pub notes: Vec<(Span, String)>,
}

impl Diagnostic {
    /// A problem at `span`.
    pub fn new(span: Span, message: impl Into<String>) -> Self {
        Self { message: message.into(), span, help: None, notes: Vec::new() }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds help when there is some.
    #[must_use]
    pub fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help.or(self.help);
        self
    }

    /// Points at another place.
    #[must_use]
    pub fn note(mut self, span: Span, text: impl Into<String>) -> Self {
        self.notes.push((span, text.into()));
        self
    }
}

/// Every problem found in a pipeline, with the texts they point into.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    /// The texts.
    pub sources: Sources,
    /// The problems in the order of the text.
    pub problems: Vec<Diagnostic>,
}

impl Diagnostics {
    /// Sorts the problems and drops repeated ones. A problem at `${params.x}` also points at where `x` got its value.
    pub fn new(sources: Sources, mut problems: Vec<Diagnostic>) -> Self {
        for problem in &mut problems {
            let notes =
                sources.origins(problem.span).map(|origin| (origin.written, format!("value of `{}`", origin.param)));
            problem.notes.extend(notes);
        }
        problems.sort_by_key(|problem| (problem.span.source, problem.span.start, problem.span.end));
        problems.dedup();
        Self { sources, problems }
    }

    /// A single problem that has no place in any text.
    pub fn plain(message: impl Into<String>) -> Self {
        Self { sources: Sources::default(), problems: vec![Diagnostic::new(Span::default(), message)] }
    }

    /// Text for a person, with source excerpts; with terminal colours when `colour` is set.
    pub fn render(&self, colour: bool) -> String {
        render::render(self, colour)
    }

    /// One JSON value per problem: `file`, `line`, `column`, `message`, `help`.
    pub fn to_json(&self) -> Vec<Value> {
        let one = |problem: &Diagnostic| {
            let source = self.sources.get(problem.span.source);
            let place = source.map(|source| (source.name.clone(), source.position(problem.span.start as usize)));
            json!({
                "file": place.as_ref().map(|place| &place.0),
                "line": place.as_ref().map(|place| place.1.0),
                "column": place.as_ref().map(|place| place.1.1),
                "message": problem.message,
                "help": problem.help,
            })
        };
        self.problems.iter().map(one).collect()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostics {}
