//! The loop on a small model: interruption, rewinding, phases.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use dsv3_core::{Cancel, Digest, Event, Events, FileEntry, VirtualClock};
use dsv3_model::{Batch, ModelConfig};
use dsv3_ops::Precision;
use dsv3_store::Checkpoint;

use super::*;
use crate::{
    adamw::AdamWConfig,
    host::CheckpointStore,
    loss::MicroBatch,
    plan::Schedules,
    schedule::{BatchSchedule, LrSchedule, Switched},
    supervised::{Request, Source, StepData, Supervised},
    trainer::TrainerConfig,
};

#[derive(Default)]
struct Memory {
    list: RefCell<Vec<Checkpoint>>,
    blobs: RefCell<BTreeMap<Digest, Bytes>>,
}

impl CheckpointStore for Memory {
    fn latest(&self) -> Result<Option<Checkpoint>, dsv3_core::Error> {
        Ok(self.list.borrow().last().cloned())
    }
    fn read(&self, checkpoint: &Checkpoint, name: &str) -> Result<Bytes, dsv3_core::Error> {
        let entry = checkpoint.file(name).ok_or_else(|| dsv3_core::Error::data(name))?;
        Ok(self.blobs.borrow()[&entry.digest].clone())
    }
    fn save(&self, snapshot: Snapshot) -> Result<(), dsv3_core::Error> {
        let mut files = Vec::new();
        for (path, bytes) in snapshot.files {
            let entry = FileEntry { path, digest: Digest::of(&bytes), bytes: bytes.len() as u64 };
            self.blobs.borrow_mut().insert(entry.digest, bytes);
            files.push(entry);
        }
        let seq = self.list.borrow().len() as u64 + 1;
        // The store keeps JSON text, so the state must survive it.
        let state = serde_json::from_str(&snapshot.state.to_string()).unwrap();
        self.list.borrow_mut().push(Checkpoint { seq, step: snapshot.step, state, files, tensors: snapshot.tensors });
        Ok(())
    }
}

/// Rows of a counting language; `bad` positions are rows of noise that the loss jumps on.
struct Counting {
    total: u64,
    bad: Vec<std::ops::Range<u64>>,
    stop_at: Option<u64>,
    cancel: Cancel,
    poison: Cell<bool>,
}

impl Source for Counting {
    fn next(&mut self, request: Request<'_>) -> Result<Option<StepData>, dsv3_core::Error> {
        let (positions, cursor) =
            crate::guard::next_positions(request.cursor, request.sequences, self.total, request.excluded);
        if positions.is_empty() {
            return Ok(None);
        }
        if self.stop_at.is_some_and(|at| cursor >= at) {
            self.cancel.cancel();
        }
        let row = |at: &u64| -> Vec<u32> {
            let bad = self.bad.iter().any(|bad| bad.contains(at));
            let next = |i: u64| if bad { 40 + (i * i + 7 * at) % 20 } else { (at + i) % 7 };
            (0..13).map(|i| next(i) as u32).collect()
        };
        let mut micro: MicroBatch = Batch::from_rows(positions.iter().map(row)).into();
        if self.poison.get() && positions.contains(&9) {
            micro.weights = Some(vec![f32::INFINITY; micro.batch.tokens()]);
        }
        Ok(Some(StepData { micro_batches: vec![micro], cursor }))
    }

    fn validation(&mut self) -> Result<Vec<MicroBatch>, dsv3_core::Error> {
        Ok(vec![Batch::from_rows([[0_u32, 1, 2, 3, 4, 5, 6, 0]]).into()])
    }
}

fn config() -> ModelConfig {
    serde_json::from_value(serde_json::json!({
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
        "max_position_embeddings": 64, "num_nextn_predict_layers": 1, "initializer_range": 0.1,
    }))
    .unwrap()
}

fn trainer() -> Trainer {
    let model = dsv3_model::Model::init(&config(), Precision::F32, 3).unwrap();
    Trainer::new(model, TrainerConfig { adamw: AdamWConfig::default(), ..TrainerConfig::default() }).unwrap()
}

fn work(cancel: &Cancel) -> Supervised<Counting> {
    let schedules = Schedules {
        lr: LrSchedule::constant(3e-3),
        batch: BatchSchedule::constant(2),
        mtp_weight: Switched::constant(0.3),
        bias_speed: Switched::constant(0.01),
    };
    let source =
        Counting { total: 1000, bad: Vec::new(), stop_at: None, cancel: cancel.clone(), poison: Cell::new(false) };
    Supervised::new(source, schedules)
}

struct Bench {
    memory: Memory,
    cancel: Cancel,
    steps: Arc<Mutex<Vec<u64>>>,
    logs: Arc<Mutex<Vec<String>>>,
}

impl Bench {
    fn new() -> Self {
        Self { memory: Memory::default(), cancel: Cancel::new(), steps: Arc::default(), logs: Arc::default() }
    }

    fn run(&self, trainer: &mut Trainer, work: &mut dyn Work, options: &RunOptions) -> Result<()> {
        let (steps, logs) = (self.steps.clone(), self.logs.clone());
        let events = Events::new(move |event| match event {
            Event::Metric { name, step, .. } if name == "loss" => steps.lock().unwrap().push(step),
            Event::Log { message, .. } => logs.lock().unwrap().push(message),
            _ => {}
        });
        let clock = VirtualClock::default();
        let host = TrainHost {
            stage: "t",
            events: &events,
            cancel: &self.cancel,
            clock: &clock,
            checkpoints: &self.memory,
            as_it_is: false,
        };
        run_training(trainer, work, &host, options)
    }
}

fn options(steps: u64) -> RunOptions {
    RunOptions {
        checkpoint: CheckpointEvery { steps: Some(4), minutes: None, shards: 1 },
        validate_steps: Some(5),
        ..RunOptions::new(Horizon::Steps(steps))
    }
}

fn same_bits(a: &Trainer, b: &Trainer) {
    let (a, b) = (a.snapshot().unwrap(), b.snapshot().unwrap());
    assert_eq!(a.state, b.state);
    assert!(a.files == b.files, "files differ");
}

#[test]
fn an_interrupted_run_ends_with_the_same_bits() {
    let whole = Bench::new();
    let mut undisturbed = trainer();
    whole.run(&mut undisturbed, &mut work(&whole.cancel), &options(12)).unwrap();
    let losses = undisturbed.state.figures.get("loss").unwrap();
    assert!(losses.last < losses.first, "{losses:?}");
    assert!(undisturbed.state.figures.get("val_loss").unwrap().last < 5.0);

    // Stopped after step 7, then killed (nothing saved) after step 10: goes on from the checkpoint at 8.
    let cut = Bench::new();
    let mut first = work(&cut.cancel);
    first.source.stop_at = Some(14);
    assert!(matches!(cut.run(&mut trainer(), &mut first, &options(12)), Err(Error::Cancelled)));
    assert_eq!(cut.steps.lock().unwrap().last(), Some(&7));
    let resumed = Bench { cancel: Cancel::new(), ..cut };
    resumed.run(&mut trainer(), &mut work(&resumed.cancel), &options(10)).unwrap();
    assert_eq!(resumed.steps.lock().unwrap()[7], 8);
    resumed.memory.list.borrow_mut().retain(|checkpoint| checkpoint.step <= 8);
    resumed.steps.lock().unwrap().clear();
    let mut last = trainer();
    resumed.run(&mut last, &mut work(&resumed.cancel), &options(12)).unwrap();
    assert_eq!(*resumed.steps.lock().unwrap(), [9, 10, 11, 12]);
    same_bits(&undisturbed, &last);
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_recorded() {
    let bench = Bench::new();
    let (mut trainer, mut work) = (trainer(), work(&bench.cancel));
    work.source.poison.set(true);
    bench.run(&mut trainer, &mut work, &options(8)).unwrap();
    let records = &trainer.state.guard.records;
    assert_eq!((records.len(), records[0].step, records[0].samples), (1, 5, [8, 10]));
    assert_eq!(trainer.optimizer.updates(), 7);
}

#[test]
fn a_spike_goes_back_and_leaves_its_samples_out() {
    let mut options = options(24);
    options.guard = GuardConfig { window_steps: 4, spike_steps: 2, spike_deviations: 2.0, ..GuardConfig::default() };
    let run = |bad: std::ops::Range<u64>| {
        let bench = Bench::new();
        let (mut trainer, mut work) = (trainer(), work(&bench.cancel));
        work.schedules.lr = LrSchedule::constant(1e-2);
        work.source.bad = vec![bad];
        bench.run(&mut trainer, &mut work, &options).unwrap();
        (trainer, bench)
    };
    let (spiked, bench) = run(36..40);
    let records = &spiked.state.guard.records;
    assert_eq!(records.len(), 1, "{records:?}");
    assert_eq!((records[0].step, records[0].last_step, records[0].samples), (19, 20, [36, 40]));
    assert_eq!(records[0].back_to_step, Some(16));
    assert!(bench.logs.lock().unwrap()[0].contains("went back to step 16, samples 36..40 are left out"));
    assert_eq!((spiked.state.cursor, spiked.optimizer.updates()), (52, 24));
    let steps = bench.steps.lock().unwrap().clone();
    assert_eq!(steps[18..24], [19, 20, 17, 18, 19, 20]);
}

/// A spike found again before the next checkpoint must not bring back the samples of the first. Where checkpoints lay
/// changes no bit of what is made.
#[test]
fn two_spikes_after_one_checkpoint_leave_both_ranges_out() {
    let run = |every: u64| {
        let mut options = options(24);
        options.guard =
            GuardConfig { window_steps: 4, spike_steps: 2, spike_deviations: 2.0, ..GuardConfig::default() };
        options.checkpoint.steps = Some(every);
        let bench = Bench::new();
        let (mut trainer, mut work) = (trainer(), work(&bench.cancel));
        work.schedules.lr = LrSchedule::constant(1e-2);
        work.source.bad = vec![36..40, 42..46];
        bench.run(&mut trainer, &mut work, &options).unwrap();
        trainer
    };
    let seldom = run(100);
    let ranges = |trainer: &Trainer| -> Vec<[u64; 2]> {
        trainer.state.guard.records.iter().map(|record| record.samples).collect()
    };
    assert_eq!(ranges(&seldom), [[36, 40], [42, 46]]);
    assert_eq!((seldom.state.cursor, seldom.optimizer.updates()), (56, 24));
    for every in [1, 3, 4] {
        let often = run(every);
        let mut expected = seldom.snapshot().unwrap();
        let found = often.snapshot().unwrap();
        for (at, record) in often.state.guard.records.iter().enumerate() {
            expected.state["state"]["guard"]["records"][at]["back_to_step"] = record.back_to_step.into();
        }
        assert_eq!((found.state, found.files == expected.files), (expected.state, true), "every {every}");
    }
}

#[test]
fn phases_resume_where_they_were() {
    let run_phases = |bench: &Bench, phases: u32| {
        let mut trainer = trainer();
        for phase in 0..phases {
            if phase > 0 {
                let config = *trainer.config();
                trainer = trainer.next_phase(config);
            }
            bench.run(&mut trainer, &mut work(&bench.cancel), &options(5)).unwrap();
        }
        trainer
    };
    let whole = Bench::new();
    let undisturbed = run_phases(&whole, 2);
    assert_eq!(*whole.steps.lock().unwrap(), (1..=10).collect::<Vec<_>>());
    let cut = Bench::new();
    run_phases(&cut, 1);
    cut.steps.lock().unwrap().clear();
    same_bits(&undisturbed, &run_phases(&cut, 2));
    assert_eq!(*cut.steps.lock().unwrap(), (6..=10).collect::<Vec<_>>());
}

/// A stage that was saved by any number of ranks goes on with the bits of one that was not disturbed.
#[test]
fn checkpoints_of_one_to_four_ranks_resume_with_equal_bits() {
    let whole = Bench::new();
    let mut undisturbed = trainer();
    whole.run(&mut undisturbed, &mut work(&whole.cancel), &options(6)).unwrap();
    for saved in 1..=4 {
        let sharded = |shards: u32| {
            let mut options = options(6);
            options.checkpoint = CheckpointEvery { steps: Some(2), minutes: None, shards };
            options
        };
        let cut = Bench::new();
        let mut first = work(&cut.cancel);
        first.source.stop_at = Some(8);
        assert!(matches!(cut.run(&mut trainer(), &mut first, &sharded(saved)), Err(Error::Cancelled)));
        let list = cut.memory.list.borrow().clone();
        assert_eq!(list.last().unwrap().files.len(), 2 * saved as usize);
        // The one that goes on may save in another number.
        let resumed = Bench { cancel: Cancel::new(), ..cut };
        let mut last = trainer();
        resumed.run(&mut last, &mut work(&resumed.cancel), &sharded(5 - saved)).unwrap();
        assert_eq!(resumed.memory.list.borrow().last().unwrap().files.len(), 2 * (5 - saved) as usize);
        same_bits(&undisturbed, &last);
    }
}

#[test]
fn a_missing_slice_is_named() {
    let mut trainer = trainer();
    let snapshot = trainer.snapshot_for(3).unwrap();
    let mut tensors = snapshot.tensors.clone();
    tensors.retain(|tensor| tensor.name != "model.norm.weight");
    let error = trainer.restore(&snapshot.state, &tensors, |name| snapshot.read(name)).unwrap_err();
    assert!(error.to_string().contains("there is no model.norm.weight"), "{error}");
    let mut cut = snapshot.clone();
    cut.files[1].1.truncate(200);
    let error = trainer.restore(&cut.state, &cut.tensors, |name| cut.read(name)).unwrap_err();
    assert!(error.to_string().contains("masters-00002-of-00003.safetensors: it does not hold its slice of"), "{error}");
}

/// A store whose commits fail in the background: the run ends, and says why.
#[derive(Default)]
struct Failing(Memory, Cell<bool>);

impl CheckpointStore for Failing {
    fn latest(&self) -> Result<Option<Checkpoint>, dsv3_core::Error> {
        self.0.latest()
    }
    fn read(&self, checkpoint: &Checkpoint, name: &str) -> Result<Bytes, dsv3_core::Error> {
        self.0.read(checkpoint, name)
    }
    fn save(&self, _: Snapshot) -> Result<(), dsv3_core::Error> {
        Ok(())
    }
    fn start(&self, _: Snapshot) -> Result<(), dsv3_core::Error> {
        self.1.set(true);
        Ok(())
    }
    fn finish(&self) -> Result<(), dsv3_core::Error> {
        match self.1.take() {
            true => Err(dsv3_core::Error::unavailable("the disk is full")),
            false => Ok(()),
        }
    }
}

#[test]
fn an_error_of_the_last_save_is_not_lost() {
    let (failing, events, clock, cancel) = (Failing::default(), Events::none(), VirtualClock::default(), Cancel::new());
    let host = TrainHost {
        stage: "t",
        events: &events,
        cancel: &cancel,
        clock: &clock,
        checkpoints: &failing,
        as_it_is: false,
    };
    // One save at the end, and then one on being stopped.
    let error = run_training(&mut trainer(), &mut work(&cancel), &host, &options(2)).unwrap_err();
    assert!(matches!(&error, Error::Store { source } if source.message == "the disk is full"), "{error:?}");
    let mut stopped = work(&cancel);
    stopped.source.stop_at = Some(2);
    let error = run_training(&mut trainer(), &mut stopped, &host, &options(2)).unwrap_err();
    assert!(matches!(error, Error::Store { .. }), "{error:?}");
}

/// Notes where the memory of each copy lies, and between two saves takes whatever memory of that length is free.
#[derive(Default)]
struct Places {
    seen: RefCell<Vec<Vec<usize>>>,
    in_flight: RefCell<Vec<Bytes>>,
    taken: RefCell<Vec<Vec<u8>>>,
}

impl CheckpointStore for Places {
    fn latest(&self) -> Result<Option<Checkpoint>, dsv3_core::Error> {
        Ok(None)
    }
    fn read(&self, _: &Checkpoint, name: &str) -> Result<Bytes, dsv3_core::Error> {
        Err(dsv3_core::Error::data(name))
    }
    fn save(&self, snapshot: Snapshot) -> Result<(), dsv3_core::Error> {
        self.start(snapshot)?;
        self.finish()
    }
    fn start(&self, snapshot: Snapshot) -> Result<(), dsv3_core::Error> {
        assert!(self.in_flight.borrow().is_empty(), "two copies at a time");
        let files: Vec<Bytes> = snapshot.files.into_iter().map(|(_, bytes)| bytes).collect();
        self.seen.borrow_mut().push(files.iter().map(|bytes| bytes.as_ptr() as usize).collect());
        *self.in_flight.borrow_mut() = files;
        Ok(())
    }
    fn finish(&self) -> Result<(), dsv3_core::Error> {
        let lengths: Vec<usize> = self.in_flight.take().iter().map(Bytes::len).collect();
        self.taken.borrow_mut().extend(lengths.into_iter().map(|length| vec![0; length]));
        Ok(())
    }
}

/// Whether the run begins with a copy of its start, for the guard, or not.
#[test]
fn every_copy_of_a_run_lies_in_the_same_memory() {
    for guard in [GuardConfig::default(), GuardConfig::finite_only()] {
        let (places, events, clock, cancel) =
            (Places::default(), Events::none(), VirtualClock::default(), Cancel::new());
        let host = TrainHost {
            stage: "t",
            events: &events,
            cancel: &cancel,
            clock: &clock,
            checkpoints: &places,
            as_it_is: false,
        };
        let mut options = RunOptions { guard, ..options(4) };
        options.checkpoint = CheckpointEvery { steps: Some(1), minutes: None, shards: 2 };
        run_training(&mut trainer(), &mut work(&cancel), &host, &options).unwrap();
        let seen = places.seen.into_inner();
        let of = |copy: &Vec<usize>| copy.iter().copied().collect::<std::collections::BTreeSet<_>>();
        assert_eq!((seen.len(), of(&seen[0]).len()), (4, 4));
        assert!(seen.iter().all(|copy| of(copy) == of(&seen[0])), "{seen:?}");
    }
}

/// Asked for its checkpoint as it is, a run takes no step and writes nothing.
#[test]
fn a_checkpoint_is_taken_as_it_is() {
    let bench = Bench::new();
    let mut first = trainer();
    bench.run(&mut first, &mut work(&bench.cancel), &options(4)).unwrap();
    let (events, clock) = (Events::none(), VirtualClock::default());
    let host = TrainHost {
        stage: "t",
        events: &events,
        cancel: &bench.cancel,
        clock: &clock,
        checkpoints: &bench.memory,
        as_it_is: true,
    };
    let (mut taken, saved) = (trainer(), bench.memory.list.borrow().len());
    run_training(&mut taken, &mut work(&bench.cancel), &host, &options(12)).unwrap();
    // The first run validated once more after its last checkpoint, which tells of the model and changes nothing in it.
    assert!(first.snapshot().unwrap().files == taken.snapshot().unwrap().files);
    assert_eq!((taken.state.step, bench.memory.list.borrow().len()), (4, saved));
}
