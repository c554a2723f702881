//! SIGTERM, SIGINT and SIGUSR1 at random moments of every stage: while the program starts and plans, inside the stage, when a
//! checkpoint is due, when the stage or the run has just ended, one signal or two. The process ends with 75, or with 0 when it
//! was done; a training stage has saved its last step; and a second process ends with the bits of an undisturbed run. On a
//! local disk and on a real S3 server by turns.
//!
//! One moment a stage by default, `DSV3_SIGNALS` asks for more of each; `results/races.md` has what 25 gave:
//!
//!     DSV3_SIGNALS=25 cargo test --test main runners::signals -- --nocapture

use std::{collections::BTreeMap, fs, thread, time::Duration};

use dsv3_core::Rng;
use serde_json::Value;

use super::shop::{Runner, Shop};
use crate::{
    faults::place_before,
    tiny::{self, Ended, recipe, undisturbed},
};

/// All stages of the recipe, and steps between checkpoints of those that train.
const STAGES: [(&str, u64); 9] = [
    ("corpus", 0),
    ("base", 4),
    ("extended", 4),
    ("traces", 0),
    ("sft", 4),
    ("rl", 3),
    ("evaluation", 0),
    ("release", 0),
    ("server", 0),
];
const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Start,
    Inside,
    Saving,
    StageEnd,
    RunEnd,
}

const MOMENTS: [Moment; 5] = [Moment::Inside, Moment::Start, Moment::Saving, Moment::RunEnd, Moment::StageEnd];

/// Waits until the process has its own handlers: before that a signal ends it as any program.
fn handlers_stand(process: u32) {
    for _ in 0..2000 {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
        if SIGNALS.iter().all(|signal| caught & (1 << (signal - 1)) != 0) {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no handlers");
}

/// Reads on to the moment; none when the process ends before.
fn wait_for(runner: &mut Runner, moment: Moment, stage: &str, interval: u64, rng: &mut Rng) -> Option<()> {
    let share = rng.below(1000) as f64 / 1000.0;
    let of_stage = |event: &Value, kind: &str| event["event"] == kind && event["stage"] == stage;
    match moment {
        Moment::Start => {
            handlers_stand(runner.id());
            thread::sleep(Duration::from_millis(300).mul_f64(share));
            Some(())
        }
        Moment::Inside => {
            runner.until(|event| of_stage(event, "stage_started"))?;
            let (_, whole) = undisturbed();
            let end = whole.of("stage_finished", stage).next().expect("its end");
            thread::sleep(Duration::from_secs_f64(end["seconds"].as_f64().expect("a number") * share));
            Some(())
        }
        Moment::Saving if interval > 0 => {
            let due = interval * (1 + rng.below(3));
            runner.until(|event| of_stage(event, "metric") && event["step"].as_u64() >= Some(due)).map(drop)
        }
        Moment::Saving | Moment::StageEnd => runner.until(|event| of_stage(event, "stage_finished")).map(drop),
        Moment::RunEnd => runner.until(|event| event["event"] == "run_finished").map(drop),
    }
}

/// A training stage that was asked once has saved the last step it told of.
fn lost_nothing(ended: &Ended, stage: &str) {
    let steps = ended.of("metric", stage).filter(|event| event["name"] == "loss");
    let Some(last) = steps.filter_map(|event| event["step"].as_u64()).last() else { return };
    let saved = ended.of("checkpoint", stage).last().and_then(|event| event["step"].as_u64());
    assert_eq!(saved, Some(last), "{stage}: {}", ended.errors);
}

#[test]
fn signals_at_any_moment_of_any_stage() {
    let each: u64 = std::env::var("DSV3_SIGNALS").map_or(1, |text| text.parse().expect("DSV3_SIGNALS is a number"));
    let mut met: BTreeMap<(Moment, Option<i32>), u64> = BTreeMap::new();
    for (place, (stage, interval)) in STAGES.into_iter().enumerate() {
        for i in 0..each {
            let mut rng = Rng::new(11).key("signals").key(stage).key(i);
            let moment = MOMENTS[(i as usize + place) % MOMENTS.len()];
            // The server's own needs are finished by the process that is stopped, unless it is stopped before.
            let before = place_before(if stage == "server" { "release" } else { stage });
            // Every moment meets both kinds of store when each stage has ten of them.
            let in_bucket = (i as usize / MOMENTS.len() + place) % 2 == 1;
            let shop = if in_bucket { Shop::on_s3(&before) } else { Shop::on_disk(&before) };
            let mut runner = shop.start(&["run", &recipe(), "--until", stage]);
            let id = runner.id();
            let told = wait_for(&mut runner, moment, stage, interval, &mut rng);
            let (first, second) = (SIGNALS[rng.below(3) as usize], SIGNALS[rng.below(3) as usize]);
            let twice = rng.below(3) == 0;
            if told.is_some() {
                tiny::kill(id, first);
                if twice {
                    thread::sleep(Duration::from_millis(rng.below(30)));
                    // Not waited for yet, so its id is still its own.
                    tiny::kill(id, second);
                }
            }
            let ended = runner.end();
            *met.entry((moment, ended.code)).or_default() += 1;
            assert!(matches!(ended.code, Some(0 | 75)), "{stage} {moment:?}: {:?} {}", ended.code, ended.errors);
            if ended.code == Some(75) && !(twice && first == libc::SIGINT && second == libc::SIGINT) {
                lost_nothing(&ended, stage);
            }
            assert_eq!(shop.start(&["run", &recipe(), "--until", stage]).end().code, Some(0), "{stage} {moment:?}");
            shop.is_undisturbed(stage);
        }
    }
    for ((moment, code), count) in met {
        println!("| {moment:?} | exit {} | {count} |", code.unwrap_or(-1));
    }
}

/// The time runs out in the middle of a stage, and again, until it is done.
#[test]
fn a_deadline_stops_at_a_checkpoint_and_the_next_process_goes_on() {
    let shop = Shop::on_disk(&place_before("base"));
    let args = ["run", &recipe(), "--until", "base", "--stop-after"];
    let mut runner = shop.start(&[&args[..], &["1500ms"]].concat());
    // Held back by a test that does not read, it cannot be done in time.
    runner.until_checkpoint("base", 1);
    thread::sleep(Duration::from_millis(1600));
    let ended = runner.end();
    assert_eq!(ended.code, Some(75), "{}", ended.errors);
    assert!(ended.errors.contains("are over: stopping at the next checkpoint"), "{}", ended.errors);
    lost_nothing(&ended, "base");
    assert_eq!(shop.start(&[&args[..], &["1h"]].concat()).end().code, Some(0));
    shop.is_undisturbed("base");
    let wrong = shop.start(&[&args[..], &["soon"]].concat()).end();
    assert_eq!(wrong.code, Some(64), "{}", wrong.errors);
}
