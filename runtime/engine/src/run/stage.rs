//! One stage that has to run: lease, hooks, context, thread, result.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dsv3_core::{ArtifactRef, Cancel, Digest, Error, ErrorKind, Event, Events, Outcome, canonical_json, json_digest};
use dsv3_hooks::{Hook, World};
use dsv3_stage::{Closing, Ctx, CtxParts, StageEntry};
use dsv3_store::{Holder, Lease, OutputEntry, StageResult, StoreError, nonce};
use serde_json::{Map, Value, json};

use super::Run;
use crate::{
    cached::{self, Found, Inputs},
    check::parse_device,
    plan::{InputRef, Plan, PlannedStage, key::KeyRecord},
    spec::RetentionSpec,
};

/// How often a request to stop and the lease are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// A stage that has not stopped this long after it was asked to is told of, and again after as long.
const GRACE: Duration = Duration::from_secs(30);

/// A folder that is removed with this value.
pub(super) struct Scratch(pub(super) PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // The system's temporary folder is cleaned anyway.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where a stage does its work.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) key: &'a str,
    pub(super) epoch: u64,
    /// Number of the checkpoint to go on from; the newest when absent.
    pub(super) at: Option<u64>,
    /// Whether that checkpoint is published without another step.
    pub(super) as_it_is: bool,
}

/// Asks a stage to stop when whoever waits for it goes away.
struct StopOnDrop(Cancel);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// What a stage that has run to its end hands over.
struct Finished {
    outputs: Value,
    closing: Closing,
    last_seq: u64,
}

impl Run<'_> {
    /// Runs a stage under its lease, unless whoever held it before has finished it.
    pub(super) async fn execute(
        &self,
        stage: &PlannedStage,
        entry: &StageEntry,
        record: &KeyRecord,
        inputs: &Inputs,
    ) -> Result<(Outcome, StageResult), Error> {
        let lease = self.lease(stage, &record.key().to_string()).await?;
        let outcome = match self.under_lease(stage, entry, record, inputs, &lease).await {
            Ok(outcome) => Ok(outcome),
            Err(error) => Err(self.explain_loss(stage, &lease, error).await),
        };
        let released = lease.release().await;
        let outcome = outcome?;
        released?;
        Ok(outcome)
    }

    async fn lease(&self, stage: &PlannedStage, key: &str) -> Result<Lease, Error> {
        let of_this_run = AtomicBool::new(false);
        let wait = |holder: &Holder| {
            of_this_run.store(holder.run == self.id, Ordering::SeqCst);
            self.warn(&stage.name, format!("waiting for {holder} to finish this stage"));
        };
        let holder = self.engine.holder(self.id);
        let options = self.options.lease.over(self.plan.lease.over(self.engine.lease));
        let clock = self.engine.clock.clone();
        let lease = self.store.acquire(key, holder, clock, options, &self.options.cancel, wait).await;
        let theirs = match &lease {
            Err(StoreError::Held { run, .. }) => run == self.id,
            Err(StoreError::Cancelled { .. }) => of_this_run.load(Ordering::SeqCst),
            _ => false,
        };
        self.handed_over.fetch_or(theirs, Ordering::SeqCst);
        Ok(lease?)
    }

    /// The error of a stage that ended because its lease was lost says so: what it met itself is only how it noticed.
    async fn explain_loss(&self, stage: &PlannedStage, lease: &Lease, error: Error) -> Error {
        let Err(loss @ StoreError::Fenced { .. }) = lease.check().await else { return error };
        if let StoreError::Fenced { run, .. } = &loss {
            self.handed_over.fetch_or(run == self.id, Ordering::SeqCst);
        }
        self.warn(&stage.name, loss.to_string());
        loss.into()
    }

    async fn under_lease(
        &self,
        stage: &PlannedStage,
        entry: &StageEntry,
        record: &KeyRecord,
        inputs: &Inputs,
        lease: &Lease,
    ) -> Result<(Outcome, StageResult), Error> {
        let key = record.key().to_string();
        self.wait_for_collection(&stage.name).await?;
        match self.again_from(stage) {
            Some(seq) => self.rewind(stage, &key, seq, lease).await?,
            None => {
                if let Found::Whole(result) = cached::find(self.store, self.plan, record.key()).await? {
                    return Ok((Outcome::Cached, result));
                }
            }
        }
        // What the key was made of, for `explain`. Equal keys have equal records, so whoever was first is right.
        self.store.create(&format!("stages/{key}/key.json"), record.to_bytes().into()).await?;
        let profile = json!({ "device": self.plan.device, "config": entry.profile_config(&stage.config)? });
        let mark = format!("{}/{}.json", profiles(&key), json_digest(&profile));
        // Its name is the digest of the profile alone, so that marks of every format agree.
        self.store.create(&mark, canonical_json(&cached::with_format(profile)).into_bytes().into()).await?;
        let finished = self.work(stage, entry, &key, inputs, lease).await?;
        Ok((Outcome::Done, self.commit(stage, entry, record.key(), finished, lease).await?))
    }

    /// The checkpoint that this stage is to be done again from, if it was asked for.
    pub(super) fn again_from(&self, stage: &PlannedStage) -> Option<u64> {
        self.options.at.as_ref().filter(|at| at.stage == stage.name).map(|at| at.seq)
    }

    /// Sends the stage back to the checkpoint `seq`. What was committed after it stays in the store.
    async fn rewind(&self, stage: &PlannedStage, key: &str, seq: u64, lease: &Lease) -> Result<(), Error> {
        let step = self.store.checkpoint_at(key, seq).await?.step;
        self.store.rewind_checkpoints(key, lease.epoch(), seq, self.id).await?;
        let message = format!(
            "goes back to checkpoint {seq}, step {step}; later ones stay in the store and count no more, `--at` still finds them"
        );
        self.warn(&stage.name, message);
        Ok(())
    }

    /// The stage on its thread, until it ends or has been asked to stop and does.
    async fn work(
        &self,
        stage: &PlannedStage,
        entry: &StageEntry,
        key: &str,
        inputs: &Inputs,
        lease: &Lease,
    ) -> Result<Finished, Error> {
        let checkpoint = self.store.find_checkpoint(key).await?.checkpoint;
        self.events.emit(Event::StageStarted {
            stage: stage.name.clone(),
            kind: stage.kind.clone(),
            key: key.to_owned(),
            resumed_from: checkpoint.map(|checkpoint| checkpoint.step),
        });
        let (cancel, scratch) = (Cancel::new(), Scratch(std::env::temp_dir().join(format!("dsv3-{}", nonce()))));
        let (events, said) = self.listening();
        let place = Place { key, epoch: lease.epoch(), at: None, as_it_is: false };
        let ctx = self.context(stage, place, (cancel.clone(), events), scratch.0.clone()).await?;
        let stop = StopOnDrop(cancel);
        let running = entry.run_on_thread(stage.config.clone(), inputs_json(entry, inputs), ctx);
        tokio::pin!(running);
        let now = || self.engine.clock.monotonic();
        // When it was asked to stop, and when its silence is told of next.
        let mut asked: Option<(Duration, Duration)> = None;
        let (outputs, ctx) = loop {
            tokio::select! {
                ended = &mut running => break ended?,
                () = tokio::time::sleep(LOOK) => {}
            }
            match &mut asked {
                None if self.options.cancel.is_cancelled() || lease.lost().is_cancelled() => {
                    stop.0.cancel();
                    asked = Some((now(), now() + GRACE));
                }
                Some((since, next)) if now() >= *next => {
                    *next += GRACE;
                    let seconds = now().saturating_sub(*since).as_secs();
                    let said = said.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    let said = if said.is_empty() { "has not said how far it is".to_owned() } else { said };
                    self.warn(
                        &stage.name,
                        format!(
                            "asked to stop {seconds} s ago, this {} {said}; it stops at its next safe point",
                            stage.kind
                        ),
                    );
                }
                _ => {}
            }
        };
        // A stage that failed or panicked may have left a checkpoint in flight; it belongs under this lease.
        ctx.checkpoints().settle().await;
        let outputs = outputs.map_err(while_running)?;
        Ok(Finished { outputs, closing: ctx.closing(), last_seq: ctx.checkpoints().last_seq() })
    }

    /// The run's events, and beside them what the last progress said.
    fn listening(&self) -> (Events, Arc<Mutex<String>>) {
        let (events, said) = (self.events.clone(), Arc::new(Mutex::new(String::new())));
        let heard = said.clone();
        let events = Events::new(move |event| {
            if let Event::Progress { done, total, unit, .. } = &event {
                let total = total.map_or_else(String::new, |total| format!(" of {total}"));
                *heard.lock().unwrap_or_else(PoisonError::into_inner) = format!("is at {done}{total} {unit}");
            }
            events.emit(event);
        });
        (events, said)
    }

    pub(super) async fn context(
        &self,
        stage: &PlannedStage,
        place: Place<'_>,
        (cancel, events): (Cancel, Events),
        scratch: PathBuf,
    ) -> Result<Ctx, Error> {
        let device = parse_device(&self.plan.device)
            .ok_or_else(|| Error::invalid(format!("this build has no device `{}`", self.plan.device)))?;
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Ctx::new(CtxParts {
            stage: stage.name.clone(),
            stage_type: stage.kind.clone(),
            key: place.key.to_owned(),
            epoch: place.epoch,
            seed: self.plan.seed,
            device,
            threads: self.options.threads.or(self.plan.threads).unwrap_or_else(cores),
            store: self.store.clone(),
            runtime: tokio::runtime::Handle::current(),
            sources: Arc::new(self.plan.sources.clone()),
            origins: self.origins(stage),
            events,
            cancel,
            hooks: self.hooks(stage).await?,
            clock: self.engine.clock.clone(),
            scratch,
            stay: self.options.stay,
            at: place.at,
            as_it_is: place.as_it_is,
            retention: stage.retention.as_ref().map(RetentionSpec::to_store),
        }))
    }

    /// `stage.output` by artifact, for what the stage reads from other stages.
    fn origins(&self, stage: &PlannedStage) -> BTreeMap<Digest, String> {
        let mut origins = BTreeMap::new();
        for value in stage.inputs.iter().flat_map(|input| &input.values) {
            let InputRef::Stage { stage: from, port } = value else { continue };
            let many = format!("{port}[");
            let outputs = self.results.get(from).map(|result| result.outputs.as_slice()).unwrap_or_default();
            for output in outputs.iter().filter(|output| output.name == *port || output.name.starts_with(&many)) {
                origins.entry(output.digest).or_insert_with(|| format!("{from}.{}", output.name));
            }
        }
        origins
    }

    /// The stage's lineage, marked when this stage or one before it has been run under several numerics profiles: bits are
    /// promised equal within one profile only.
    async fn lineage(
        &self,
        stage: &PlannedStage,
        key: &str,
        mut lineage: Map<String, Value>,
    ) -> Result<Map<String, Value>, Error> {
        let mut mixed = Vec::new();
        let own = self.store.list(&profiles(key)).await?;
        if own.len() > 1 {
            for name in own {
                let bytes = self.store.read(&format!("{}/{name}", profiles(key))).await?;
                let profile = serde_json::from_slice::<Value>(&bytes).ok().map(cached::without_format);
                // A mark is named by the digest of its profile.
                let Some(profile) = profile.filter(|profile| name == format!("{}.json", json_digest(profile))) else {
                    let path = self.store.display_path(&format!("{}/{name}", profiles(key)));
                    return Err(Error::data(format!("{path} is damaged: it is not the profile of its name"))
                        .help("delete it and run again"));
                };
                mixed.push(profile);
            }
        }
        let above = Plan::upstream(stage);
        let results = above.iter().filter_map(|name| self.results.get(*name));
        let inherited = results.filter_map(|result| result.lineage.get("mixed_profiles")?.as_array());
        mixed.extend(inherited.flatten().cloned());
        // Two stages before this one often share the stage that was mixed.
        let mixed: BTreeMap<String, Value> = mixed.into_iter().map(|one| (canonical_json(&one), one)).collect();
        if !mixed.is_empty() {
            lineage.insert("mixed_profiles".to_owned(), mixed.into_values().collect());
        }
        Ok(lineage)
    }

    /// The stage's hooks, loaded from the store.
    async fn hooks(&self, stage: &PlannedStage) -> Result<BTreeMap<String, Arc<Hook>>, Error> {
        let mut hooks = BTreeMap::new();
        for (port, name) in &stage.hooks {
            let hook = self.plan.hooks.get(name).ok_or_else(|| Error::data(format!("the plan lacks hook `{name}`")))?;
            let wasm = self.store.get_blob(hook.digest).await?;
            let world = World::from_name(&hook.world)
                .ok_or_else(|| Error::invalid(format!("this build has no world `{}`", hook.world)))?;
            let limits = hook.limits.to_host();
            let (host, name, config, on_error) =
                (self.engine.host()?, name.clone(), hook.config.clone(), hook.on_error);
            let load = move || host.load(&name, &wasm, world, &config, limits, on_error);
            let loaded = tokio::task::spawn_blocking(load)
                .await
                .map_err(|error| Error::internal("loading a hook was interrupted").source(error))??;
            hooks.insert(port.clone(), Arc::new(loaded));
        }
        Ok(hooks)
    }

    /// Commits what a stage hands over. The result is no link of the chain of checkpoints that a fence breaks: a holder is
    /// refused when it finds a successor, and one that is paused between this look and the create can still create. That is
    /// harmless: equal keys have equal outputs, so what it creates is what its successor would, and the first create counts.
    async fn commit(
        &self,
        stage: &PlannedStage,
        entry: &StageEntry,
        key: Digest,
        finished: Finished,
        lease: &Lease,
    ) -> Result<StageResult, Error> {
        let Finished { outputs, closing, last_seq } = finished;
        let mut entries = Vec::new();
        for spec in entry.outputs() {
            let artifacts: Vec<(String, &Value)> = match outputs.get(spec.name) {
                None | Some(Value::Null) => Vec::new(),
                Some(Value::Array(items)) => {
                    items.iter().enumerate().map(|(i, item)| (format!("{}[{i}]", spec.name), item)).collect()
                }
                Some(one) => vec![(spec.name.to_owned(), one)],
            };
            for (port, artifact) in artifacts {
                let artifact: ArtifactRef = serde_json::from_value(artifact.clone()).map_err(|error| {
                    Error::internal(format!("output `{port}` of stage type `{}` is no artifact", stage.kind))
                        .source(error)
                })?;
                let bytes = self.store.manifest(artifact.digest).await?.bytes();
                entries.push(OutputEntry {
                    name: port.clone(),
                    kind: artifact.kind.clone(),
                    digest: artifact.digest,
                    bytes,
                });
                self.events.emit(Event::Artifact { stage: stage.name.clone(), port, artifact, bytes });
            }
        }
        let result = StageResult {
            format: StageResult::FORMAT,
            key: key.to_string(),
            stage_type: stage.kind.clone(),
            outputs: entries,
            metrics: closing.figures,
            last_seq,
            lineage: Value::Object(self.lineage(stage, &key.to_string(), closing.lineage).await?),
            profile: json!({ "device": self.plan.device, "config": entry.profile_config(&stage.config)? }),
        };
        lease.check().await?;
        // An old record may promise content that is gone; the new one replaces it.
        if let Found::Broken(_) = cached::find(self.store, self.plan, key).await? {
            self.store.delete(&format!("stages/{key}/result.json")).await?;
        }
        let committed = self.store.commit_result(&key.to_string(), &result).await?;
        if committed.outputs != result.outputs && self.again_from(stage).is_some() {
            return Err(came_out_differently(&committed, &result));
        }
        if committed.outputs != result.outputs {
            let message = "another process finished this stage with other outputs; theirs count".to_owned();
            self.warn(&stage.name, message);
        }
        Ok(committed)
    }
}

/// A finished stage that was done again and did not come out the same.
fn came_out_differently(committed: &StageResult, again: &StageResult) -> Error {
    let differs = |output: &&OutputEntry| !committed.outputs.contains(output);
    let names: Vec<&str> = again.outputs.iter().filter(differs).map(|output| output.name.as_str()).collect();
    let message = format!(
        "done again from an earlier checkpoint, the stage made other bits of {}; the result that was committed first stays",
        names.join(", ")
    );
    let help =
        "a machine, a build or a stored object is at fault: `dsv3-pipeline verify RUN STAGE --replay 10` tells more";
    Error::data(message).help(help)
}

/// What a stage refuses once it runs was no longer to be seen from the pipeline: it is the data that does not fit.
fn while_running(mut error: Error) -> Error {
    if error.kind == ErrorKind::Invalid {
        error.kind = ErrorKind::Data;
    }
    error
}

/// Folder of the numerics profiles under which a key has been run.
fn profiles(key: &str) -> String {
    format!("stages/{key}/profiles")
}

/// `{port: {kind, digest} | [..]}` as the stage reads it.
pub(super) fn inputs_json(entry: &StageEntry, inputs: &Inputs) -> Value {
    let mut map = Map::new();
    for spec in entry.inputs() {
        let Some(artifacts) = inputs.get(spec.name) else { continue };
        let mut values = artifacts.iter().map(|artifact| json!({ "kind": artifact.kind, "digest": artifact.digest }));
        let value = if spec.many { Some(values.collect()) } else { values.next() };
        if let Some(value) = value {
            map.insert(spec.name.to_owned(), value);
        }
    }
    Value::Object(map)
}
