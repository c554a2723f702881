//! [`Engine`]: the stage types of a host and what they share between runs.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use dsv3_core::{Clock, Error, SystemClock};
use dsv3_hooks::Host;
use dsv3_stage::StageEntry;
use dsv3_store::{Holder, LeaseOptions, Store, StoreOptions};

use crate::{
    check::{self, Spec},
    diagnostics::Diagnostics,
    error::EngineError,
    plan::{self, Plan},
    schema,
    spec::{self, LoadOptions},
};

/// Builds an [`Engine`].
#[derive(Default)]
pub struct EngineBuilder {
    stages: Vec<StageEntry>,
    store: Option<Store>,
    cache_dir: Option<PathBuf>,
    clock: Option<Arc<dyn Clock>>,
    lease: LeaseOptions,
}

impl EngineBuilder {
    /// Adds stage types. Of two with one name the later counts, so that a host can replace one of ours.
    #[must_use]
    pub fn stages(mut self, entries: &[StageEntry]) -> Self {
        self.stages.extend_from_slice(entries);
        self
    }

    /// A store that replaces the one each pipeline names.
    #[must_use]
    pub fn store(mut self, store: Store) -> Self {
        self.store = Some(store);
        self
    }

    /// Folder for compiled hooks; without it each process compiles anew.
    #[must_use]
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(dir.into());
        self
    }

    /// Clock for rates, intervals and leases.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = Some(clock);
        self
    }

    /// How often a stage's lease is renewed and when it expires.
    #[must_use]
    pub fn lease_options(mut self, options: LeaseOptions) -> Self {
        self.lease = options;
        self
    }

    /// The engine.
    pub fn build(self) -> Engine {
        let by_name: BTreeMap<&str, StageEntry> = self.stages.iter().map(|entry| (entry.name, *entry)).collect();
        Engine {
            stages: by_name.into_values().collect(),
            store: self.store,
            cache_dir: self.cache_dir,
            clock: self.clock.unwrap_or_else(|| Arc::new(SystemClock::default())),
            lease: self.lease,
            stores: Mutex::default(),
            host: OnceLock::new(),
            holder: None,
        }
    }
}

/// Reads, plans and runs pipelines. Share it freely; it holds no state that changes results.
pub struct Engine {
    pub(crate) stages: Vec<StageEntry>,
    store: Option<Store>,
    pub(crate) cache_dir: Option<PathBuf>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) lease: LeaseOptions,
    stores: Mutex<BTreeMap<String, (Store, StoreOptions)>>,
    host: OnceLock<Arc<Host>>,
    /// Who leases say that this is; this process when absent.
    holder: Option<Holder>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("stages", &self.stages).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts building an engine.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    /// The stage types, by name.
    pub fn stages(&self) -> &[StageEntry] {
        &self.stages
    }

    /// JSON Schema of pipeline files for this engine's stage types.
    pub fn schema(&self) -> serde_json::Value {
        schema::pipeline(&self.stages)
    }

    /// Reads and checks a pipeline file; relative paths in it start from its folder.
    ///
    /// # Errors
    /// Every problem of the pipeline, each at its place.
    pub fn load(&self, path: &Path, options: &LoadOptions) -> Result<Spec, Diagnostics> {
        let shown = path.display();
        let bytes =
            std::fs::read(path).map_err(|error| Diagnostics::plain(format!("{shown} cannot be read: {error}")))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = error.utf8_error().valid_up_to();
            let line = error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count() + 1;
            Diagnostics::plain(format!("{shown}:{line}:1: the file is not UTF-8 text from here on"))
        })?;
        let base = path.parent().unwrap_or(Path::new("")).to_owned();
        self.load_text(&shown.to_string(), &text, &base, options)
    }

    /// Reads and checks the text of a pipeline. `name` is shown before `:LINE:COL`, `base` is where its paths start.
    ///
    /// # Errors
    /// Every problem of the pipeline, each at its place.
    pub fn load_text(&self, name: &str, text: &str, base: &Path, options: &LoadOptions) -> Result<Spec, Diagnostics> {
        let reading = spec::read(name, text, base.to_owned(), options);
        check::check(reading, &self.stages, &options.at_tokens, || self.host())
    }

    /// Digests the external files of a checked pipeline. Opens its store; writes nothing but a cache of digests.
    ///
    /// # Errors
    /// Files that cannot be read, a store that cannot be opened.
    pub async fn plan(&self, spec: Spec) -> Result<Plan, EngineError> {
        let store = self.open_store_with(spec.store(), spec.store_options())?;
        plan::make(spec, &store).await
    }

    /// The store at `url`, or the one the engine was built with.
    ///
    /// # Errors
    /// An unknown scheme, a folder that cannot be made.
    pub fn open_store(&self, url: &str) -> Result<Store, EngineError> {
        if let Some(store) = &self.store {
            return Ok(store.clone());
        }
        self.open_store_with(url, &StoreOptions::default())
    }

    /// [`Self::open_store`] with options.
    ///
    /// # Errors
    /// As [`Self::open_store`]; an option that the scheme does not have.
    pub fn open_store_with(&self, url: &str, options: &StoreOptions) -> Result<Store, EngineError> {
        if let Some(store) = &self.store {
            return Ok(store.clone());
        }
        // Under both names: the plan records the store's own.
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((store, _)) = stores.get(url).filter(|(_, known)| known == options) {
            return Ok(store.clone());
        }
        let store = Store::open_with(url, options, &[])?;
        for name in [store.url(), url] {
            stores.insert(name.to_owned(), (store.clone(), options.clone()));
        }
        Ok(store)
    }

    /// The store of a `--store`: a URL, or a map in braces as `store:` of a pipeline takes it.
    ///
    /// # Errors
    /// The problems of a map, each at its place.
    pub fn parse_store(text: &str) -> Result<(String, StoreOptions), Diagnostics> {
        spec::store::parse(text)
    }

    /// The stage type of a planned stage, of the version it was planned with.
    pub(crate) fn entry(&self, kind: &str, version: u32) -> Result<StageEntry, Error> {
        let entry = self.stages.iter().find(|entry| entry.name == kind);
        let entry = entry.ok_or_else(|| Error::invalid(format!("this program has no stage type `{kind}`")))?;
        if entry.version == version {
            return Ok(*entry);
        }
        let message =
            format!("the plan wants version {version} of stage type `{kind}`; this program has {}", entry.version);
        Err(Error::invalid(message).help("run the pipeline again: a new plan takes the new version"))
    }

    /// Another engine of these stages and hooks, on a store of its own. Its leases say that their holder is a process of
    /// this host that has ended, so that whoever comes next need not wait for it to expire.
    pub(crate) fn ended(&self, store: Store, lease: LeaseOptions) -> Self {
        let here = Holder::this_process("");
        let gone = Holder { process_start: here.process_start.wrapping_add(1), ..here };
        Self {
            stages: self.stages.clone(),
            store: Some(store),
            cache_dir: self.cache_dir.clone(),
            clock: self.clock.clone(),
            lease,
            stores: Mutex::default(),
            host: self.host.clone(),
            holder: Some(gone),
        }
    }

    /// Who leases of the run `run` say that this is.
    pub(crate) fn holder(&self, run: &str) -> Holder {
        match &self.holder {
            Some(holder) => Holder { run: run.to_owned(), ..holder.clone() },
            None => Holder::this_process(run),
        }
    }

    /// The host of hooks, started at the first use.
    pub(crate) fn host(&self) -> Result<Arc<Host>, Error> {
        if let Some(host) = self.host.get() {
            return Ok(host.clone());
        }
        let host = Arc::new(Host::new(self.cache_dir.clone())?);
        Ok(self.host.get_or_init(|| host).clone())
    }
}
