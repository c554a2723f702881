//! How a store is reached and how hard it is tried: what YAML says in `store: { url: .., .. }`.
//!
//! Nothing here is a secret: credentials come from the environment, as the `object_store` crate documents. Nothing here
//! changes results.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StoreOptions {
    /// Address of the service where it is not the cloud's own, such as `https://minio.example:9000`. `AWS_ENDPOINT` in the
    /// environment says the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Region of an S3 bucket. `AWS_REGION` in the environment says the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Whether the bucket's name stands in the path of a request (true, the default) or in its host name.
    /// `AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true` in the environment says the latter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_style: Option<bool>,
    /// Whether requests may go over plain HTTP. `AWS_ALLOW_HTTP=true` in the environment says the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_http: Option<bool>,
    /// How often one request is tried, the first time included, while it fails in a way that passes by itself.
    #[schemars(range(min = 1, max = 100))]
    pub attempts: u32,
    /// Wait before the second attempt in milliseconds; each further wait is twice as long.
    #[schemars(range(min = 1, max = 60_000))]
    pub backoff_ms: u64,
    /// Longest wait between two attempts in milliseconds.
    #[schemars(range(min = 1, max = 600_000))]
    pub backoff_ms_max: u64,
    /// Time for one request, its body included, in seconds.
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_secs: u64,
    /// Size of the parts of an upload and of the ranges of a download in MiB; smaller objects take one request.
    #[schemars(range(min = 5, max = 1024))]
    pub part_mib: u64,
    /// Parts or ranges of one object in flight at the same time.
    #[schemars(range(min = 1, max = 64))]
    pub parallel: usize,
    /// What a run does where the store does not honour conditional create.
    pub conditional_create: ConditionalCreate,
}

/// What a run does where the store does not honour conditional create, by which of two writers exactly one wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConditionalCreate {
    /// It refuses to start.
    #[default]
    Required,
    /// It looks before it writes, with a warning at each start. You promise that never two processes work on this store
    /// at the same time.
    SingleWriter,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            path_style: None,
            allow_http: None,
            attempts: 8,
            backoff_ms: 100,
            backoff_ms_max: 5000,
            timeout_secs: 60,
            part_mib: 16,
            parallel: 8,
            conditional_create: ConditionalCreate::Required,
        }
    }
}

impl StoreOptions {
    /// Whether nothing was said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Those of a store without a network: what passes by itself passes soon.
    pub(crate) fn near() -> Self {
        Self { attempts: 4, backoff_ms: 20, backoff_ms_max: 500, ..Self::default() }
    }

    pub(crate) fn part_bytes(&self) -> u64 {
        self.part_mib << 20
    }

    /// What only a cloud store can be told.
    pub(crate) fn first_remote(&self) -> Option<&'static str> {
        let given = [
            (self.endpoint.is_some(), "endpoint"),
            (self.region.is_some(), "region"),
            (self.path_style.is_some(), "path_style"),
            (self.allow_http.is_some(), "allow_http"),
        ];
        given.iter().find_map(|(given, name)| given.then_some(*name))
    }
}
