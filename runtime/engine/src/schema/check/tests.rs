//! The walk agrees with what serde takes, for the shapes our configuration structs have.

use schemars::JsonSchema;
use serde::Deserialize;

use super::*;
use crate::{
    diagnostics::{Source, Sources},
    yaml::read,
};

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Config {
    /// Steps to take.
    steps: u32,
    #[serde(default)]
    rate: f64,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    schedule: Option<Schedule>,
    #[serde(default)]
    phases: Vec<Phase>,
    #[serde(default)]
    dims: Option<(u8, u8)>,
    #[serde(default)]
    names: std::collections::BTreeMap<String, bool>,
    #[serde(default)]
    length: Option<Length>,
    #[serde(default)]
    one_or_many: Option<OneOrMany>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    /// Quick.
    Fast,
    /// Careful.
    Slow,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[allow(dead_code)]
enum Schedule {
    Constant { rate: f64 },
    Cosine { from: f64, to: f64 },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Phase {
    /// Tokens of it.
    tokens: u64,
    #[schemars(range(min = 1, max = 10))]
    #[serde(default)]
    width: i32,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(dead_code)]
enum Length {
    Steps(u64),
    Tokens(f64),
    Fields { a: u8 },
    All,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

fn problems(text: &str) -> Vec<String> {
    let mut sources = Sources::default();
    let index = sources.add(Source::new("p", text, "."));
    let (node, read_problems) = read(index, sources.get(index).unwrap());
    assert!(read_problems.is_empty(), "{read_problems:?}");
    let (mut node, schema) = (node.unwrap(), schemars::schema_for!(Config).to_value());
    let at = node.span;
    let found = check(&schema, &schema, &mut node, at, "config");
    let serde = serde_json::from_value::<Config>(node.to_json());
    assert_eq!(found.is_empty(), serde.is_ok(), "{found:?} {serde:?}");
    found
        .iter()
        .map(|p| format!("{} {} [{}]", sources.locate(p.span), p.message, p.help.as_deref().unwrap_or("")))
        .collect()
}

#[test]
fn a_good_value_passes_and_integral_floats_become_integers() {
    let text = "steps: 3\nrate: 1\nmode: slow\nschedule: {type: cosine, from: 1, to: 0.1}\nphases: [{tokens: 14.8e12}]\n\
                dims: [1, 2]\nnames: {a: true}\none_or_many: [x, y]\n";
    assert_eq!(problems(text), Vec::<String>::new());
    assert_eq!(problems("steps: 1\nschedule:\ndims: null\n"), Vec::<String>::new());
}

#[test]
fn every_problem_is_found_at_its_place() {
    let text = "stesp: 3\nrate: fast\nmode: quick\nschedule: {type: cosin, from: 1}\nphases:\n  - {tokens: -1}\n  - {tokenz: 1}\n  - {width: 2}\n\
                dims: [1, 300]\nnames: {a: yes}\none_or_many: {a: 1}\n";
    let found = problems(text).join("\n");
    for part in [
        "p:1:1 unknown key `stesp` in `config` [did you mean `steps`?]",
        "p:2:7 `config.rate` takes a number; this is the text \"fast\"",
        "p:3:7 `config.mode` cannot be the text \"quick\"",
        "p:4:18 `config.schedule.type` cannot be the text \"cosin\" [did you mean `cosine`?]",
        "p:6:14 `config.phases[0].tokens` is at least 0",
        "p:8:5 `config.phases[2]` lacks `tokens` [tokens: Tokens of it.]",
        "p:7:6 unknown key `tokenz`",
        "p:9:11 `config.dims[1]` is at most 255",
        "p:10:12 `config.names.a` takes true or false; this is the text \"yes\" [write `true`]",
        "p:11:14 `config.one_or_many` takes a text or a list; this is a map",
    ] {
        assert!(found.contains(part), "{part} in\n{found}");
    }
}

#[test]
fn a_misspelt_key_beside_the_right_one_is_told_its_name() {
    let found = problems("steps: 3\nstesp: 4\n");
    assert_eq!(found, ["p:2:1 unknown key `stesp` in `config` [did you mean `steps`, which is given too?]"]);
}

#[test]
fn variants_told_apart_by_their_only_key_are_checked_by_it() {
    for good in ["{steps: 1}", "{tokens: 1e6}", "all", "{fields: {a: 1}}", "null"] {
        assert_eq!(problems(&format!("steps: 1\nlength: {good}\n")), Vec::<String>::new(), "{good}");
    }
    for (bad, part) in [
        ("{stesp: 1}", "p:2:10 unknown key `stesp` in `config.length` [did you mean `steps`?]"),
        ("{steps: x}", "p:2:17 `config.length.steps` takes an integer"),
        ("{steps: 1, tokens: 2}", "p:2:20 `config.length` takes exactly one of"),
        ("{}", "p:2:1 `config.length` takes one of"),
        ("{fields: {b: 1}}", "unknown key `b` in `config.length.fields`"),
        ("al", "p:2:9 `config.length`"),
        ("7", "p:2:9 `config.length`"),
    ] {
        let found = problems(&format!("steps: 1\nlength: {bad}\n"));
        assert!(
            found.len() == 1 && found[0].starts_with(part) || found.iter().any(|f| f.contains(part)),
            "{bad}: {found:?}"
        );
    }
}
