//! From a URL, options and the environment to the client of a store.
//!
//! Every variable that the `object_store` crate documents for its `from_env` counts (`AWS_..`, `GOOGLE_..`, `AZURE_..`),
//! then the variables a host hands over, then the options.

use std::{fs, io, path::PathBuf, sync::Arc};

use object_store::{
    ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    local::LocalFileSystem,
    memory::InMemory,
    multipart::MultipartStore,
    path::Path as ObjectPath,
};

use crate::{
    StoreOptions,
    error::{Result, StoreError},
    local,
};

/// What a URL leads to.
pub(crate) struct Connected {
    pub(crate) objects: Arc<dyn ObjectStore>,
    /// The same with single parts of uploads, where it has them.
    pub(crate) parts: Option<Arc<dyn MultipartStore>>,
    pub(crate) prefix: ObjectPath,
    /// Root folder of a `file://` store.
    pub(crate) local: Option<local::Root>,
}

impl Connected {
    pub(crate) fn memory() -> Self {
        let objects = Arc::new(InMemory::new());
        Self { parts: Some(objects.clone()), objects, prefix: ObjectPath::default(), local: None }
    }

    pub(crate) fn objects(objects: Arc<dyn ObjectStore>, prefix: ObjectPath) -> Self {
        Self { objects, parts: None, prefix, local: None }
    }

    fn both<T: ObjectStore + MultipartStore>(store: T, prefix: ObjectPath) -> Self {
        let objects = Arc::new(store);
        Self { parts: Some(objects.clone()), objects, prefix, local: None }
    }
}

fn split(url: &str) -> (&str, &str) {
    url.split_once("://").unwrap_or(("file", url))
}

/// Whether a store of this scheme has all the options that were given.
///
/// # Errors
/// [`StoreError::Url`] with the name of one that it does not have.
pub fn check_options(url: &str, options: &StoreOptions) -> Result<()> {
    let (scheme, _) = split(url);
    let foreign = match scheme {
        "file" | "memory" => options.first_remote(),
        "s3" | "s3a" => None,
        _ => options.region.as_ref().map(|_| "region").or(options.path_style.map(|_| "path_style")),
    };
    let problem = |option| format!("a {scheme}:// store has no `{option}`");
    foreign.map_or(Ok(()), |option| Err(StoreError::Url { url: url.to_owned(), problem: problem(option) }))
}

/// Connects; cloud clients send nothing yet. `vars` count like the environment, and before it.
pub(crate) fn connect(url: &str, options: &StoreOptions, vars: &[(String, String)]) -> Result<Connected> {
    check_options(url, options)?;
    let bad = |problem: String| StoreError::Url { url: url.to_owned(), problem };
    let (scheme, rest) = split(url);
    match scheme {
        "file" => return open_folder(url, rest),
        "memory" => return Ok(Connected::memory()),
        _ => {}
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(bad("it names no bucket".into()));
    }
    let prefix = ObjectPath::parse(prefix.trim_end_matches('/')).map_err(|error| bad(error.to_string()))?;
    let root = format!("{scheme}://{bucket}");
    let connected = match scheme {
        "s3" | "s3a" => s3(&root, options, vars).map(|store| Connected::both(store, prefix)),
        "gs" => gcs(&root, options, vars).map(|store| Connected::both(store, prefix)),
        "az" | "azure" | "abfs" | "abfss" => azure(&root, options, vars).map(|store| Connected::both(store, prefix)),
        other => return Err(bad(format!("the scheme {other} is unknown"))),
    };
    connected.map_err(|error| bad(error.to_string()))
}

/// Ours is the only retry.
fn no_retry() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// Client options that were given, in the words of the crate.
fn client(options: &StoreOptions) -> Vec<(ClientConfigKey, String)> {
    let mut pairs = vec![(ClientConfigKey::Timeout, format!("{}s", options.timeout_secs))];
    pairs.extend(options.allow_http.map(|allowed| (ClientConfigKey::AllowHttp, allowed.to_string())));
    pairs
}

/// The variables that a client knows.
fn known<K: std::str::FromStr>(vars: &[(String, String)]) -> impl Iterator<Item = (K, &str)> {
    vars.iter().filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value.as_str())))
}

fn s3(
    root: &str,
    options: &StoreOptions,
    vars: &[(String, String)],
) -> object_store::Result<object_store::aws::AmazonS3> {
    let mut builder = AmazonS3Builder::from_env();
    for (key, value) in known::<AmazonS3ConfigKey>(vars) {
        builder = builder.with_config(key, value);
    }
    for (key, value) in client(options) {
        builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(path_style) = options.path_style {
        builder = builder.with_virtual_hosted_style_request(!path_style);
    }
    builder.with_url(root).with_retry(no_retry()).build()
}

fn gcs(
    root: &str,
    options: &StoreOptions,
    vars: &[(String, String)],
) -> object_store::Result<object_store::gcp::GoogleCloudStorage> {
    let mut builder = GoogleCloudStorageBuilder::from_env();
    for (key, value) in known::<GoogleConfigKey>(vars) {
        builder = builder.with_config(key, value);
    }
    for (key, value) in client(options) {
        builder = builder.with_config(GoogleConfigKey::Client(key), value);
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    builder.with_url(root).with_retry(no_retry()).build()
}

fn azure(
    root: &str,
    options: &StoreOptions,
    vars: &[(String, String)],
) -> object_store::Result<object_store::azure::MicrosoftAzure> {
    let mut builder = MicrosoftAzureBuilder::from_env();
    for (key, value) in known::<AzureConfigKey>(vars) {
        builder = builder.with_config(key, value);
    }
    for (key, value) in client(options) {
        builder = builder.with_config(AzureConfigKey::Client(key), value);
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    builder.with_url(root).with_retry(no_retry()).build()
}

fn open_folder(url: &str, folder: &str) -> Result<Connected> {
    if folder.is_empty() {
        return Err(StoreError::Url { url: url.to_owned(), problem: "it names no folder".into() });
    }
    let open = |folder: &str| -> io::Result<PathBuf> {
        let folder = std::path::absolute(folder)?;
        fs::create_dir_all(&folder)?;
        fs::canonicalize(folder)
    };
    let root = open(folder).map_err(|source| match source.kind() {
        // `/proc` says "not found" of what may not be made in it.
        io::ErrorKind::NotFound => StoreError::Io { op: "open the store", path: folder.to_owned(), source },
        _ => StoreError::io("open the store", folder)(source),
    })?;
    let objects = LocalFileSystem::new_with_prefix(&root)
        .map_err(|error| StoreError::object("open the store", &root.display().to_string(), error))?;
    Ok(Connected {
        objects: Arc::new(objects),
        parts: None,
        prefix: ObjectPath::default(),
        local: Some(local::Root::new(root)),
    })
}
