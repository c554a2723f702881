//! Reading a request's JSON field by field: unknown fields are ignored, null is absent, a bad value names its field.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Sampling noise without a seed comes from the request's number, so two equal requests differ.
pub(crate) type Seed = Option<u64>;

/// The top-level object of a request.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err(ApiError::invalid("", "the body is not a JSON object")),
            Err(error) => Err(ApiError::invalid("", format!("the body is not JSON: {error}"))),
        }
    }

    /// The value, unless it is absent or null.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A whole number in `min..=max`; `3.0` counts as whole.
    pub(crate) fn integer(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let whole = |float: f64| (float.fract() == 0.0 && (0.0..9e15).contains(&float)).then_some(float as u64);
        let number = value.as_u64().or_else(|| value.as_f64().and_then(whole));
        match number.filter(|number| (min..=max).contains(number)) {
            Some(number) => Ok(Some(number)),
            None if max == u64::MAX => Err(self.bad(name, &format!("a whole number from {min} up"))),
            None => Err(self.bad(name, &format!("a whole number from {min} to {max}"))),
        }
    }

    /// A number in `min..=max`.
    pub(crate) fn number(&self, name: &str, min: f64, max: f64) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64().filter(|number| (min..=max).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.bad(name, &format!("a number from {min} to {max}"))),
        }
    }

    /// True or false; absent is false.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(name, "true or false")),
        }
    }

    /// Text.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.bad(name, "a string"))
    }

    /// Any 64-bit integer; negative ones count too.
    pub(crate) fn seed(&self) -> Result<Seed, ApiError> {
        let Some(value) = self.get("seed") else { return Ok(None) };
        let number = value.as_u64().or_else(|| value.as_i64().map(|signed| signed as u64));
        number.map(Some).ok_or_else(|| self.bad("seed", "a whole number"))
    }

    /// `stop`: one text or up to sixteen, none empty.
    pub(crate) fn stop(&self) -> Result<Vec<String>, ApiError> {
        let wanted = "a non-empty string or an array of up to 16 of them";
        let texts: Vec<&str> = match self.get("stop") {
            None => return Ok(Vec::new()),
            Some(Value::String(text)) => vec![text],
            Some(Value::Array(list)) if list.len() <= 16 => {
                list.iter().map(|one| one.as_str().ok_or_else(|| self.bad("stop", wanted))).collect::<Result<_, _>>()?
            }
            Some(_) => return Err(self.bad("stop", wanted)),
        };
        if texts.iter().any(|text| text.is_empty()) {
            return Err(self.bad("stop", wanted));
        }
        Ok(texts.into_iter().map(str::to_owned).collect())
    }

    /// The refusal of a field's value.
    pub(crate) fn bad(&self, name: &str, wanted: &str) -> ApiError {
        let got = self.0.get(name).map_or_else(|| "nothing".to_owned(), Value::to_string);
        let got: String = if got.chars().count() > 60 { got.chars().take(60).chain(['…']).collect() } else { got };
        ApiError::invalid(name, format!("{name} must be {wanted}, not {got}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn bad_values_name_their_field() {
        let all =
            fields(r#"{"a": -1, "b": 1.5, "c": "x", "d": 3, "e": 3.0, "f": null, "seed": 0.5, "stop": ["a", ""]}"#);
        for name in ["a", "b", "c"] {
            let error = all.integer(name, 0, 9).unwrap_err();
            assert_eq!((error.param.as_deref(), error.status.as_u16()), (Some(name), 400));
        }
        assert_eq!(all.integer("d", 0, 9), Ok(Some(3)));
        assert_eq!(all.integer("e", 0, 9), Ok(Some(3)));
        assert_eq!(all.integer("f", 0, 9), Ok(None));
        assert!(all.integer("d", 4, 9).is_err() && all.number("d", 0.0, 2.0).is_err());
        assert!(all.flag("d").is_err() && all.text("d").is_err() && all.seed().is_err() && all.stop().is_err());
    }

    #[test]
    fn negative_seeds_and_single_stops_are_fine() {
        let all = fields(r#"{"seed": -3, "stop": "\n"}"#);
        assert_eq!(all.seed(), Ok(Some(-3i64 as u64)));
        assert_eq!(all.stop(), Ok(vec!["\n".to_owned()]));
    }

    #[test]
    fn only_objects_are_bodies() {
        for body in [&b"[]"[..], b"3", b"", b"{", b"\xff\xfe", b"null"] {
            assert_eq!(Fields::parse(body).err().map(|error| error.status.as_u16()), Some(400));
        }
        assert!(Fields::parse("[".repeat(100_000).as_bytes()).is_err());
    }
}
