//! Which config fields enter the stage key. A field's class is the extension `x-key` of its schema, inherited by what
//! lies below it: none or `semantic` changes the result; `performance` never does; `numerics` (device, precision path,
//! micro-batch) changes bits but not meaning and is recorded as the profile of a result.

use serde_json::{Map, Value};

use crate::shape::{applicable, items_of, property};

/// Class of a config field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyClass {
    /// Changes the result; in the key.
    Semantic,
    /// Never changes the result; nowhere.
    Performance,
    /// Changes bits only; in the profile.
    Numerics,
}

impl KeyClass {
    fn of(schema: &Value) -> Option<Self> {
        match schema.get("x-key")?.as_str()? {
            "performance" => Some(Self::Performance),
            "numerics" => Some(Self::Numerics),
            _ => Some(Self::Semantic),
        }
    }
}

/// The part of `config` whose fields are of class `wanted`; an empty map when there is none.
pub(crate) fn project(root: &Value, config: &Value, wanted: KeyClass) -> Value {
    part(root, root, config, KeyClass::Semantic, wanted).unwrap_or_else(|| Value::Object(Map::new()))
}

fn part(root: &Value, schema: &Value, value: &Value, inherited: KeyClass, wanted: KeyClass) -> Option<Value> {
    let schemas = applicable(root, schema, value);
    let class = schemas.iter().find_map(|schema| KeyClass::of(schema)).unwrap_or(inherited);
    match value {
        Value::Object(map) => {
            let kept: Map<String, Value> = map
                .iter()
                .filter_map(|(key, item)| {
                    let item = match property(&schemas, key) {
                        Some(schema) => part(root, schema, item, class, wanted),
                        None => Some(item.clone()).filter(|_| class == wanted),
                    };
                    Some((key.clone(), item?))
                })
                .collect();
            Some(Value::Object(kept))
                .filter(|kept| class == wanted || kept.as_object().is_some_and(|map| !map.is_empty()))
        }
        Value::Array(items) => {
            let kept: Vec<Value> = items
                .iter()
                .enumerate()
                .filter_map(|(i, item)| match items_of(&schemas, i) {
                    Some(schema) => part(root, schema, item, class, wanted),
                    None => Some(item.clone()).filter(|_| class == wanted),
                })
                .collect();
            (class == wanted || !kept.is_empty()).then_some(Value::Array(kept))
        }
        scalar => (class == wanted).then(|| scalar.clone()),
    }
}
