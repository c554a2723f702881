//! [`Spec`] to [`Plan`]: external files are digested and become manifests, hook components get their digests.

use std::collections::BTreeMap;

use bytes::Bytes;
use dsv3_core::{Digest, Error, FileEntry, Manifest};
use dsv3_store::Store;

use super::{InputRef, Plan, PlannedHook, PlannedInput, PlannedStage, hashes::HashCache};
use crate::{
    check::{CheckedInput, CheckedStage, CheckedValue, Spec},
    diagnostics::{Diagnostic, Diagnostics, Span},
    error::EngineError,
    spec::files::{ExternalFile, is_pattern, matches},
};

/// What is gathered while stages are planned.
struct Maker {
    hashes: HashCache,
    sources: BTreeMap<Digest, String>,
    blobs: BTreeMap<Digest, Bytes>,
}

/// Resolves what is left to resolve.
pub(crate) async fn make(spec: Spec, store: &Store) -> Result<Plan, EngineError> {
    let hashes = HashCache::open(store.local_root());
    let mut maker = Maker { hashes, sources: BTreeMap::new(), blobs: BTreeMap::new() };
    let mut hooks = BTreeMap::new();
    for (name, hook) in &spec.hooks {
        let digest = Digest::of(&hook.wasm);
        maker.blobs.insert(digest, Bytes::from(hook.wasm.as_ref().clone()));
        let (world, config) = (hook.world.clone(), hook.config.clone());
        hooks.insert(name.clone(), PlannedHook { digest, world, config, limits: hook.limits, on_error: hook.on_error });
    }
    let (mut stages, mut problems) = (Vec::new(), Vec::new());
    for stage in spec.stages {
        let mut inputs = Vec::new();
        for input in &stage.inputs {
            inputs.push(maker.input(input, &mut problems).await?);
        }
        let CheckedStage { name, entry, config, hooks, floors, notes, retention, facts, .. } = stage;
        let (kind, version) = (entry.name.to_owned(), entry.version);
        stages.push(PlannedStage { name, kind, version, config, inputs, hooks, floors, notes, retention, facts });
    }
    maker.hashes.save();
    if !problems.is_empty() {
        return Err(Diagnostics::new(spec.sources, problems).into());
    }
    Ok(Plan {
        format: Plan::FORMAT,
        name: spec.name,
        store: store.url().to_owned(),
        store_options: spec.store_options,
        seed: spec.seed,
        threads: spec.threads,
        device: spec.device,
        lease: spec.lease,
        hooks,
        stages,
        sources: maker.sources,
        blobs: maker.blobs,
    })
}

impl Maker {
    async fn input(
        &mut self,
        input: &CheckedInput,
        problems: &mut Vec<Diagnostic>,
    ) -> Result<PlannedInput, EngineError> {
        let mut values = Vec::new();
        for value in &input.values {
            let files = match value {
                CheckedValue::Stage { stage, port } => {
                    values.push(InputRef::Stage { stage: stage.clone(), port: port.clone() });
                    continue;
                }
                CheckedValue::Files { files, span } => self.local(files.clone(), *span, problems).await?,
                CheckedValue::Remote { uris, span } => self.remote(uris, *span, problems).await?,
            };
            let kind = input.spec.kind.to_owned();
            let manifest = Manifest { format: Manifest::FORMAT, kind, files, meta: serde_json::Value::Null };
            let bytes = Bytes::from(manifest.to_bytes());
            let digest = Digest::of(&bytes);
            self.blobs.insert(digest, bytes);
            values.push(InputRef::External { digest, bytes: manifest.bytes() });
        }
        let (port, kind) = (input.spec.name.to_owned(), input.spec.kind.to_owned());
        Ok(PlannedInput { port, kind, many: input.spec.many, values })
    }

    /// Digests local files off the async threads.
    async fn local(
        &mut self,
        files: Vec<ExternalFile>,
        span: Span,
        problems: &mut Vec<Diagnostic>,
    ) -> Result<Vec<FileEntry>, EngineError> {
        let mut hashes = std::mem::take(&mut self.hashes);
        let work = move || {
            let digests: Vec<Result<(Digest, u64), Error>> =
                files.iter().map(|file| hashes.digest(&file.path)).collect();
            (hashes, files, digests)
        };
        let (hashes, files, digests) = tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Error::internal("digesting the inputs was interrupted").source(error))?;
        self.hashes = hashes;
        let mut entries = Vec::new();
        for (file, digest) in files.into_iter().zip(digests) {
            match digest {
                Ok((digest, bytes)) => {
                    self.sources.insert(digest, file.path.display().to_string());
                    entries.push(FileEntry { path: file.name, digest, bytes });
                }
                Err(error) => {
                    let cause =
                        std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
                    problems.push(Diagnostic::new(span, format!("{error}{cause}")));
                }
            }
        }
        Ok(entries)
    }

    /// Reads and digests objects of another store.
    async fn remote(
        &mut self,
        uris: &[String],
        span: Span,
        problems: &mut Vec<Diagnostic>,
    ) -> Result<Vec<FileEntry>, EngineError> {
        let mut entries = Vec::new();
        for uri in uris {
            let (folder, last) = uri.trim_end_matches('/').rsplit_once('/').unwrap_or((uri, ""));
            let store = Store::open(folder)?;
            let names = if is_pattern(last) {
                let names = store.list("").await?;
                names.into_iter().filter(|name| !name.ends_with('/') && matches(last, name)).collect()
            } else if store.length(last).await?.is_some() {
                vec![last.to_owned()]
            } else {
                store.list_all(last).await?
            };
            if names.is_empty() {
                problems.push(Diagnostic::new(span, format!("nothing lies at {uri}")));
            }
            for name in names {
                let content = store.read(&name).await?;
                let digest = Digest::of(&content);
                self.sources.insert(digest, format!("{folder}/{name}"));
                let prefix = format!("{last}/");
                let path = name.strip_prefix(&prefix).unwrap_or(&name).to_owned();
                entries.push(FileEntry { path, digest, bytes: content.len() as u64 });
            }
        }
        Ok(entries)
    }
}
