//! `kill -9` at random moments: while the program starts, between two steps, before the first checkpoint, while a
//! checkpoint is written, after the last step. Every next process goes on from what it finds, with one thread and two in
//! turn; a stage that is finished begins anew in a fresh store until all kills are spent. Outputs, metrics of every step and
//! closing figures are those of an undisturbed run, bit for bit, and no process does more than one interval of
//! steps again, and one more whose checkpoint was being committed when it was killed.
//!
//! Three kills in every training stage by default; `DSV3_KILLS` asks for more, and `results/kills.md` has what a hundred
//! gave:
//!
//!     DSV3_KILLS=100 cargo test --test main kills_at_random -- --nocapture
//!
//! What kind of moment each kill is, at which step and after what share of a measured time, is drawn from a fixed seed;
//! where it falls then depends on the machine, and nothing that is compared depends on where it falls.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Once, OnceLock},
    thread,
    time::{Duration, Instant},
};

use dsv3_core::Rng;
use serde_json::Value;

use super::attempts::{Attempts, BASE, EXTENDED, RL, SFT, Training, last_checkpoint};
use crate::tiny::{Ended, Place, Signal, recipe, undisturbed};

/// Kills in each training stage unless `DSV3_KILLS` says how many.
const KILLS: u64 = 3;
/// From this many on every class of moments must have been met.
const KILLS_TELLING: u64 = 50;
/// Kinds of moments in turn, an odd number of them, so that each meets one thread and two.
const KINDS: [Kind; 7] = [Kind::Step, Kind::Saving, Kind::Start, Kind::Step, Kind::Saving, Kind::Step, Kind::Saving];
/// Smallest file that belongs to a checkpoint, in bytes.
const CHECKPOINT_BYTES_MIN: u64 = 50_000;

fn kills_wanted() -> u64 {
    std::env::var("DSV3_KILLS").map_or(KILLS, |text| text.parse().expect("DSV3_KILLS is a number"))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Some share of the time that the program takes to come to the stage.
    Start,
    /// Some share of a step after a step.
    Step,
    /// When the first file of a checkpoint appears, or a little later.
    Saving,
}

/// A moment to be killed at.
struct Moment {
    kind: Kind,
    /// Which step, or which checkpoint, of this process.
    count: u64,
    /// Share of the time that the kind measures.
    share: f64,
}

/// Times that shares are taken of, as measured on the processes before.
struct Times {
    start: Duration,
    step: Duration,
}

/// What a process was doing when it was killed, told from what it said and left.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Met {
    Start,
    BeforeFirst,
    Between,
    Saving,
    AfterLast,
}

/// What a stage was put through.
#[derive(Default)]
struct Tally {
    kills: u64,
    lives: u64,
    rounds: u64,
    met: BTreeMap<Met, u64>,
    steps_done: u64,
    steps_max: u64,
    rows_read: f64,
    rows_needed: f64,
    rows_max: f64,
    repeated_max: u64,
}

/// Places in which all that a stage needs is finished and nothing of the stage itself is there.
pub(crate) fn place_before(stage: &str) -> Place {
    static LADDER: OnceLock<BTreeMap<&str, Place>> = OnceLock::new();
    let ladder = LADDER.get_or_init(|| {
        let mut places = BTreeMap::from([("corpus", Place::new()), ("traces", Place::new())]);
        let place = Place::new();
        let climb: [(&[&str], &[&'static str]); 5] = [
            (&["corpus"], &["base"]),
            (&["base"], &["extended"]),
            (&["extended", "traces"], &["sft"]),
            (&["sft"], &["rl"]),
            (&["rl"], &["evaluation", "release"]),
        ];
        for (needed, next) in climb {
            needed.iter().for_each(|stage| drop(place.done(&["--until", stage])));
            places.extend(next.iter().map(|stage| (*stage, Place::copy_of(&place))));
        }
        places
    });
    Place::copy_of(&ladder[stage])
}

/// Names of the large files that belong to no committed checkpoint.
fn loose_files(place: &Place, key: &str) -> BTreeSet<String> {
    let list = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().collect::<Vec<_>>();
    let mut committed = BTreeSet::new();
    for record in list(&place.store().join("stages").join(key).join("checkpoints")) {
        let record = std::fs::read(record.path()).expect("a record");
        let record: Value = serde_json::from_slice(&record).expect("a whole record");
        let files = record["files"].as_array().into_iter().flatten();
        committed.extend(files.filter_map(|file| file["digest"].as_str().map(str::to_owned)));
    }
    let files = ["blobs", "tmp"].into_iter().flat_map(|folder| list(&place.store().join(folder)));
    let large = files.filter(|file| file.metadata().is_ok_and(|data| data.len() >= CHECKPOINT_BYTES_MIN));
    large.map(|file| file.file_name().to_string_lossy().into_owned()).filter(|name| !committed.contains(name)).collect()
}

impl Moment {
    /// The next moment; in a fresh store it lies before the first checkpoint.
    fn draw(rng: &mut Rng, number: u64, fresh: bool, training: &Training) -> Self {
        let kind = if fresh { Kind::Step } else { KINDS[(number % KINDS.len() as u64) as usize] };
        let count = match kind {
            Kind::Start => 0,
            Kind::Step if fresh => 1 + rng.below(training.interval - 1),
            Kind::Step => 1 + rng.below(training.interval + 1),
            Kind::Saving => 1 + rng.below(2),
        };
        Self { kind, count, share: rng.below(1000) as f64 / 1000.0 }
    }

    /// One process of the stage, killed at this moment unless it ends before.
    fn live(&self, place: &Place, training: &Training, threads: &str, times: &mut Times) -> Ended {
        let (stage, interval) = (training.stage, training.interval);
        let args = ["run", &recipe(), "--until", stage, "--threads", threads];
        let (begun, share) = (Instant::now(), self.share);
        let start = times.start.mul_f64(share);
        let planned = (self.kind == Kind::Start).then(|| Signal::after(libc::SIGKILL, move || thread::sleep(start)));
        let (mut seen, mut last) = (0, None::<Instant>);
        place.watch_late(&args, planned, |event| {
            if event["stage"] != stage {
                return None;
            }
            if event["event"] == "stage_started" {
                times.start = begun.elapsed();
            }
            if event["event"] != "metric" || event["name"] != "loss" {
                return None;
            }
            if let Some(last) = last.replace(Instant::now()) {
                times.step = last.elapsed();
            }
            let due = event["step"].as_u64().is_some_and(|step| step.is_multiple_of(interval));
            seen += u64::from(self.kind == Kind::Step || due);
            if seen < self.count || (self.kind == Kind::Saving && !due) {
                return None;
            }
            let later = times.step.mul_f64(share);
            Some(match self.kind {
                Kind::Saving => Signal::after(libc::SIGKILL, wait_for_a_file(place, later)),
                _ => Signal::after(libc::SIGKILL, move || thread::sleep(later)),
            })
        })
    }
}

/// Waits until the store begins another file, and then some of the time that a checkpoint takes.
fn wait_for_a_file(place: &Place, later: Duration) -> impl FnOnce() + Send + 'static {
    let folder = place.store().join("tmp");
    let count = move || std::fs::read_dir(&folder).map_or(0, Iterator::count);
    let before = count();
    move || {
        let begun = Instant::now();
        while count() <= before && begun.elapsed() < Duration::from_secs(1) {
            thread::sleep(Duration::from_micros(100));
        }
        thread::sleep(later.mul_f64(0.25));
    }
}

impl Tally {
    /// Notes what a killed process was doing.
    fn note(&mut self, ended: &Ended, training: &Training, new_loose: bool, checkpoints: bool) {
        let stage = training.stage;
        let began = ended.of("stage_started", stage).next();
        let at_end = began.is_some_and(|event| event["resumed_from"].as_u64() == Some(training.steps))
            || last_checkpoint(ended, stage) == Some(training.steps);
        let met = match began {
            None => Met::Start,
            Some(_) if at_end => Met::AfterLast,
            Some(_) if new_loose => Met::Saving,
            Some(_) if checkpoints => Met::Between,
            Some(_) => Met::BeforeFirst,
        };
        *self.met.entry(met).or_default() += 1;
        self.kills += 1;
    }

    /// Works at a stage in a fresh store until it is finished, with as many kills as are left.
    fn round(&mut self, training: &Training, kills: u64, rng: &mut Rng, times: &mut Times) {
        let (place, mut attempts) = (place_before(training.stage), Attempts::new(training));
        let key = undisturbed().1.key(training.stage);
        let (kills_before, lives_before) = (self.kills, self.lives);
        loop {
            let threads = if self.lives.is_multiple_of(2) { "1" } else { "2" };
            let loose = loose_files(&place, &key);
            let ended = if self.kills < kills {
                let fresh = self.lives == lives_before;
                Moment::draw(rng, self.lives, fresh, training).live(&place, training, threads, times)
            } else {
                place.run(&["--until", training.stage, "--threads", threads])
            };
            self.lives += 1;
            attempts.add(&ended);
            match ended.code {
                Some(0) => break,
                Some(code) => panic!("exit {code}: {}", ended.errors),
                None => {
                    let new_loose = !loose_files(&place, &key).is_subset(&loose);
                    let folder = place.store().join("stages").join(&key).join("checkpoints");
                    let checkpoints = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
                    self.note(&ended, training, new_loose, checkpoints);
                }
            }
        }
        let stops = self.kills - kills_before;
        attempts.finish(&place, stops);
        let (steps_max, rows_max) = attempts.bounds(stops);
        self.rounds += 1;
        self.steps_done += attempts.steps_done;
        self.steps_max += steps_max;
        self.rows_read += attempts.rows_read;
        self.rows_needed += attempts.rows_needed();
        self.rows_max += rows_max;
        self.repeated_max = self.repeated_max.max(attempts.repeated_max);
    }

    /// A row of the table in `results/kills.md`.
    fn show(&self, training: &Training) {
        static HEAD: Once = Once::new();
        HEAD.call_once(|| {
            println!(
                "| stage | kills | at start | before the first checkpoint | between checkpoints | writing one | after the \
                 last step | processes | finished runs | steps done / needed / bound | most steps done again (interval) \
                 | rows read / needed / bound |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
            );
        });
        let met = |met: Met| self.met.get(&met).copied().unwrap_or(0);
        let Training { stage, steps, interval } = training;
        let rows = match self.rows_needed {
            0.0 => "not counted here".to_owned(),
            needed => format!("{} / {needed} / {}", self.rows_read, self.rows_max),
        };
        println!(
            "| {stage} | {} | {} | {} | {} | {} | {} | {} | {} | {} / {} / {} | {} ({interval}) | {rows} |",
            self.kills,
            met(Met::Start),
            met(Met::BeforeFirst),
            met(Met::Between),
            met(Met::Saving),
            met(Met::AfterLast),
            self.lives,
            self.rounds,
            self.steps_done,
            steps * self.rounds,
            self.steps_max,
            self.repeated_max,
        );
    }
}

fn survives(training: &Training) {
    let kills = kills_wanted();
    let mut rng = Rng::new(5).key("kills").key(training.stage);
    let mut times = Times { start: Duration::from_millis(200), step: Duration::from_millis(20) };
    let mut tally = Tally::default();
    while tally.kills < kills {
        tally.round(training, kills, &mut rng, &mut times);
    }
    tally.show(training);
    if kills >= KILLS_TELLING {
        for met in [Met::Start, Met::BeforeFirst, Met::Between, Met::Saving] {
            assert!(tally.met.contains_key(&met), "{}: a class of moments was never met", training.stage);
        }
    }
}

#[test]
fn kills_at_random_in_pretraining() {
    survives(&BASE);
}

#[test]
fn kills_at_random_in_context_extension() {
    survives(&EXTENDED);
}

#[test]
fn kills_at_random_in_sft() {
    survives(&SFT);
}

#[test]
fn kills_at_random_in_rl() {
    survives(&RL);
}

/// Stages without checkpoints begin anew and end with the same outputs.
#[test]
fn kills_at_random_elsewhere() {
    let (calm, whole) = undisturbed();
    let kills = kills_wanted().div_ceil(3);
    for stage in ["corpus", "traces", "evaluation", "release"] {
        let mut rng = Rng::new(5).key("kills").key(stage);
        let seconds = whole.of("stage_finished", stage).next().expect("its end")["seconds"].as_f64().expect("a number");
        let key = whole.key(stage);
        let check = |place: &Place| {
            place.done(&["--until", stage]);
            let (expected, found) = (calm.result(&key), place.result(&key));
            assert_eq!(found["outputs"], expected["outputs"], "{stage}");
            assert_eq!(found["metrics"], expected["metrics"], "{stage}");
        };
        let (mut place, mut killed, mut runs) = (place_before(stage), 0, 1);
        while killed < kills {
            let later = Duration::from_secs_f64(seconds * rng.below(1000) as f64 / 1000.0);
            let ended = place.watch_late(&["run", &recipe(), "--until", stage], None, |event| {
                let began = event["event"] == "stage_started" && event["stage"] == stage;
                began.then(|| Signal::after(libc::SIGKILL, move || thread::sleep(later)))
            });
            match ended.code {
                None => killed += 1,
                // Too late, or finished by the kill before.
                Some(0) => {
                    check(&place);
                    (place, runs) = (place_before(stage), runs + 1);
                }
                Some(code) => panic!("exit {code}: {}", ended.errors),
            }
        }
        check(&place);
        println!("{stage}: killed {killed} times, finished {runs} times");
    }
}
