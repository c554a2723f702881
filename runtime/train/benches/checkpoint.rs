//! What a step waits for when a checkpoint is saved, beside a plain copy of as many bytes, in one run on the same memory.
//!
//!     cargo bench -p dsv3-train --bench checkpoint [-- NAME [SAVES]]
//!
//! `NAME` is a named size (`dsv3-estimate`), M unless said otherwise: 135M parameters. A run over a trainer of that size
//! saves to a local store after each of its steps, which do nothing but wait until the save before is committed, as it is
//! in a run with a minute between two saves, and then change every master and moment. The stall is the run's own metric,
//! `checkpoint_stall_seconds`. With the guard the run copies its start out before its first step and the first save finds
//! that memory; without it the memory is touched beside the first steps. Before each save, for comparison: a copy of as
//! many bytes by one thread into memory that was used before, and a copy by all threads into fresh memory, which is what
//! a save did before its memory was kept.
//!
//! `DSV3_BENCH_DIR` names the folder of the store. Rows are medians; in brackets the least and the most.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use dsv3_core::{Cancel, Event, Events, SystemClock};
use dsv3_model::Model;
use dsv3_ops::Precision;
use dsv3_store::{Store, blocking::Checkpoints};
use dsv3_train::{
    CheckpointEvery, GuardConfig, RunOptions, StepReport, TrainHost, Trainer, TrainerConfig, Work, run_training,
    schedule::Horizon,
};
use rayon::prelude::*;

/// Saves of each run, unless an argument says otherwise.
const SAVES: u64 = 6;
/// Bytes that one task copies.
const PART_BYTES: usize = 1 << 20;

/// Steps that wait for the save before and time plain copies.
struct Steps {
    committed: Arc<AtomicU64>,
    from: Vec<u8>,
    to: Vec<u8>,
    plain: Vec<f64>,
    fresh: Vec<f64>,
}

fn seconds<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let started = Instant::now();
    let done = work();
    (started.elapsed().as_secs_f64(), done)
}

impl Work for Steps {
    fn step(&mut self, trainer: &mut Trainer, _: Horizon) -> dsv3_train::Result<Option<StepReport>> {
        let step = trainer.state.step;
        while self.committed.load(Ordering::SeqCst) < step {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.plain.push(seconds(|| self.to.copy_from_slice(&self.from)).0);
        let fresh = seconds(|| {
            let mut fresh = vec![0_u8; self.from.len()];
            let parts = self.from.par_chunks(PART_BYTES).zip(fresh.par_chunks_mut(PART_BYTES));
            parts.for_each(|(from, to)| to.copy_from_slice(from));
            std::hint::black_box(fresh);
        });
        self.fresh.push(fresh.0);
        for param in trainer.model.params_mut() {
            if let Some(master) = &mut param.master {
                master.as_f32_mut().par_iter_mut().for_each(|x| *x += 1e-3);
            }
        }
        Ok(Some(StepReport { loss: 1.0, skipped: 0, updates: 1, tokens: 1, cursor: step + 1, metrics: Vec::new() }))
    }
}

fn median(list: &[f64]) -> f64 {
    let mut list = list.to_vec();
    list.sort_by(f64::total_cmp);
    list[list.len() / 2]
}

fn row(name: &str, list: &[f64], plain: f64) {
    let (least, most) = list.iter().fold((f64::INFINITY, 0.0), |(a, b), x| (f64::min(a, *x), f64::max(b, *x)));
    let median = median(list);
    println!(
        "| {name} | {median:.3} ({least:.3}–{most:.3}) | {:.2}% ({:.2}%) | {:.2} |",
        median / 60.0 * 100.0,
        most / 60.0 * 100.0,
        median / plain
    );
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let name = args.next().unwrap_or_else(|| "M".to_owned());
    let saves = args.next().and_then(|text| text.parse().ok()).unwrap_or(SAVES).max(2);
    let config = dsv3_estimate::named(&name).expect("a named size").without_mtp().config;
    let folder = std::env::var("DSV3_BENCH_DIR").unwrap_or_else(|_| env!("CARGO_TARGET_TMPDIR").to_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    for (label, guard) in [("with the guard", GuardConfig::default()), ("without it", GuardConfig::finite_only())] {
        let folder = tempfile::tempdir_in(&folder).expect("a folder");
        let store = Store::open(&folder.path().display().to_string()).expect("a store");
        let model = Model::init(&config, Precision::F32, 1).expect("a named size is valid");
        let mut trainer = Trainer::new(model, TrainerConfig::default()).expect("the model has masters");
        let bytes: usize = trainer.snapshot().expect("a snapshot").files.iter().map(|(_, bytes)| bytes.len()).sum();
        let (committed, stalls) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (done, told) = (committed.clone(), stalls.clone());
        let events = Events::new(move |event| match event {
            Event::Checkpoint { step, .. } => done.store(step, Ordering::SeqCst),
            Event::Metric { name, value, .. } if name == "checkpoint_stall_seconds" => told.lock().unwrap().push(value),
            _ => {}
        });
        let checkpoints = Checkpoints::new(store, runtime.handle().clone(), "key", 1, "bench", events.clone());
        let (cancel, clock) = (Cancel::new(), SystemClock::default());
        let checkpoints = &checkpoints;
        let host =
            TrainHost { stage: "bench", events: &events, cancel: &cancel, clock: &clock, checkpoints, as_it_is: false };
        let checkpoint = CheckpointEvery { steps: Some(1), minutes: None, shards: 1 };
        let options = RunOptions { checkpoint, guard, ..RunOptions::new(Horizon::Steps(saves)) };
        let (from, to) = (vec![1; bytes], vec![2; bytes]);
        let mut steps = Steps { committed, from, to, plain: Vec::new(), fresh: Vec::new() };
        run_training(&mut trainer, &mut steps, &host, &options).expect("the run ends");
        let stalls = std::mem::take(&mut *stalls.lock().unwrap());
        let (first, later) = stalls.split_at(1);
        let plain = median(&steps.plain);
        println!("{name}, {label}: {} MB a checkpoint, {} saves\n", bytes / 1_000_000, stalls.len());
        println!("| | seconds | of a minute (the most) | ratio to a plain copy |\n|---|---|---|---|");
        row("a plain copy, one thread, used memory", &steps.plain, plain);
        row("the stall of the first save", first, plain);
        row("the stall of the later saves", later, plain);
        row("a copy by all threads into fresh memory", &steps.fresh, plain);
        println!();
    }
}
