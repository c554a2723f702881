//! Sealed JSON records: the last field, `check`, is the digest of the canonical text of the others, so that a record is
//! believed only when every byte that matters is what was written.
//!
//! Every record says its `format` and the `build` (version of this program) that wrote it. A build reads all formats up
//! to its own newest; a newer one is refused by name, with the build to use, and never taken for damage.

use bytes::Bytes;
use dsv3_core::json_digest;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::error::{Result, StoreError};

/// Version of every record this build writes, except where a module has a newer one of its own.
pub(crate) const FORMAT: u32 = 1;
/// Newest version of any record that this build reads.
pub(crate) const NEWEST: u32 = 2;
/// This build, as records name it.
const BUILD: &str = env!("CARGO_PKG_VERSION");

/// The bytes of a record. `body` must serialise as a map.
pub(crate) fn seal<T: Serialize>(path: &str, body: &T) -> Result<Bytes> {
    let encode = |source| StoreError::Encode { path: path.to_owned(), source };
    let mut value = serde_json::to_value(body).map_err(encode)?;
    if let Value::Object(map) = &mut value {
        map.insert("build".to_owned(), Value::from(BUILD));
    }
    let check = json_digest(&value).to_string();
    if let Value::Object(map) = &mut value {
        map.insert("check".to_owned(), Value::from(check));
    }
    let mut bytes = serde_json::to_vec(&value).map_err(encode)?;
    bytes.push(b'\n');
    Ok(Bytes::from(bytes))
}

/// The first line of a text of many lines, with the digest of the `rest`.
pub(crate) fn header_line(rest: &[u8]) -> Vec<u8> {
    let check = dsv3_core::Digest::of(rest);
    format!("{{\"build\":\"{BUILD}\",\"check\":\"{check}\",\"format\":{FORMAT}}}\n").into_bytes()
}

/// The body of a record of format 1, after its check and its format.
pub(crate) fn unseal<T: DeserializeOwned>(path: &str, bytes: &[u8]) -> Result<T> {
    unseal_up_to(FORMAT, path, bytes)
}

/// The body of a record of any format from 1 to `newest`.
pub(crate) fn unseal_up_to<T: DeserializeOwned>(newest: u32, path: &str, bytes: &[u8]) -> Result<T> {
    let damaged = |problem: String| StoreError::damaged(path, problem);
    let mut value: Value =
        serde_json::from_slice(bytes).map_err(|error| damaged(format!("it is cut or no JSON: {error}")))?;
    let check = value.as_object_mut().and_then(|map| map.remove("check"));
    if check.as_ref().and_then(Value::as_str) != Some(json_digest(&value).to_string().as_str()) {
        return Err(damaged("its check digest does not match".into()));
    }
    check_format(&value, u64::from(newest), path)?;
    serde_json::from_value(value).map_err(|error| damaged(format!("it is no record of this kind: {error}")))
}

/// Refuses a format that this build does not read.
pub(crate) fn check_format(value: &Value, newest: u64, path: &str) -> Result<()> {
    match value.get("format").and_then(Value::as_u64) {
        Some(format) if format > newest => {
            let build = value.get("build").and_then(Value::as_str).map(str::to_owned);
            Err(StoreError::Newer { path: path.to_owned(), format, newest, build })
        }
        Some(format) if format >= 1 => Ok(()),
        other => Err(StoreError::damaged(path, format!("its format is {other:?}, this build reads 1 to {newest}"))),
    }
}

impl crate::Store {
    /// The body of any sealed record of this store, whatever it is about; `path` is where it lies.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Newer`].
    pub fn open_record(&self, path: &str, bytes: &[u8]) -> Result<Value> {
        unseal_up_to(NEWEST, &self.display_path(path), bytes)
    }

    /// Creates `folder/<number>.json`, the next free number, with a sealed record; answers its path.
    ///
    /// # Errors
    /// When the store refuses, or `body` is no map.
    pub async fn add_record<T: Serialize>(&self, folder: &str, body: &T) -> Result<String> {
        let names = self.list(folder).await?;
        let last = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse::<u64>().ok()).max();
        let mut number = last.unwrap_or(0) + 1;
        loop {
            let path = format!("{folder}/{number:08}.json");
            match self.create(&path, seal(&path, body)?).await? {
                crate::Create::Created => return Ok(path),
                crate::Create::AlreadyExists => number += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_record_of_the_future_is_refused_with_the_build_to_use_and_is_no_damage() {
        let bytes = seal("p", &json!({ "format": 3 })).unwrap();
        // As another build would write it.
        let mut value: Value = serde_json::from_slice(&bytes).unwrap();
        value["build"] = json!("9.4.0");
        value.as_object_mut().unwrap().remove("check");
        let check = json_digest(&value).to_string();
        value["check"] = json!(check);
        let error = unseal_up_to::<Value>(2, "p", &serde_json::to_vec(&value).unwrap()).unwrap_err();
        assert!(matches!(error, StoreError::Newer { format: 3, newest: 2, .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("format 3, written by dsv3-pipeline 9.4.0") && said.contains("reads up to 2"), "{said}");
        let folded = dsv3_core::Error::from(error);
        assert!(folded.help.unwrap().contains("use that version of dsv3-pipeline, or a newer one"));
        assert!(unseal::<Value>("p", &seal("p", &json!({ "format": 1 })).unwrap()).is_ok());
        for bad in [json!({ "format": 0 }), json!({ "format": "1" }), json!({})] {
            let error = unseal::<Value>("p", &seal("p", &bad).unwrap()).unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        }
    }
}
