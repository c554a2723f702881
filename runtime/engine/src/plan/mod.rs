//! The plan: everything resolved, typed and digested, as stored in `runs/<id>/plan.json`.
//!
//! A plan needs neither the YAML file nor this machine's paths beyond the `sources` of external inputs: `exec` runs any
//! stage of it from the store alone. Inputs made by other stages are references; their digests come from the results of
//! those stages, so that a stage's key is known once its upstream has finished.

pub(crate) mod hashes;
pub(crate) mod key;
mod make;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use dsv3_core::{Digest, Error, json_digest};

use dsv3_hooks::OnError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use make::make;

use crate::spec::{Floor, HookLimits, LeaseSettings, RetentionSpec};

/// First format whose plans have a `check`.
const SEALED: u64 = 2;
/// This build, as plans name it.
const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Where an input comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub enum InputRef {
    /// The output `port` of a stage of this plan.
    Stage {
        /// Its name.
        stage: String,
        /// Its output port.
        port: String,
    },
    /// Files outside the pipeline.
    External {
        /// Digest of the manifest, which is stored.
        digest: Digest,
        /// Sum of the file lengths.
        bytes: u64,
    },
}

/// One input port of a planned stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedInput {
    /// Its name.
    pub port: String,
    /// Kind of artifact it takes.
    pub kind: String,
    /// Whether the port takes a list.
    pub many: bool,
    /// What it is given.
    pub values: Vec<InputRef>,
}

/// A hook with its content digested.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedHook {
    /// Digest of the component, which is stored as a blob.
    pub digest: Digest,
    /// World it is loaded as.
    pub world: String,
    /// Its configuration.
    pub config: Value,
    /// What it may use up.
    pub limits: HookLimits,
    /// What happens when it fails on an item.
    pub on_error: OnError,
}

/// A stage with everything resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedStage {
    /// Name in the pipeline.
    pub name: String,
    /// Stage type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Semantic version of the type.
    pub version: u32,
    /// Configuration with every default written out.
    pub config: Value,
    /// Inputs by port.
    pub inputs: Vec<PlannedInput>,
    /// Name of the hook on each hook port.
    pub hooks: BTreeMap<String, String>,
    /// Floors of closing figures by metric; not part of the key.
    #[serde(default)]
    pub floors: BTreeMap<String, Floor>,
    /// Remarks on closing figures by metric; not part of the key.
    #[serde(default)]
    pub notes: BTreeMap<String, String>,
    /// Which of its checkpoints are kept; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionSpec>,
    /// What the stage says of itself before it runs, as names and values.
    #[serde(default)]
    pub facts: Vec<(String, String)>,
}

/// A pipeline ready to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this format: 2; a plan of format 1 has no `build` and no `check`.
    pub format: u32,
    /// Name of the pipeline.
    pub name: String,
    /// URL of the store.
    pub store: String,
    /// How the store is reached, as the pipeline said; credentials are never in it.
    #[serde(default, skip_serializing_if = "dsv3_store::StoreOptions::is_default")]
    pub store_options: dsv3_store::StoreOptions,
    /// Seed of everything random.
    pub seed: u64,
    /// Compute threads; the machine's cores when absent.
    pub threads: Option<usize>,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// How runners of one stage keep apart.
    #[serde(default, skip_serializing_if = "LeaseSettings::is_empty")]
    pub lease: LeaseSettings,
    /// Hooks by name.
    pub hooks: BTreeMap<String, PlannedHook>,
    /// Stages in an order in which each comes after its inputs.
    pub stages: Vec<PlannedStage>,
    /// Where the content of external files lies: digest to absolute path or URI.
    pub sources: BTreeMap<Digest, String>,
    /// Manifests of external inputs and hook components, stored when the plan is run.
    #[serde(skip)]
    pub(crate) blobs: BTreeMap<Digest, Bytes>,
}

impl Plan {
    /// Version written by this build.
    pub const FORMAT: u32 = 2;

    /// The stage called `name`.
    ///
    /// # Errors
    /// Invalid when there is none.
    pub fn stage(&self, name: &str) -> Result<&PlannedStage, Error> {
        self.stages.iter().find(|stage| stage.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.stages.iter().map(|stage| stage.name.as_str()).collect();
            let error = Error::invalid(format!("no stage of pipeline {} is called `{name}`", self.name));
            match crate::diagnostics::did_you_mean(name, names) {
                Some(help) => error.help(help),
                None => error,
            }
        })
    }

    /// Reads a stored plan, of format 1 or 2.
    ///
    /// # Errors
    /// Data when the bytes are not the plan that was written, or one of a newer build.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let unreadable = |error| Error::data("the stored plan cannot be read").source(error);
        let mut value: Value = serde_json::from_slice(bytes).map_err(unreadable)?;
        let format = value.get("format").and_then(Value::as_u64);
        // Before the fields: a newer plan may have some that this build does not know.
        if format.is_none_or(|format| format == 0) {
            return Err(Error::data("the stored plan has no format"));
        }
        if format > Some(u64::from(Self::FORMAT)) {
            return Err(newer(format.unwrap_or_default(), value.get("build").and_then(Value::as_str)));
        }
        let fields = value.as_object_mut();
        let check = fields.and_then(|fields| fields.remove("check"));
        if format >= Some(SEALED) && check.as_ref().and_then(Value::as_str) != Some(&json_digest(&value).to_string()) {
            return Err(Error::data("the stored plan is damaged: its check digest does not match"));
        }
        if let Some(fields) = value.as_object_mut() {
            fields.remove("build");
        }
        serde_json::from_value(value).map_err(unreadable)
    }

    /// Bytes for the store: the fields, the build, and `check`, the digest of both.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Maps with text keys and plain values always serialise.
        let mut value = serde_json::to_value(self).unwrap_or_default();
        let mut set = |name: &str, text: String| {
            if let Value::Object(fields) = &mut value {
                fields.insert(name.to_owned(), Value::from(text));
            }
            json_digest(&value).to_string()
        };
        let sealed = self.format >= SEALED as u32;
        if sealed {
            let check = set("build", BUILD.to_owned());
            set("check", check);
        }
        serde_json::to_vec_pretty(&value).unwrap_or_default()
    }

    /// Names of the stages that `stage` reads from, directly.
    pub(crate) fn upstream(stage: &PlannedStage) -> BTreeSet<&str> {
        let values = stage.inputs.iter().flat_map(|input| &input.values);
        values
            .filter_map(|value| match value {
                InputRef::Stage { stage, .. } => Some(stage.as_str()),
                InputRef::External { .. } => None,
            })
            .collect()
    }

    /// The named stage and everything it needs.
    pub(crate) fn ancestors(&self, name: &str) -> BTreeSet<String> {
        let mut wanted = BTreeSet::from([name.to_owned()]);
        for stage in self.stages.iter().rev() {
            if wanted.contains(&stage.name) {
                wanted.extend(Self::upstream(stage).into_iter().map(str::to_owned));
            }
        }
        wanted
    }

    /// The named stage and everything that needs it.
    pub(crate) fn descendants(&self, name: &str) -> BTreeSet<String> {
        let mut wanted = BTreeSet::from([name.to_owned()]);
        for stage in &self.stages {
            if Self::upstream(stage).iter().any(|above| wanted.contains(*above)) {
                wanted.insert(stage.name.clone());
            }
        }
        wanted
    }
}

/// A plan that this build does not read.
fn newer(format: u64, build: Option<&str>) -> Error {
    let by = build.map_or_else(|| "a newer dsv3-pipeline".to_owned(), |build| format!("dsv3-pipeline {build}"));
    let message =
        format!("the plan is of format {format}, written by {by}; this build ({BUILD}) reads up to {}", Plan::FORMAT);
    Error::data(message).help("use that version of dsv3-pipeline, or a newer one; nothing was changed")
}
