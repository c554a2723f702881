//! Canonical JSON: object keys in byte order at every depth, no spaces, shortest round-trip numbers. Whatever is hashed
//! is hashed in this form, so a digest does not depend on the order in which a map was filled or on the features another
//! crate turns on in `serde_json`.

use serde_json::Value;

use crate::Digest;

/// The canonical text of `value`.
///
/// ```
/// let value = serde_json::json!({"b": 1, "a": [true, {"d": null, "c": 0.1}]});
/// assert_eq!(dsv3_core::canonical_json(&value), r#"{"a":[true,{"c":0.1,"d":null}],"b":1}"#);
/// ```
pub fn canonical_json(value: &Value) -> String {
    let mut text = String::new();
    write(value, &mut text);
    text
}

/// Digest of the canonical text.
pub fn json_digest(value: &Value) -> Digest {
    Digest::of(canonical_json(value).as_bytes())
}

fn write(value: &Value, text: &mut String) {
    match value {
        Value::Array(items) => {
            text.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    text.push(',');
                }
                write(item, text);
            }
            text.push(']');
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| *key);
            text.push('{');
            for (i, (key, item)) in entries.into_iter().enumerate() {
                if i > 0 {
                    text.push(',');
                }
                text.push_str(&Value::from(key.as_str()).to_string());
                text.push(':');
                write(item, text);
            }
            text.push('}');
        }
        scalar => text.push_str(&scalar.to_string()),
    }
}
