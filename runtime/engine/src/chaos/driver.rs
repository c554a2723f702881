//! Runs the trials.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dsv3_core::{Cancel, Error, ErrorKind, Event, Events, Rng};
use dsv3_store::{
    LeaseOptions, StageResult,
    faults::{Fault, Faults, Ground, Operation},
};
use futures::StreamExt;

use super::{ChaosOptions, ChaosPoint, ChaosReport, ChaosTrial, TrialEnd};
use crate::{
    Engine, RunOptions, Selection,
    error::{EngineError, chain},
    plan::Plan,
};

/// Time between heartbeats, longer than any attempt: the number of its operations does not depend on its time.
const BEAT: Duration = Duration::from_secs(3600);
/// Attempts of a trial at most: crashes end long before.
const ATTEMPTS_MAX: u32 = 8;
/// Attempts that may crash after the first.
const FURTHER_CRASHES_MAX: u32 = 3;
/// An attempt that takes longer hangs.
const ATTEMPT_MAX: Duration = Duration::from_secs(300);

/// A stage before and after its undisturbed run.
struct Base {
    stage: String,
    before: Ground,
    operations: Vec<Operation>,
    result: StageResult,
    /// Figures that are not compared: the stage type calls them loose, or a second undisturbed run gave them otherwise.
    clocked: BTreeSet<String>,
}

/// What an attempt said.
#[derive(Default)]
struct Said {
    /// Step of the last checkpoint that was told of.
    checkpoint: Option<u64>,
    /// Whether and from what the stage was gone on with.
    started: Option<Option<u64>>,
}

struct Driver<'a> {
    engine: &'a Engine,
    plan: &'a Plan,
    options: &'a ChaosOptions,
}

impl Engine {
    /// Runs a plan undisturbed, then with a fault at each point. `told` hears of each trial as it ends.
    ///
    /// # Errors
    /// When the undisturbed run fails, or a stage or point is unknown.
    pub async fn chaos(
        &self,
        plan: &Plan,
        options: &ChaosOptions,
        cancel: &Cancel,
        told: &(dyn Fn(&ChaosTrial) + Sync),
    ) -> Result<ChaosReport, EngineError> {
        options.stages.iter().try_for_each(|name| plan.stage(name).map(drop))?;
        if !plan.hooks.is_empty() {
            // Compiled once for all attempts.
            self.host()?;
        }
        let driver = Driver { engine: self, plan, options };
        let bases = driver.undisturbed(cancel).await?;
        let points = driver.points(&bases)?;
        let chosen = driver.choose(&points);
        let trials = chosen.into_iter().map(|(base, point)| {
            let driver = &driver;
            async move {
                match cancel.is_cancelled() {
                    true => Err(Error::cancelled()),
                    false => driver.trial(base, point).await.inspect(told),
                }
            }
        });
        let mut tried = Vec::new();
        let mut trials = futures::stream::iter(trials).buffered(options.jobs.max(1));
        while let Some(trial) = trials.next().await {
            tried.push(trial?);
        }
        let stages = bases.iter().map(|base| (base.stage.clone(), base.operations.len())).collect();
        let named = |base: &Base| base.clocked.iter().map(|name| format!("{}.{name}", base.stage)).collect::<Vec<_>>();
        let clocked = bases.iter().flat_map(named).collect();
        Ok(ChaosReport { seed: options.seed, stages, points: points.len(), clocked, trials: tried })
    }
}

impl Driver<'_> {
    /// Every stage undisturbed, one after another in one store.
    async fn undisturbed(&self, cancel: &Cancel) -> Result<Vec<Base>, EngineError> {
        let mut ground = Ground::new(self.options.folder.as_deref())?;
        let mut bases = Vec::new();
        for stage in &self.plan.stages {
            if cancel.is_cancelled() {
                return Err(Error::cancelled().into());
            }
            let after = ground.fork()?;
            let faults = Faults::default();
            let (ended, _) = self.attempt(&after, &faults, &stage.name, false).await?;
            let result = ended?;
            let (again, _) = self.attempt(&ground.fork()?, &Faults::default(), &stage.name, false).await?;
            let mut clocked = differing(&result, &again?, &stage.name)?;
            let loose = self.engine.entry(&stage.kind, stage.version)?.loose_figures;
            clocked
                .extend(loose.iter().filter(|name| result.metrics.contains_key(**name)).map(|name| (*name).to_owned()));
            let (stage, operations) = (stage.name.clone(), faults.operations());
            bases.push(Base { stage, before: ground, operations, result, clocked });
            ground = after;
        }
        Ok(bases)
    }

    /// Every point of the chosen stages, in order.
    fn points<'b>(&self, bases: &'b [Base]) -> Result<Vec<(&'b Base, ChaosPoint)>, Error> {
        let mut points = Vec::new();
        for base in bases {
            if !self.options.stages.is_empty() && !self.options.stages.contains(&base.stage) {
                continue;
            }
            let mut operations = base.operations.clone();
            operations.sort_unstable();
            for operation in operations {
                for fault in self.options.faults.iter().copied().filter(|fault| fault.meets(operation.kind)) {
                    let point = ChaosPoint { stage: base.stage.clone(), operation: operation.clone(), fault };
                    points.push((base, point));
                }
            }
        }
        let Some(only) = &self.options.only else { return Ok(points) };
        let base = bases.iter().find(|base| base.stage == only.stage);
        let base = base.ok_or_else(|| Error::invalid(format!("no stage is called `{}`", only.stage)))?;
        if !base.operations.contains(&only.operation) {
            let message = format!("stage `{}` has no operation `{}` here", only.stage, only.operation);
            return Err(Error::invalid(message).help("give the same pipeline, --set, --rows and --seed as in the run"));
        }
        Ok(vec![(base, only.clone())])
    }

    /// All points, or a sample of which each point's own draw decides, in their order.
    fn choose<'b>(&self, points: &[(&'b Base, ChaosPoint)]) -> Vec<(&'b Base, ChaosPoint)> {
        let draw = |point: &ChaosPoint| self.rng(point).key("sample").next_u64();
        let mut order: Vec<usize> = (0..points.len()).collect();
        order.sort_by_key(|i| draw(&points[*i].1));
        order.truncate(self.options.points_max.unwrap_or(points.len()));
        order.sort_unstable();
        order.into_iter().map(|i| points[i].clone()).collect()
    }

    fn rng(&self, point: &ChaosPoint) -> Rng {
        Rng::new(self.options.seed).key(point.to_string().as_str())
    }

    async fn trial(&self, base: &Base, point: ChaosPoint) -> Result<ChaosTrial, Error> {
        let ground = base.before.fork()?;
        let mut rng = self.rng(&point).key("further");
        let mut trial =
            ChaosTrial { end: TrialEnd::NotMet, attempts: 0, further_crashes: 0, resumed: 0, problem: None, point };
        let mut checkpoint = None;
        loop {
            let faults = Faults::default();
            let (first, again) =
                (trial.attempts == 0, rng.below(3) == 0 && trial.further_crashes < FURTHER_CRASHES_MAX);
            if first {
                faults.plan_at(trial.point.operation.clone(), trial.point.fault);
            } else if trial.point.fault.is_crash() && again {
                let number = 1 + rng.below(base.operations.len() as u64);
                faults.plan_number(number, if rng.below(2) == 0 { Fault::CrashBefore } else { Fault::CrashAfter });
            }
            // A user starts the pipeline again, or goes on with the run.
            let resume = !first && rng.below(2) == 0;
            let (ended, said) = self.attempt(&ground, &faults, &base.stage, resume).await?;
            trial.attempts += 1;
            trial.resumed += u32::from(said.started.flatten().is_some());
            trial.further_crashes += u32::from(!first && faults.crashed());
            if first && !faults.struck().is_empty() {
                trial.end = if ended.is_ok() { TrialEnd::Survived } else { TrialEnd::Stopped };
            }
            // Steps go back only where a guard undid some.
            if let (Some(started), Some(committed)) = (said.started, checkpoint)
                && started < Some(committed)
            {
                trial.problem = Some(format!("committed work was lost: from step {started:?} on after {committed}"));
                return Ok(trial);
            }
            checkpoint = said.checkpoint.or(checkpoint);
            match ended {
                Ok(result) => {
                    trial.problem = self.compare(base, &ground, &result).await?;
                    return Ok(trial);
                }
                // Whatever the dead process made of its error, nobody hears it.
                Err(_) if faults.crashed() => {}
                Err(error) => {
                    let why = chain(&error).join(": ");
                    let clean = matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Data | ErrorKind::Cancelled);
                    if !(clean && first) {
                        trial.problem = Some(format!("attempt {} ended with {:?}: {why}", trial.attempts, error.kind));
                        return Ok(trial);
                    }
                }
            }
            if trial.attempts == ATTEMPTS_MAX {
                trial.problem = Some(format!("not finished after {ATTEMPTS_MAX} attempts"));
                return Ok(trial);
            }
        }
    }

    /// One process: handles of its own on the bytes, and the stage alone.
    async fn attempt(
        &self,
        ground: &Ground,
        faults: &Faults,
        stage: &str,
        resume: bool,
    ) -> Result<(Result<StageResult, Error>, Said), Error> {
        let store = faults.wrap(&ground.store()?);
        let engine = self.engine.ended(store.clone(), LeaseOptions { beat: BEAT, ..LeaseOptions::default() });
        let said = Arc::new(Mutex::new(Said::default()));
        let sink = said.clone();
        let events = Events::new(move |event| {
            let mut said = sink.lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                Event::Checkpoint { step, .. } => said.checkpoint = Some(step),
                Event::StageStarted { resumed_from, .. } => said.started = Some(resumed_from),
                _ => {}
            }
        });
        let select = Selection::Only(stage.to_owned());
        let options = RunOptions { select, events, threads: self.options.threads, ..RunOptions::default() };
        let work = async {
            let run = match resume {
                true => engine.find_run(&store, "last").await.ok(),
                false => None,
            };
            match run {
                Some(id) => engine.resume(&store, &id, &options).await,
                None => engine.run(self.plan, &options).await,
            }
        };
        let report = match tokio::time::timeout(ATTEMPT_MAX, work).await {
            Ok(report) => report,
            Err(_) => Err(Error::internal(format!("it hung for {ATTEMPT_MAX:?}")).into()),
        };
        let ended = match report {
            Ok(report) => {
                let result = report.stages.into_iter().find_map(|report| report.result);
                result.ok_or_else(|| Error::internal("the run ended without a result"))
            }
            Err(EngineError::Failed(error)) => Err(error),
            Err(refused) => Err(Error::internal(refused.to_string())),
        };
        let said = std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner));
        Ok((ended, said))
    }

    /// What differs from the undisturbed run, seen by one who opens the store afterwards.
    async fn compare(&self, base: &Base, ground: &Ground, result: &StageResult) -> Result<Option<String>, Error> {
        let expected = &base.result;
        if result.outputs != expected.outputs {
            return Ok(Some(format!("outputs differ: {:?} instead of {:?}", result.outputs, expected.outputs)));
        }
        // As JSON, where a figure that is not a number equals itself.
        let text = |result: &StageResult| {
            let mut figures = result.metrics.clone();
            figures.retain(|name, _| !base.clocked.contains(name));
            serde_json::to_string(&(figures, &result.lineage, &result.profile)).unwrap_or_default()
        };
        let (found, wanted) = (text(result), text(expected));
        if found != wanted {
            return Ok(Some(format!("figures or lineage differ: {found} instead of {wanted}")));
        }
        let store = ground.store()?;
        match store.read_result(&expected.key).await {
            Ok(Some(stored)) if stored.outputs == expected.outputs => {}
            other => return Ok(Some(format!("the stored result is another: {other:?}"))),
        }
        let damaged = ground.damaged_blobs().await?;
        if !damaged.is_empty() {
            return Ok(Some(format!("damaged blobs were left: {}", damaged.join(", "))));
        }
        let found = store.find_checkpoint(&expected.key).await?;
        Ok((!found.damaged.is_empty()).then(|| format!("damaged checkpoints were left: {:?}", found.damaged)))
    }
}

/// Names of the figures in which two undisturbed runs of a stage differ.
fn differing(one: &StageResult, two: &StageResult, stage: &str) -> Result<BTreeSet<String>, Error> {
    if one.outputs != two.outputs || one.lineage != two.lineage {
        let message = format!("stage `{stage}` is not deterministic: two undisturbed runs made different outputs");
        return Err(Error::data(message).help("disturbances can only be judged by a stage that repeats itself"));
    }
    let text = |result: &StageResult, name: &str| serde_json::to_string(&result.metrics.get(name)).unwrap_or_default();
    let names = one.metrics.keys().chain(two.metrics.keys());
    Ok(names.filter(|name| text(one, name) != text(two, name)).cloned().collect())
}
