//! Stage keys: the digest of everything that changes a stage's result.
//!
//! ```text
//! key = BLAKE3(canonical JSON of { format, type, version, config, inputs, hooks, seed })
//! ```
//!
//! `config` holds the semantic fields only; `inputs` the manifest digest of each artifact by port; `hooks` the digest,
//! world, configuration, policy and result-changing limits by hook port. The name of the stage is not part of it: two
//! stages that do the same share one result. The record itself is stored as `stages/<key>/key.json`, for `explain`.

use std::collections::BTreeMap;

use dsv3_core::{ArtifactRef, Digest, canonical_json, json_digest};
use serde_json::{Map, Value, json};

use super::PlannedHook;

/// Version of the record; a change makes every key new.
const FORMAT: u32 = 1;

/// Everything a key is made of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KeyRecord(Value);

impl KeyRecord {
    /// The record of a stage whose inputs are known.
    pub(crate) fn new(
        kind: &str,
        version: u32,
        semantic_config: &Value,
        inputs: &BTreeMap<String, Vec<ArtifactRef>>,
        hooks: &BTreeMap<&str, &PlannedHook>,
        seed: u64,
    ) -> Self {
        let hooks: Map<String, Value> = hooks
            .iter()
            .map(|(port, hook)| {
                let value = json!({
                    "digest": hook.digest,
                    "world": hook.world,
                    "config": hook.config,
                    "on_error": hook.on_error,
                    // A deadline never changes a result: reaching it fails the stage.
                    "limits": { "memory_mb": hook.limits.memory_mb, "fuel": hook.limits.fuel },
                    "capabilities": [],
                });
                ((*port).to_owned(), value)
            })
            .collect();
        let record = json!({
            "format": FORMAT,
            "type": kind,
            "version": version,
            "config": semantic_config,
            "inputs": inputs,
            "hooks": hooks,
            "seed": seed,
        });
        Self(record)
    }

    /// The record stored beside a result.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().map(Self)
    }

    /// A record put together elsewhere, for comparison only.
    pub(crate) fn from_value(value: Value) -> Self {
        Self(value)
    }

    /// Its fields.
    pub(crate) fn value(&self) -> &Value {
        &self.0
    }

    /// Canonical bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        canonical_json(&self.0).into_bytes()
    }

    /// The key.
    pub(crate) fn key(&self) -> Digest {
        json_digest(&self.0)
    }

    /// What differs from `before`, one line per field: `config.steps: 600 -> 10`.
    pub(crate) fn differences(&self, before: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        compare("", Some(&before.0), Some(&self.0), &mut lines);
        lines
    }
}

fn compare(path: &str, before: Option<&Value>, now: Option<&Value>, lines: &mut Vec<String>) {
    if before == now {
        return;
    }
    if let (Some(Value::Object(a)), Some(Value::Object(b))) = (before, now) {
        let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        for name in names {
            let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            compare(&below, a.get(name), b.get(name), lines);
        }
        return;
    }
    if let (Some(Value::Array(a)), Some(Value::Array(b))) = (before, now) {
        for i in 0..a.len().max(b.len()) {
            compare(&format!("{path}[{i}]"), a.get(i), b.get(i), lines);
        }
        return;
    }
    let show = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), |value| shorten(&value.to_string()));
    lines.push(format!("{path}: {} -> {}", show(before), show(now)));
}

fn shorten(text: &str) -> String {
    let inner = text.trim_matches('"');
    if inner.len() == 64 && inner.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return inner[..12].to_owned();
    }
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(config: Value, seed: u64) -> KeyRecord {
        let artifact = ArtifactRef { kind: "tokens".to_owned(), digest: Digest::of(b"x") };
        let inputs = BTreeMap::from([("tokens".to_owned(), vec![artifact])]);
        KeyRecord::new("count", 1, &config, &inputs, &BTreeMap::new(), seed)
    }

    #[test]
    fn keys_depend_on_content_and_not_on_the_order_of_fields() {
        let a = record(serde_json::from_str(r#"{"a":1,"b":{"c":2,"d":3}}"#).unwrap(), 7);
        let b = record(serde_json::from_str(r#"{"b":{"d":3,"c":2},"a":1}"#).unwrap(), 7);
        assert_eq!(a.key(), b.key());
        assert_ne!(a.key(), record(json!({"a": 1}), 7).key());
        assert_eq!(KeyRecord::from_bytes(&a.to_bytes()).unwrap(), a);
        // A change of this digest makes every stored result useless.
        assert_eq!(a.key().to_string(), "cf08e5bdb80692ff67160ed852cd1965bc23eca18572a520ff0a211f3cd531a2");
    }

    #[test]
    fn differences_name_each_field() {
        let lines =
            record(json!({"a": 1, "b": [1, 2]}), 7).differences(&record(json!({"a": 2, "b": [1], "c": null}), 8));
        assert_eq!(lines, ["config.a: 2 -> 1", "config.b[1]: absent -> 2", "config.c: null -> absent", "seed: 8 -> 7"]);
    }
}
