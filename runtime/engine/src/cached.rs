//! Is a stage finished? Its key from what its upstream left behind, its result from the store, and whether everything
//! the result names is still there. A result that is not whole is said so, never used.

use std::collections::BTreeMap;

use dsv3_core::{ArtifactRef, Digest, Error};
use dsv3_stage::StageEntry;
use dsv3_store::{StageResult, Store, StoreError};
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;

use crate::plan::{InputRef, Plan, PlannedStage, key::KeyRecord};

/// Objects looked at at the same time.
const PARALLEL_LOOKS: usize = 16;

/// Artifacts by input port.
pub(crate) type Inputs = BTreeMap<String, Vec<ArtifactRef>>;

/// What the store holds for a key.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Found {
    /// A whole result.
    Whole(StageResult),
    /// A result that cannot be used, and why.
    Broken(String),
    /// No result.
    Nothing,
}

/// The artifacts of a stage's inputs, once every upstream stage has a result; else the name of one that has none.
pub(crate) fn inputs(stage: &PlannedStage, results: &BTreeMap<String, StageResult>) -> Result<Inputs, Missing> {
    let mut inputs = Inputs::new();
    for input in &stage.inputs {
        let artifacts = inputs.entry(input.port.clone()).or_default();
        for value in &input.values {
            match value {
                InputRef::External { digest, .. } => {
                    artifacts.push(ArtifactRef { kind: input.kind.clone(), digest: *digest });
                }
                InputRef::Stage { stage: from, port } => {
                    let result = results.get(from).ok_or_else(|| Missing::Stage(from.clone()))?;
                    let many = format!("{port}[");
                    let entries = result.outputs.iter().filter(|o| o.name == *port || o.name.starts_with(&many));
                    let found: Vec<ArtifactRef> =
                        entries.map(|o| ArtifactRef { kind: o.kind.clone(), digest: o.digest }).collect();
                    if found.is_empty() && !input.many {
                        return Err(Missing::Output(from.clone(), port.clone()));
                    }
                    artifacts.extend(found);
                }
            }
        }
    }
    Ok(inputs)
}

/// Why the inputs of a stage are not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// This stage has no result.
    Stage(String),
    /// This stage finished without this output.
    Output(String, String),
}

/// The key record of a stage whose inputs are known.
pub(crate) fn key_record(
    plan: &Plan,
    stage: &PlannedStage,
    entry: &StageEntry,
    inputs: &Inputs,
) -> Result<KeyRecord, Error> {
    let mut hooks = BTreeMap::new();
    for (port, name) in &stage.hooks {
        let hook = plan.hooks.get(name).ok_or_else(|| Error::data(format!("the plan lacks hook `{name}`")))?;
        hooks.insert(port.as_str(), hook);
    }
    let config = entry.key_config(&stage.config)?;
    Ok(KeyRecord::new(&stage.kind, stage.version, &config, inputs, &hooks, plan.seed))
}

/// A profile mark as it is stored.
pub(crate) fn with_format(mut profile: Value) -> Value {
    if let Value::Object(map) = &mut profile {
        map.insert("format".to_owned(), Value::from(1));
    }
    profile
}

/// The profile of a stored mark; marks were once written without a format.
pub(crate) fn without_format(mut mark: Value) -> Value {
    if let Value::Object(map) = &mut mark {
        map.remove("format");
    }
    mark
}

/// Looks for the result of `key`.
pub(crate) async fn find(store: &Store, plan: &Plan, key: Digest) -> Result<Found, Error> {
    let result = match store.read_result(&key.to_string()).await {
        Ok(Some(result)) => result,
        Ok(None) => return Ok(Found::Nothing),
        Err(error @ StoreError::Damaged { .. }) => return Ok(Found::Broken(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    for output in &result.outputs {
        let manifest = match store.manifest(output.digest).await {
            Ok(manifest) => manifest,
            Err(error @ (StoreError::Damaged { .. } | StoreError::Missing { .. })) => {
                return Ok(Found::Broken(format!("output `{}`: {error}", output.name)));
            }
            Err(error) => return Err(error.into()),
        };
        let looks = manifest.files.iter().filter(|file| !plan.sources.contains_key(&file.digest)).map(async |file| {
            let path = format!("blobs/{}", file.digest);
            let broken = match store.length(&path).await? {
                Some(_) if store.is_damaged(file.digest) => Some("has other bytes than were written".to_owned()),
                Some(bytes) if bytes == file.bytes => None,
                Some(bytes) => Some(format!("has {bytes} bytes instead of {}", file.bytes)),
                None => Some("is gone".to_owned()),
            };
            Ok::<_, StoreError>(broken.map(|why| format!("{} ({}) {why}", store.display_path(&path), file.path)))
        });
        let broken: Vec<Option<String>> =
            futures::stream::iter(looks).buffered(PARALLEL_LOOKS).try_collect().await.map_err(Error::from)?;
        if let Some(why) = broken.into_iter().flatten().next() {
            return Ok(Found::Broken(format!("output `{}`: {why}", output.name)));
        }
    }
    Ok(Found::Whole(result))
}

/// An output of a result of which this process has read bytes that are not what was written.
pub(crate) async fn seen_damaged(store: &Store, result: &StageResult) -> Result<Option<String>, Error> {
    for output in &result.outputs {
        let files = match store.manifest(output.digest).await {
            Ok(manifest) => manifest.files,
            Err(error @ (StoreError::Damaged { .. } | StoreError::Missing { .. })) => {
                return Ok(Some(format!("output `{}`: {error}", output.name)));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(file) = files.iter().find(|file| store.is_damaged(file.digest)) {
            let path = store.display_path(&format!("blobs/{}", file.digest));
            return Ok(Some(format!("output `{}`: {path} ({})", output.name, file.path)));
        }
    }
    Ok(None)
}
