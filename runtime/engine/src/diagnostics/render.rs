//! Draws diagnostics with `annotate-snippets`: title, `FILE:LINE:COL`, the lines around the place, help.
//!
//! Only a window of the source is handed over, so that ten problems in a file of 10 MB cost no more than in a small one.

use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use super::{Diagnostic, Diagnostics, Source, Span};

/// Problems drawn at most; the rest are counted.
const SHOWN_MAX: usize = 100;
/// A line longer than this is cut to a window around the place.
const LINE_CHARS_MAX: usize = 240;

/// A cut of one source: text, number of its first line, and the marked range inside the text.
struct Window {
    text: String,
    first_line: usize,
    marked: Range<usize>,
    /// Line and column of the place when the cut hides where its line starts.
    cut_at: Option<(usize, usize)>,
}

fn window(source: &Source, span: Span) -> Window {
    let start = source.boundary(span.start as usize);
    let (line, column) = source.position(start);
    let here = source.line(line);
    // A mark never leaves its first line: a whole block underlined tells less than its key.
    let end = source.boundary(span.end as usize).clamp(start, here.end.max(start));
    if here.len() > LINE_CHARS_MAX {
        let from = source.boundary(start.saturating_sub(LINE_CHARS_MAX / 2).max(here.start));
        let to = source.boundary((from + LINE_CHARS_MAX).min(here.end)).max(start);
        let end = end.min(to);
        return Window {
            text: source.text[from..to].to_owned(),
            first_line: line,
            marked: start - from..end - from,
            cut_at: Some((line, column)),
        };
    }
    let before = if line > 1 { source.line(line - 1) } else { here.clone() };
    let after = if line < source.lines() { source.line(line + 1) } else { here.clone() };
    let (from, first_line) =
        if before.len() > LINE_CHARS_MAX { (here.start, line) } else { (before.start, line.max(2) - 1) };
    let to = if after.len() > LINE_CHARS_MAX { here.end } else { after.end.max(here.end) };
    Window { text: source.text[from..to].to_owned(), first_line, marked: start - from..end - from, cut_at: None }
}

fn snippet<'a>(
    source: &'a Source,
    window: &'a Window,
    label: Option<&'a str>,
) -> Snippet<'a, annotate_snippets::Annotation<'a>> {
    let annotation = AnnotationKind::Primary.span(window.marked.clone()).label(label);
    Snippet::source(window.text.as_str())
        .line_start(window.first_line)
        .path(window.cut_at.is_none().then_some(source.name.as_str()))
        .fold(false)
        .annotation(annotation)
}

fn one(diagnostics: &Diagnostics, problem: &Diagnostic, renderer: &Renderer) -> String {
    let places: Vec<(&Source, Window, Option<&str>)> = std::iter::once((problem.span, None))
        .chain(problem.notes.iter().map(|(span, text)| (*span, Some(text.as_str()))))
        .filter_map(|(span, label)| {
            let source = diagnostics.sources.get(span.source)?;
            Some((source, window(source, span), label))
        })
        .collect();
    let mut group: Group<'_> = Group::with_title(Level::ERROR.primary_title(problem.message.as_str()));
    for (source, window, label) in &places {
        if let Some((line, column)) = window.cut_at {
            group = group.element(Origin::path(source.name.as_str()).line(line).char_column(column));
        }
        group = group.element(snippet(source, window, *label));
    }
    if let Some(help) = &problem.help {
        group = group.element(Level::HELP.message(help.as_str()));
    }
    without_empty_origins(&renderer.render(&[group]))
}

/// A cut window has no path of its own, since its columns are not those of the line; its place was printed above it. The
/// renderer marks such a window with the arrow of a second file and nothing behind it.
fn without_empty_origins(text: &str) -> String {
    let is_empty = |line: &str| {
        // Colours are `ESC [ .. m`.
        let mut parts = line.split('\u{1b}');
        let first = parts.next().unwrap_or_default().to_owned();
        let rest = parts.map(|part| part.split_once('m').map_or(part, |(_, shown)| shown));
        rest.fold(first, |shown, part| shown + part).trim() == ":::"
    };
    text.split('\n').filter(|line| !is_empty(line)).collect::<Vec<_>>().join("\n")
}

/// The whole report.
pub(crate) fn render(diagnostics: &Diagnostics, colour: bool) -> String {
    let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
    let shown = diagnostics.problems.iter().take(SHOWN_MAX);
    let mut text: Vec<String> = shown.map(|problem| one(diagnostics, problem, &renderer)).collect();
    if diagnostics.problems.len() > SHOWN_MAX {
        text.push(format!("error: and {} more problems", diagnostics.problems.len() - SHOWN_MAX));
    }
    text.join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostics::Sources;

    #[test]
    fn a_problem_shows_its_place_its_line_and_its_help() {
        let mut sources = Sources::default();
        let source = sources.add(Source::new("p.yaml", "a: 1\nstage: {}\nb: 2\n", "."));
        let problem =
            Diagnostic::new(Span { source, start: 5, end: 10 }, "unknown key `stage`").help("did you mean `stages`?");
        let text = Diagnostics::new(sources, vec![problem.clone(), problem]).to_string();
        for part in ["p.yaml:2:1", "stage: {}", "^^^^^", "did you mean `stages`?"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert_eq!(text.matches("error").count(), 1, "{text}");
    }

    #[test]
    fn a_line_of_a_megabyte_is_cut_around_the_place() {
        let mut sources = Sources::default();
        let long = format!("k: [{}]", "é,".repeat(400_000));
        let source = sources.add(Source::new("p.yaml", long, "."));
        let problem = Diagnostic::new(Span { source, start: 600_001, end: 600_900 }, "bad");
        let diagnostics = Diagnostics::new(sources, vec![problem]);
        let text = diagnostics.to_string();
        assert!(text.len() < 3000, "{}", text.len());
        assert!(text.contains(" --> p.yaml:1:"), "{text}");
        // The place once, and no arrow to nowhere.
        for text in [text, diagnostics.render(true)] {
            assert!(!text.contains(":::") && text.contains("^"), "{text}");
        }
    }
}
