//! Sealed JSON records: the last field, `check`, is the digest of the canonical text of the others, so that a record is
//! believed only when every byte that matters is what was written.

use bytes::Bytes;
use dsv3_core::json_digest;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::error::{Result, StoreError};

/// Version of every record this build writes.
pub(crate) const FORMAT: u32 = 1;

/// The bytes of a record. `body` must serialise as a map.
pub(crate) fn seal<T: Serialize>(path: &str, body: &T) -> Result<Bytes> {
    let encode = |source| StoreError::Encode { path: path.to_owned(), source };
    let mut value = serde_json::to_value(body).map_err(encode)?;
    let check = json_digest(&value).to_string();
    if let Value::Object(map) = &mut value {
        map.insert("check".to_owned(), Value::from(check));
    }
    let mut bytes = serde_json::to_vec(&value).map_err(encode)?;
    bytes.push(b'\n');
    Ok(Bytes::from(bytes))
}

/// The body of a record, after its check and its format.
pub(crate) fn unseal<T: DeserializeOwned>(path: &str, bytes: &[u8]) -> Result<T> {
    let damaged = |problem: String| StoreError::damaged(path, problem);
    let mut value: Value =
        serde_json::from_slice(bytes).map_err(|error| damaged(format!("it is cut or no JSON: {error}")))?;
    let check = value.as_object_mut().and_then(|map| map.remove("check"));
    if check.as_ref().and_then(Value::as_str) != Some(json_digest(&value).to_string().as_str()) {
        return Err(damaged("its check digest does not match".into()));
    }
    let format = value.get("format").and_then(Value::as_u64);
    if format != Some(u64::from(FORMAT)) {
        return Err(damaged(format!("its format is {format:?}, this build reads {FORMAT}")));
    }
    serde_json::from_value(value).map_err(|error| damaged(format!("it is no record of this kind: {error}")))
}
