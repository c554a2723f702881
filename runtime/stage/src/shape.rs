//! A config against the JSON Schema of its type: every problem at once, each with its path, where a deserialiser stops
//! at the first. Reads the schemas that `schemars` derives: `$ref`, `allOf`, `anyOf`, `oneOf`, `const`, `enum`, `type`,
//! `properties`, `required`, `additionalProperties`, `items`, `prefixItems`, `minimum`, `maximum` and integer formats.

use std::error::Error as _;

use dsv3_core::Error;
use serde_json::Value;

use crate::Problem;

/// Nested references deeper than this are cut, so that a recursive schema ends.
const DEPTH_MAX: usize = 32;

/// The schemas that apply to `value`: `schema` itself, what it refers to, and the matching variants.
pub(crate) fn applicable<'a>(root: &'a Value, schema: &'a Value, value: &Value) -> Vec<&'a Value> {
    let mut found = Vec::new();
    collect(root, schema, value, 0, &mut found);
    found
}

fn collect<'a>(root: &'a Value, schema: &'a Value, value: &Value, depth: usize, found: &mut Vec<&'a Value>) {
    if depth > DEPTH_MAX {
        return;
    }
    found.push(schema);
    if let Some(target) = resolve(root, schema) {
        collect(root, target, value, depth + 1, found);
    }
    for part in array(schema, "allOf") {
        collect(root, part, value, depth + 1, found);
    }
    for variant in array(schema, "anyOf").chain(array(schema, "oneOf")) {
        if fits(root, variant, value, depth) {
            collect(root, variant, value, depth + 1, found);
        }
    }
}

fn resolve<'a>(root: &'a Value, schema: &Value) -> Option<&'a Value> {
    root.pointer(schema.get("$ref")?.as_str()?.strip_prefix('#')?)
}

fn array<'a>(schema: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    schema.get(key).and_then(Value::as_array).into_iter().flatten()
}

/// The schema of the property `key`.
pub(crate) fn property<'a>(schemas: &[&'a Value], key: &str) -> Option<&'a Value> {
    let named = schemas.iter().find_map(|schema| schema.get("properties")?.get(key));
    named.or_else(|| schemas.iter().find_map(|schema| schema.get("additionalProperties").filter(|s| s.is_object())))
}

/// The schema of element `i`.
pub(crate) fn items_of<'a>(schemas: &[&'a Value], i: usize) -> Option<&'a Value> {
    let at = schemas.iter().find_map(|schema| schema.get("prefixItems")?.get(i));
    at.or_else(|| schemas.iter().find_map(|schema| schema.get("items")))
}

/// Whether `value` looks like this variant: its type, its tag, its required fields. Not whether all of it is right.
fn fits(root: &Value, schema: &Value, value: &Value, depth: usize) -> bool {
    if depth > DEPTH_MAX {
        return false;
    }
    if let Some(target) = resolve(root, schema)
        && !fits(root, target, value, depth + 1)
    {
        return false;
    }
    let variants: Vec<&Value> = array(schema, "anyOf").chain(array(schema, "oneOf")).collect();
    let one_fits = variants.is_empty() || variants.iter().any(|variant| fits(root, variant, value, depth + 1));
    let tags_fit =
        schema.get("properties").and_then(Value::as_object).into_iter().flatten().all(|(key, property)| {
            property.get("const").is_none_or(|tag| value.get(key).is_none_or(|found| found == tag))
        });
    let complete = array(schema, "required").filter_map(Value::as_str).all(|key| value.get(key).is_some());
    one_fits
        && tags_fit
        && complete
        && type_fits(schema, value)
        && schema.get("const").is_none_or(|constant| constant == value)
        && (schema.get("enum").is_none() || array(schema, "enum").any(|item| item == value))
}

fn types(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn type_fits(schema: &Value, value: &Value) -> bool {
    let types = types(schema);
    types.is_empty()
        || types.iter().any(|name| match *name {
            "null" => value.is_null(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_u64() || value.is_i64(),
            "number" => value.is_number(),
            "string" => value.is_string(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            _ => true,
        })
}

/// Collects problems against one schema document.
pub(crate) struct Checked<'a> {
    root: &'a Value,
    problems: Vec<Problem>,
}

impl<'a> Checked<'a> {
    pub(crate) fn new(root: &'a Value) -> Self {
        Self { root, problems: Vec::new() }
    }

    pub(crate) fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    fn push(&mut self, path: &str, message: String, help: Option<String>) {
        self.problems.push(Problem { path: path.to_owned(), message, help });
    }

    pub(crate) fn check(&mut self, schema: &'a Value, value: &Value, path: &str) {
        let schemas = applicable(self.root, schema, value);
        for schema in &schemas {
            let variants: Vec<&Value> = array(schema, "anyOf").chain(array(schema, "oneOf")).collect();
            if !variants.is_empty() && !variants.iter().any(|variant| fits(self.root, variant, value, 0)) {
                return self.no_variant(&variants, value, path);
            }
            if !type_fits(schema, value) {
                return self.push(path, format!("{} is expected, this is {}", a_type(schema), kind_of(value)), None);
            }
            self.scalar(schema, value, path);
        }
        match value {
            Value::Object(map) => self.object(&schemas, map, path),
            Value::Array(items) => {
                for (i, item) in items.iter().enumerate() {
                    if let Some(schema) = items_of(&schemas, i) {
                        self.check(schema, item, &format!("{path}.{i}"));
                    }
                }
            }
            _ => {}
        }
    }

    fn object(&mut self, schemas: &[&'a Value], map: &serde_json::Map<String, Value>, path: &str) {
        let known =
            || schemas.iter().filter_map(|schema| schema.get("properties")?.as_object()).flat_map(|map| map.keys());
        let closed = schemas.iter().any(|schema| schema.get("additionalProperties") == Some(&Value::Bool(false)));
        for (key, item) in map {
            match property(schemas, key) {
                Some(schema) => self.check(schema, item, &format!("{path}.{key}")),
                None if closed => {
                    let help = match closest(key, known()) {
                        Some(name) => format!("did you mean {name}?"),
                        None => format!("known fields: {}", known().cloned().collect::<Vec<_>>().join(", ")),
                    };
                    self.push(&format!("{path}.{key}"), format!("there is no field {key}"), Some(help));
                }
                None => {}
            }
        }
        for key in schemas.iter().flat_map(|schema| array(schema, "required")).filter_map(Value::as_str) {
            if !map.contains_key(key) {
                self.push(path, format!("the field {key} is missing"), None);
            }
        }
    }

    fn scalar(&mut self, schema: &Value, value: &Value, path: &str) {
        let allowed: Vec<&Value> = array(schema, "enum").chain(schema.get("const")).collect();
        if !allowed.is_empty() && !allowed.contains(&value) {
            return self.push(path, format!("{value} is not one of {}", list(&allowed)), None);
        }
        let Some(number) = value.as_f64() else { return };
        let (low, high) = bounds(schema);
        if low.is_some_and(|low| number < low) || high.is_some_and(|high| number > high) {
            let range = match (low, high) {
                (Some(low), Some(high)) => format!("{low} to {high}"),
                (Some(low), None) => format!("{low} or more"),
                (_, high) => format!("{} or less", high.unwrap_or(f64::INFINITY)),
            };
            self.push(path, format!("{value} is out of range: {range}"), None);
        }
    }

    /// No variant fits: says what there is, or what the one meant by its tag lacks.
    fn no_variant(&mut self, variants: &[&'a Value], value: &Value, path: &str) {
        let mut names = Vec::new();
        for variant in variants {
            let variant = resolve(self.root, variant).unwrap_or(variant);
            let tag = variant.get("properties").and_then(Value::as_object).and_then(|properties| {
                properties.iter().find_map(|(key, property)| Some((key, property.get("const")?)))
            });
            match tag {
                Some((key, tag)) if value.get(key) == Some(tag) => return self.check(variant, value, path),
                Some((key, tag)) => names.push(format!("{key}: {tag}")),
                None if variant.get("type") == Some(&Value::from("null")) => {}
                // The only alternative to null is what is meant.
                None if variants.len() == 2 && value.is_object() && variant.get("properties").is_some() => {
                    return self.check(variant, value, path);
                }
                None => names.push(variant_name(variant)),
            }
        }
        let shown = if value.is_object() || value.is_array() { kind_of(value).to_owned() } else { value.to_string() };
        self.push(path, format!("{shown} is not one of: {}", names.join(", ")), None);
    }
}

fn variant_name(variant: &Value) -> String {
    let constants: Vec<&Value> = array(variant, "enum").chain(variant.get("const")).collect();
    if !constants.is_empty() {
        return list(&constants);
    }
    match variant.get("required").and_then(Value::as_array).map(Vec::as_slice) {
        Some([Value::String(key)]) => format!("{{{key}: ..}}"),
        _ => a_type(variant),
    }
}

fn list(values: &[&Value]) -> String {
    values.iter().map(|value| value.to_string()).collect::<Vec<_>>().join(", ")
}

fn a_type(schema: &Value) -> String {
    let names = types(schema).into_iter().filter(|name| *name != "null").map(|name| match name {
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "a text",
        "boolean" => "true or false",
        "array" => "a list",
        "object" => "a map",
        other => other,
    });
    names.collect::<Vec<_>>().join(" or ")
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_f64() => "a fraction",
        Value::Number(_) => "a whole number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

fn bounds(schema: &Value) -> (Option<f64>, Option<f64>) {
    let of_format = match schema.get("format").and_then(Value::as_str) {
        Some("uint8") => (Some(0.0), Some(f64::from(u8::MAX))),
        Some("uint16") => (Some(0.0), Some(f64::from(u16::MAX))),
        Some("uint32") => (Some(0.0), Some(f64::from(u32::MAX))),
        Some("uint" | "uint64") => (Some(0.0), None),
        Some("int32") => (Some(f64::from(i32::MIN)), Some(f64::from(i32::MAX))),
        _ => (None, None),
    };
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    (number("minimum").or(of_format.0), number("maximum").or(of_format.1))
}

/// The known name nearest to `key`, when it is near.
fn closest<'a>(key: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    let near = known.map(|name| (edits(key, name), name.as_str())).min()?;
    (near.0 <= 2.max(key.len() / 3)).then_some(near.1)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The deserialiser's own words as a problem of the whole config.
pub(crate) fn problem_of(error: &Error) -> Problem {
    let cause = error.source().map_or_else(|| error.to_string(), |source| source.to_string());
    Problem { path: "config".to_owned(), message: cause, help: error.help.clone() }
}
