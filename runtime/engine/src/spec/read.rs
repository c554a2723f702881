//! The tree to [`Written`]: fields, names and shapes, without looking anything up.

use super::{
    HookLimits, HookSpec, InputSpec, LeaseSettings, LoadOptions, RetentionSpec, StageSpec, Word, Written,
    fields::{Fields, first, lacks},
    store,
};
use crate::{
    diagnostics::{Diagnostic, Span},
    schema,
    yaml::{Entry, Node, Value},
};

const ROOT_KEYS: [&str; 11] =
    ["version", "name", "params", "store", "seed", "threads", "device", "lease", "retention", "hooks", "stages"];
const STAGE_KEYS: [&str; 7] = ["type", "inputs", "hooks", "config", "floors", "notes", "retention"];
const HOOK_KEYS: [&str; 5] = ["wasm", "world", "config", "limits", "on_error"];

pub(super) fn written(
    root: &Node,
    default_name: String,
    options: &LoadOptions,
    problems: &mut Vec<Diagnostic>,
) -> Option<Written> {
    let mut fields = Fields { problems };
    let top = Span { end: root.span.start, ..root.span };
    let entries = fields.map(root, root.span, "a pipeline", &ROOT_KEYS);
    root.entries()?;
    version(&mut fields, entries, top);
    let name = first(entries, "name").and_then(|entry| fields.text(&entry.value, entry.key_span, "`name`"));
    let (store, store_options) = match (&options.store, first(entries, "store")) {
        // One that is replaced need not be good.
        (Some(url), _) if !store::is_map(url) => (Some(url.clone()), None),
        (_, Some(entry)) => store::read(&mut fields, &entry.value, entry.key_span).unzip(),
        (_, None) => (None, None),
    };
    if let Some(params) = first(entries, "params") {
        fields.open_map(&params.value, params.key_span, "`params`");
    }
    let seed = first(entries, "seed")
        .and_then(|entry| fields.integer(&entry.value, entry.key_span, "`seed`", 0, u64::MAX.into()));
    let threads =
        first(entries, "threads").and_then(|entry| fields.integer(&entry.value, entry.key_span, "`threads`", 1, 4096));
    let device = first(entries, "device").and_then(|entry| fields.text(&entry.value, entry.key_span, "`device`"));
    let lease: LeaseSettings = typed(&mut fields, entries, "lease", "the pipeline").unwrap_or_default();
    if let (Some(problem), Some(entry)) = (lease.problem(), first(entries, "lease")) {
        fields.problem(entry.key_span, problem);
    }
    let hooks =
        named(&mut fields, entries, "hooks", "hook").iter().filter_map(|entry| hook(&mut fields, entry)).collect();
    let mut stages: Vec<StageSpec> =
        named(&mut fields, entries, "stages", "stage").iter().filter_map(|entry| stage(&mut fields, entry)).collect();
    let retention: Option<RetentionSpec> = typed(&mut fields, entries, "retention", "the pipeline");
    if let Some(retention) = &retention {
        for stage in stages.iter_mut().filter(|stage| stage.retention.is_none()) {
            stage.retention = Some(retention.clone());
        }
    }
    if lacks(entries, "stages", &ROOT_KEYS) {
        fields.problem(top, "a pipeline has `stages`");
    }
    Some(Written {
        name: name.map_or(default_name, |name| name.text),
        store: store.unwrap_or_else(|| "file://./runs".to_owned()),
        store_options: store_options.unwrap_or_default(),
        seed: seed.unwrap_or(0) as u64,
        threads: options.threads.or(threads.map(|threads| threads as usize)),
        lease,
        device: device.unwrap_or_else(|| Word { text: "cpu".to_owned(), span: top, origin: top.source }),
        hooks,
        stages,
    })
}

fn version(fields: &mut Fields<'_>, entries: &[Entry], top: Span) {
    match first(entries, "version") {
        None if lacks(entries, "version", &ROOT_KEYS) => {
            fields.problems.push(Diagnostic::new(top, "a pipeline says its `version`").help("add `version: 1`"));
        }
        Some(entry) if !matches!(entry.value.value, Value::Int(1) | Value::Unknown) => {
            let message = format!("this build reads `version: 1`; this is {}", entry.value.describe());
            fields.problem(entry.value.span, message);
        }
        _ => {}
    }
}

/// The named entries under `key`, both copies of a repeated name included; bad names are reported.
fn named<'n>(fields: &mut Fields<'_>, entries: &'n [Entry], key: &str, what: &str) -> &'n [Entry] {
    let Some(entry) = first(entries, key) else { return &[] };
    let named = fields.open_map(&entry.value, entry.key_span, &format!("`{key}`"));
    for entry in named {
        let mut chars = entry.key.chars();
        let good = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
            && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if !good || entry.key.len() > 64 {
            let message = format!("a {what}'s name is a letter and then letters, digits, `_` or `-`, 64 at most");
            fields.problem(entry.key_span, message);
        }
    }
    named
}

fn word(entry: &Entry) -> Word {
    Word { text: entry.key.clone(), span: entry.key_span, origin: entry.key_span.source }
}

fn hook(fields: &mut Fields<'_>, entry: &Entry) -> Option<HookSpec> {
    let what = format!("hook `{}`", entry.key);
    let entries = fields.map(&entry.value, entry.key_span, &what, &HOOK_KEYS);
    for key in ["wasm", "world"] {
        if lacks(entries, key, &HOOK_KEYS) {
            fields.problem(entry.key_span, format!("{what} lacks `{key}`"));
        }
    }
    let mut text = |key: &str| first(entries, key).and_then(|e| fields.text(&e.value, e.key_span, &format!("`{key}`")));
    let (wasm, world) = (text("wasm"), text("world"));
    let (config, config_span) = match first(entries, "config") {
        Some(config) => {
            fields.open_map(&config.value, config.key_span, "`config` of a hook");
            (config.value.to_json(), config.key_span)
        }
        None => (serde_json::json!({}), entry.key_span),
    };
    let limits: Option<HookLimits> = typed(fields, entries, "limits", &what);
    let on_error = typed(fields, entries, "on_error", &what);
    Some(HookSpec {
        name: word(entry),
        wasm: wasm?,
        world: world?,
        config,
        config_span,
        limits: limits.unwrap_or_default(),
        on_error: on_error.unwrap_or_default(),
    })
}

/// A field whose type has a JSON Schema; absent or wrong is `None`, wrong is reported.
fn typed<T: serde::de::DeserializeOwned + schemars::JsonSchema>(
    fields: &mut Fields<'_>,
    entries: &[Entry],
    key: &str,
    what: &str,
) -> Option<T> {
    let entry = first(entries, key)?;
    typed_node(fields, entry.value.clone(), entry.key_span, key, what)
}

/// A value whose type has a JSON Schema; `at` is where its key stands.
pub(super) fn typed_node<T: serde::de::DeserializeOwned + schemars::JsonSchema>(
    fields: &mut Fields<'_>,
    mut node: Node,
    at: Span,
    key: &str,
    what: &str,
) -> Option<T> {
    let (root, span) = (schemars::schema_for!(T).to_value(), node.span);
    let found = schema::check(&root, &root, &mut node, at, key);
    if !found.is_empty() {
        fields.problems.extend(found);
        return None;
    }
    match serde_json::from_value(node.to_json()) {
        Ok(value) => Some(value),
        Err(error) => {
            fields.problem(span, format!("`{key}` of {what}: {error}"));
            None
        }
    }
}

fn stage(fields: &mut Fields<'_>, entry: &Entry) -> Option<StageSpec> {
    let what = format!("stage `{}`", entry.key);
    let entries = fields.map(&entry.value, entry.key_span, &what, &STAGE_KEYS);
    let kind = match first(entries, "type") {
        Some(kind) => fields.text(&kind.value, kind.key_span, "`type`"),
        None => {
            if lacks(entries, "type", &STAGE_KEYS) {
                fields.problem(entry.key_span, format!("{what} lacks `type`"));
            }
            None
        }
    };
    let mut inputs = Vec::new();
    if let Some(node) = first(entries, "inputs") {
        for input in fields.open_map(&node.value, node.key_span, "`inputs`") {
            let items: &[Node] = match &input.value.value {
                Value::List(items) => items,
                _ => std::slice::from_ref(&input.value),
            };
            let what = format!("input `{}`", input.key);
            let values: Vec<Word> = items.iter().filter_map(|item| fields.text(item, input.key_span, &what)).collect();
            if items.is_empty() {
                fields.problem(input.value.span, format!("{what} of {} is an empty list", entry.key));
            }
            inputs.push(InputSpec { port: word(input), values });
        }
    }
    let mut hooks = Vec::new();
    if let Some(node) = first(entries, "hooks") {
        for hook in fields.open_map(&node.value, node.key_span, "`hooks` of a stage") {
            if let Some(name) = fields.text(&hook.value, hook.key_span, "the name of a hook") {
                hooks.push((word(hook), name));
            }
        }
    }
    let floors = typed(fields, entries, "floors", &what).unwrap_or_default();
    let notes = typed(fields, entries, "notes", &what).unwrap_or_default();
    let retention = typed(fields, entries, "retention", &what);
    let empty = Node::new(Value::Map(Vec::new()), entry.key_span);
    let (config, config_span) = match first(entries, "config") {
        Some(config) => {
            fields.open_map(&config.value, config.key_span, "`config`");
            let map = config.value.entries().is_some();
            (if map { config.value.clone() } else { empty }, config.key_span)
        }
        None => (empty, entry.key_span),
    };
    Some(StageSpec { name: word(entry), kind: kind?, inputs, hooks, floors, notes, config, config_span, retention })
}
