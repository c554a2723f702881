//! How a config becomes small, for `chaos`, which runs a pipeline some thousand times.
//!
//! Each stage type lists rules in its own file. What a rule changes is told as `PATH=VALUE`, the same words that `--set`
//! takes, so that a person can read, repeat and overrule it. A rule whose field is not there changes nothing.

use serde_json::Value;

/// A field that is made small. Paths are dotted, below the stage's `config`; `*` stands for every element of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// A number, lowered to this if it is larger.
    AtMost(&'static str, u64),
    /// A field set to this JSON, whatever it was.
    Put(&'static str, &'static str),
}

/// The changes that the rules make to a config with all defaults written out: dotted path and new value.
pub(crate) fn changes(rules: &[Shrink], config: &Value) -> Vec<(String, Value)> {
    let mut changes = Vec::new();
    for rule in rules {
        let (Shrink::AtMost(path, _) | Shrink::Put(path, _)) = rule;
        let parts: Vec<&str> = path.split('.').collect();
        find(config, &parts, String::new(), &mut |at, now| {
            let value = match rule {
                Shrink::AtMost(_, most) => {
                    now.as_f64().filter(|number| *number > *most as f64).map(|_| Value::from(*most))
                }
                // Rules are written by us; one that is no JSON would change nothing.
                Shrink::Put(_, text) => serde_json::from_str(text).ok().filter(|value| value != now),
            };
            changes.extend(value.map(|value| (at, value)));
        });
    }
    changes
}

/// Calls `found` with the path and the value of each field that the parts lead to.
fn find(value: &Value, parts: &[&str], at: String, found: &mut impl FnMut(String, &Value)) {
    let Some((part, rest)) = parts.split_first() else { return found(at, value) };
    let below = |part: &str| if at.is_empty() { part.to_owned() } else { format!("{at}.{part}") };
    match value {
        Value::Array(items) if *part == "*" => {
            items.iter().enumerate().for_each(|(i, item)| find(item, rest, below(&i.to_string()), found));
        }
        Value::Object(map) => {
            if let Some(item) = map.get(*part) {
                find(item, rest, below(part), found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_change_what_is_there_and_larger() {
        let config = json!({ "steps": 600, "model": { "width": 8, "rank": null }, "tasks": [{ "n": 9 }, { "m": 1 }, { "n": 1 }] });
        let rules = [
            Shrink::AtMost("steps", 6),
            Shrink::AtMost("model.width", 32),
            Shrink::AtMost("model.rank", 4),
            Shrink::AtMost("nothing", 4),
            Shrink::AtMost("tasks.*.n", 2),
            Shrink::Put("tasks.*.m", "{\"k\": 1}"),
        ];
        let expected = [
            ("steps".to_owned(), json!(6)),
            ("tasks.0.n".to_owned(), json!(2)),
            ("tasks.1.m".to_owned(), json!({ "k": 1 })),
        ];
        assert_eq!(changes(&rules, &config), expected);
    }
}
