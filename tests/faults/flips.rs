//! One flipped bit anywhere in a store: each is detected (an error or a warning that names it, the object skipped or
//! refused), healed (what was damaged is made again) or harmless; the results that follow are those of the undisturbed
//! store, bit for bit, or there are none.
//!
//! The store holds a finished stage, one that is finished and read by the next, and one whose process died between two
//! checkpoints. After each flip the run is gone on with, its events and runs are read. A small number of flips by default;
//! `DSV3_FLIPS` asks for more, and `results/flips.md` has what many gave:
//!
//!     DSV3_FLIPS=10000 cargo test --test main bit_flips -- --nocapture

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use dsv3_core::Rng;
use dsv3_pipeline::{
    ALL, Engine, ErrorKind, Event, Events, LeaseOptions, Level, LoadOptions, Outcome, Plan, RunOptions, RunReport,
    Selection, Store,
};
use dsv3_store::faults::{Fault, Faults, Ground, class};
use futures::StreamExt;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::tiny::recipe;

/// Flips in each class of objects unless `DSV3_FLIPS` says how many there are in all.
const FLIPS_OF_CLASS: usize = 6;
/// The stage that was interrupted.
const LAST: &str = "extended";
/// Flips at the same time; most of one is waiting for the lease of the dead process to expire.
const JOBS: usize = 4;

/// What came of a flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Came {
    /// Nothing was said and everything is as it was.
    Harmless,
    /// A warning named it; everything is as it was.
    Skipped,
    /// A stage ran again and made it anew; everything is as it was.
    Healed,
    /// An error named it and nothing else came of it.
    Refused,
}

/// A store in which a stage has been interrupted, and what the undisturbed one ends with.
struct Stage {
    ground: Ground,
    plan: Plan,
    expected: BTreeMap<String, String>,
    events: BTreeSet<String>,
    /// Paths by class of bytes.
    objects: BTreeMap<String, Vec<String>>,
    cache: tempfile::TempDir,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

impl Stage {
    fn engine(&self, store: &Store) -> Engine {
        engine(store, self.cache.path())
    }
}

fn engine(store: &Store, cache: &Path) -> Engine {
    let (beat, expire, poll) = (Duration::from_millis(20), Duration::from_millis(40), Duration::from_millis(4));
    let lease = LeaseOptions { beat, expire, poll, ..LeaseOptions::default() };
    Engine::builder().stages(ALL).store(store.clone()).cache_dir(cache).lease_options(lease).build()
}

/// Options that select up to the interrupted stage, with the events that come.
fn options() -> (RunOptions, Arc<Mutex<Vec<Event>>>) {
    let seen: Arc<Mutex<Vec<Event>>> = Arc::default();
    let sink = seen.clone();
    let events = Events::new(move |event| sink.lock().expect("a lock").push(event));
    let select = Selection::Between { from: None, until: Some(LAST.to_owned()) };
    (RunOptions { select, events, threads: Some(1), ..RunOptions::default() }, seen)
}

/// Outputs, figures and lineage of each stage of a run.
fn results(report: &RunReport) -> BTreeMap<String, String> {
    let of = |stage: &dsv3_pipeline::StageReport| {
        let result = stage.result.as_ref().expect("a result");
        let parts = (&result.outputs, &result.metrics, &result.lineage);
        (stage.stage.clone(), serde_json::to_string(&parts).expect("JSON"))
    };
    report.stages.iter().map(of).collect()
}

async fn plan(cache: &Path) -> Plan {
    let sets = [
        "stages.base.config.length={steps: 2}",
        "stages.base.config.holdout_sequences=2",
        "stages.base.config.schedules.batch={sequences: 2}",
        "stages.base.config.training.checkpoint={steps: 1}",
        "stages.extended.config.phases.0.length={steps: 2}",
        "stages.extended.config.phases.1.length={steps: 1}",
        "stages.extended.config.training.checkpoint={steps: 1}",
    ];
    let options = LoadOptions { sets: sets.map(str::to_owned).to_vec(), ..LoadOptions::default() };
    let engine = engine(&Store::with_memory(), cache);
    let spec = engine.load(Path::new(&recipe()), &options).unwrap_or_else(|report| panic!("{report}"));
    let mut plan = engine.plan(spec).await.expect("a plan");
    let head = |path: &Path| dsv3_data::head(path, 24).map_err(dsv3_pipeline::Error::from);
    plan.shrink_inputs(cache, &head).expect("small inputs");
    plan
}

/// What a blob is: the manifests and checkpoints of the store say so.
async fn blob_classes(store: &Store) -> BTreeMap<String, String> {
    let mut classes = BTreeMap::new();
    for path in store.list_all("").await.expect("a list") {
        let Ok(value) = serde_json::from_slice::<Value>(&store.read(&path).await.expect("read")) else { continue };
        let files = value["files"].as_array().into_iter().flatten();
        let of_checkpoint = path.contains("/checkpoints/");
        if !of_checkpoint && path.starts_with("blobs/") && value["kind"].is_string() {
            classes.insert(path.clone(), "manifest".to_owned());
        }
        for file in files {
            let (name, digest) =
                (file["path"].as_str().unwrap_or_default(), file["digest"].as_str().unwrap_or_default());
            let extension = name.rsplit('.').next().unwrap_or_default();
            let kind = if of_checkpoint { "checkpoint file" } else { "artifact file" };
            classes.entry(format!("blobs/{digest}")).or_insert_with(|| format!("{kind} .{extension}"));
        }
    }
    classes
}

async fn objects(store: &Store) -> BTreeMap<String, Vec<String>> {
    let blobs = blob_classes(store).await;
    let mut objects: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in store.list_all("").await.expect("a list") {
        if store.length(&path).await.expect("a length") == Some(0) {
            continue;
        }
        let known = blobs.get(&path).cloned();
        let other = if path.starts_with("blobs/") { "hook component" } else { class(&path) };
        objects.entry(known.unwrap_or_else(|| other.to_owned())).or_default().push(path);
    }
    objects
}

/// Two stages finished by one run, then a run that dies when the third writes its third checkpoint.
async fn prepare() -> Stage {
    let cache = tempfile::tempdir().expect("a folder");
    let plan = plan(cache.path()).await;
    let ground = Ground::new(None).expect("memory");
    let (mut options, _) = self::options();
    options.select = Selection::Between { from: None, until: Some("base".to_owned()) };
    engine(&ground.store().expect("a store"), cache.path()).run(&plan, &options).await.expect("a run");
    let faults = Faults::default();
    faults.plan("/checkpoints/00000003.json", Fault::CrashBefore, 1);
    let store = faults.wrap(&ground.store().expect("a store"));
    engine(&store, cache.path()).run(&plan, &self::options().0).await.expect_err("a crash");
    assert!(faults.crashed());
    let mut stage =
        Stage { ground, plan, expected: BTreeMap::new(), events: BTreeSet::new(), objects: BTreeMap::new(), cache };
    let calm = stage.ground.fork().expect("a copy").store().expect("a store");
    let report = stage.engine(&calm).run(&stage.plan, &self::options().0).await.expect("a run");
    stage.expected = results(&report);
    let store = stage.ground.store().expect("a store");
    stage.events = events(&store).await.expect("events").into_iter().collect();
    stage.objects = objects(&store).await;
    stage
}

/// Every event of every run, as text.
async fn events(store: &Store) -> Result<Vec<String>, dsv3_pipeline::Error> {
    let mut events = Vec::new();
    for run in store.list_runs().await? {
        events.extend(store.read_events(&run).await?.iter().map(|event| format!("{event:?}")));
    }
    Ok(events)
}

/// What comes of one flipped bit.
async fn flip(stage: &Stage, path: &str, bit: u64) -> Result<Came, String> {
    let ground = stage.ground.fork().map_err(|error| error.to_string())?;
    let store = ground.store().expect("a store");
    let good = store.read(path).await.expect("an object");
    let mut bytes = good.to_vec();
    bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
    ground.replace(path, Some(bytes.into())).await.expect("replaced");
    let mut came = Came::Harmless;
    // What only looks on: it sees what was, or less, or an error.
    match events(&store).await {
        Ok(seen) if seen.iter().any(|event| !stage.events.contains(event)) => {
            return Err(format!("an event that never was: {seen:?}"));
        }
        Ok(seen) if seen.len() < stage.events.len() => came = Came::Skipped,
        Ok(_) => {}
        Err(error) if error.kind == ErrorKind::Data => came = Came::Refused,
        Err(error) => return Err(format!("reading events: {error}")),
    }
    let engine = stage.engine(&ground.store().expect("a store"));
    let store = engine.open_store("memory://").expect("the store");
    if let Err(error) = engine.runs(&store).await
        && error.kind() != ErrorKind::Data
    {
        return Err(format!("listing runs: {error}"));
    }
    // Going on with the run that died; where that is refused, a new run.
    let (options, said) = self::options();
    let last = engine.find_run(&store, "last").await.map_err(|error| error.to_string())?;
    let report = match engine.resume(&store, &last, &options).await {
        Ok(report) => report,
        Err(error) => {
            if error.kind() != ErrorKind::Data {
                return Err(format!("resumed: {:?} {error}", error.kind()));
            }
            came = Came::Refused;
            match engine.run(&stage.plan, &options).await {
                Ok(report) => report,
                Err(error) if error.kind() == ErrorKind::Data => return Ok(Came::Refused),
                Err(error) => return Err(format!("run again: {:?} {error}", error.kind())),
            }
        }
    };
    let found = results(&report);
    if found != stage.expected {
        return Err(format!("results differ: {found:?} instead of {:?}", stage.expected));
    }
    let again = report.stages.iter().any(|one| one.stage != LAST && one.outcome == Outcome::Done);
    if came == Came::Harmless && (again || store.read_if_exists(path).await.ok().flatten() == Some(good)) {
        came = Came::Healed;
    }
    let warned = said.lock().expect("a lock").iter().any(
        |event| matches!(event, Event::Log { level: Level::Warn, message, .. } if !message.starts_with("waiting for")),
    );
    Ok(if came == Came::Harmless && warned { Came::Skipped } else { came })
}

#[test]
fn bit_flips_in_every_class_of_bytes() {
    let wanted = std::env::var("DSV3_FLIPS").ok().map(|text| text.parse::<usize>().expect("DSV3_FLIPS is a number"));
    runtime().block_on(async {
        let stage = prepare().await;
        let of_class = wanted.map_or(FLIPS_OF_CLASS, |all| all.div_ceil(stage.objects.len()));
        let mut rows: BTreeMap<&str, BTreeMap<Came, usize>> = BTreeMap::new();
        let (mut wrong, mut all) = (Vec::new(), 0);
        for (class, paths) in &stage.objects {
            let mut rng = Rng::new(6).key(class.as_str());
            let mut draws = Vec::new();
            for _ in 0..of_class {
                let path = &paths[rng.below(paths.len() as u64) as usize];
                let bytes =
                    stage.ground.store().expect("a store").length(path).await.expect("a length").expect("bytes");
                draws.push((path, rng.below(8 * bytes)));
            }
            let stage = &stage;
            let flips = draws.into_iter().map(|(path, bit)| async move { (path, bit, flip(stage, path, bit).await) });
            let mut flips = futures::stream::iter(flips).buffered(JOBS);
            while let Some((path, bit, came)) = flips.next().await {
                all += 1;
                match came {
                    Ok(came) => *rows.entry(class).or_default().entry(came).or_default() += 1,
                    Err(why) => wrong.push(format!("{class}: bit {bit} of {path}: {why}")),
                }
            }
        }
        println!(
            "| bytes | objects | flips | harmless | skipped | made again | refused |\n|---|---|---|---|---|---|---|"
        );
        for (class, came) in &rows {
            let count = |which| came.get(&which).copied().unwrap_or(0);
            let (objects, flips) = (stage.objects[*class].len(), came.values().sum::<usize>());
            let [a, b, c, d] = [Came::Harmless, Came::Skipped, Came::Healed, Came::Refused].map(count);
            println!("| {class} | {objects} | {flips} | {a} | {b} | {c} | {d} |");
        }
        println!("{all} flips");
        assert!(wrong.is_empty(), "{} of {all} flips:\n{}", wrong.len(), wrong.join("\n"));
        assert!(rows.len() >= 15, "{:?}", rows.keys());
    });
}
