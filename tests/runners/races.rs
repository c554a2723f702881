//! Two runs of the program race for one stage: they start together, one or both are killed or paused at random moments, and
//! whoever is left finishes. Seeds are fixed; where a signal falls depends on the machine, and nothing that is compared does.
//!
//! A few races by default, `DSV3_RACES` asks for more; `results/races.md` has what 200 gave:
//!
//!     DSV3_RACES=200 cargo test --test main runners:: -- --nocapture

use std::{collections::BTreeMap, thread, time::Duration};

use dsv3_core::Rng;

use super::shop::{Shop, committed};
use crate::{
    faults::place_before,
    tiny::{self, Ended, recipe, undisturbed},
};

/// Races of each kind: `few` unless `DSV3_RACES` says how many.
pub(super) fn wanted(few: u64) -> u64 {
    std::env::var("DSV3_RACES").map_or(few, |text| text.parse().expect("DSV3_RACES is a number"))
}

/// What races showed.
#[derive(Default)]
struct Tally {
    commits: u64,
    takeovers: u64,
    replaced: u64,
    killed: u64,
    rounds: u64,
}

/// One race to the end of the stage.
fn race(shop: &Shop, seed: u64, tally: &mut Tally) {
    let mut rng = Rng::new(seed).key("races");
    let key = undisturbed().1.key("base");
    let mut owners: BTreeMap<u64, usize> = BTreeMap::new();
    let (mut lives, mut done) = (0, false);
    while !done {
        assert!(lives < 12, "seed {seed}: it never ends");
        let args = ["run", &recipe(), "--until", "base", "--lease-beat", "50ms", "--lease-expire", "400ms"];
        let pair = [shop.start(&args), shop.start(&args)];
        let ids = [pair[0].id(), pair[1].id()];
        // After a few rounds they are left alone, so that the race ends.
        let calm = lives >= 6;
        let signals: Vec<(u64, usize, i32, u64)> = (0..if calm { 0 } else { 1 + rng.below(3) })
            .map(|_| {
                let signal = [libc::SIGKILL, libc::SIGSTOP, libc::SIGSTOP, libc::SIGTERM][rng.below(4) as usize];
                (100 + rng.below(600), rng.below(2) as usize, signal, 300 + rng.below(900))
            })
            .collect();
        let reading = pair.map(|runner| thread::spawn(move || runner.end()));
        for (wait, which, signal, pause) in signals {
            thread::sleep(Duration::from_millis(wait));
            if reading[which].is_finished() {
                continue;
            }
            if tiny::kill_if_there(ids[which], signal) && signal == libc::SIGSTOP {
                thread::sleep(Duration::from_millis(pause));
                tiny::kill_if_there(ids[which], libc::SIGCONT);
            }
        }
        for ended in reading.map(|thread| thread.join().expect("an end")) {
            note(&ended, seed, lives, &mut owners, tally);
            done |= ended.code == Some(0);
            lives += 1;
        }
    }
    let mut fence = 0;
    for (seq, (kind, epoch)) in shop.records(&key) {
        if kind == "fence" {
            assert!(!owners.contains_key(&seq), "seed {seed}: {seq} is a fence and a commit");
            (fence, tally.takeovers) = (epoch.max(fence), tally.takeovers + 1);
        } else {
            assert!(epoch >= fence, "seed {seed}: {seq} of epoch {epoch} behind a fence of {fence}");
        }
    }
    tally.commits += owners.len() as u64;
    tally.rounds += 1;
    shop.is_undisturbed("base");
}

fn note(ended: &Ended, seed: u64, life: usize, owners: &mut BTreeMap<u64, usize>, tally: &mut Tally) {
    match ended.code {
        Some(0) => {}
        Some(75) => tally.replaced += u64::from(ended.errors.contains("taken over this stage")),
        None => tally.killed += 1,
        Some(code) => panic!("seed {seed}: exit {code}: {}", ended.errors),
    }
    for seq in committed(ended, "base") {
        let before = owners.insert(seq, life);
        assert_eq!(before, None, "seed {seed}: number {seq} was committed twice");
    }
}

#[test]
fn two_runs_race_to_the_bits_of_one() {
    let count = wanted(2);
    for kind in ["local disk", "S3"] {
        let mut tally = Tally::default();
        for seed in 0..count {
            let before = place_before("base");
            let shop = if kind == "S3" { Shop::on_s3(&before) } else { Shop::on_disk(&before) };
            race(&shop, seed, &mut tally);
        }
        let Tally { commits, takeovers, replaced, killed, rounds } = tally;
        println!("| program, {kind} | {rounds} | {commits} | {takeovers} | {replaced} | {killed} |");
    }
}
