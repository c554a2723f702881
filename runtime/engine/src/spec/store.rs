//! The store of a pipeline: its URL, or a map of its URL and options.

use dsv3_store::StoreOptions;

use super::{
    fields::{Fields, first, lacks},
    read::typed_node,
};
use crate::{
    diagnostics::{Diagnostic, Diagnostics, Source, Sources, Span, list},
    spec::Word,
    yaml::{Node, Value, read_argument},
};

/// Reads `store:`; nothing when it is neither form.
pub(super) fn read(fields: &mut Fields<'_>, node: &Node, at: Span) -> Option<(String, StoreOptions)> {
    let Some(entries) = node.entries() else {
        let url = fields.text(node, at, "`store`")?;
        scheme(fields, &url);
        return Some((url.text, StoreOptions::default()));
    };
    let url = match first(entries, "url") {
        Some(url) => fields.text(&url.value, url.key_span, "`url`"),
        None => {
            if lacks(entries, "url", &["url"]) {
                fields
                    .problems
                    .push(Diagnostic::new(at, "`store` lacks `url`").help("for example `url: s3://bucket/runs`"));
            }
            None
        }
    };
    let mut rest = node.clone();
    if let Value::Map(entries) = &mut rest.value {
        entries.retain(|entry| entry.key != "url");
    }
    let options: Option<StoreOptions> = typed_node(fields, rest, at, "store", "the pipeline");
    let (url, options) = (url?, options?);
    scheme(fields, &url);
    if let Err(error) = dsv3_store::check_options(&url.text, &options) {
        fields.problem(url.span, error.to_string());
    }
    Some((url.text, options))
}

fn scheme(fields: &mut Fields<'_>, store: &Word) {
    const SCHEMES: [&str; 5] = ["file", "memory", "s3", "gs", "az"];
    // A plain path is a folder, as on the command line.
    let scheme = store.text.split_once("://").map(|(scheme, _)| scheme);
    if scheme.is_some_and(|scheme| !SCHEMES.contains(&scheme)) || store.text.is_empty() {
        let problem = Diagnostic::new(store.span, format!("`{}` is not the URL of a store", store.text));
        fields.problems.push(problem.help(format!("schemes: {}; `file://./runs` is a folder here", list(SCHEMES))));
    }
}

/// Whether a `--store` is a map rather than a URL.
pub(crate) fn is_map(text: &str) -> bool {
    text.trim_start().starts_with('{')
}

/// Reads a `--store`: a URL as it is, or a map in braces.
///
/// # Errors
/// The problems of a map, each at its place.
pub(crate) fn parse(text: &str) -> Result<(String, StoreOptions), Diagnostics> {
    if !is_map(text) {
        return Ok((text.to_owned(), StoreOptions::default()));
    }
    let mut sources = Sources::default();
    let index = sources.add(Source::new(format!("--store {text}"), text.to_owned(), ""));
    let (node, mut problems) = match sources.get(index) {
        Some(source) => read_argument(index, source, 0),
        None => (Node::new(Value::Unknown, Span::default()), Vec::new()),
    };
    let at = node.span;
    match read(&mut Fields { problems: &mut problems }, &node, at) {
        Some(store) if problems.is_empty() => Ok(store),
        _ => Err(Diagnostics::new(sources, problems)),
    }
}
