//! Two processes on one stage: waiting, refusing, and taking over from a holder that is killed or paused.

use super::shop::{Shop, committed};
use crate::{faults::place_before, tiny::recipe};

/// Short enough for a test, long enough for a busy machine.
const LEASE: [&str; 4] = ["--lease-beat", "100ms", "--lease-expire", "2s"];

fn base(shop: &Shop) -> super::shop::Runner {
    shop.start(&[&["run", &recipe(), "--until", "base"][..], &LEASE].concat())
}

/// Nothing of an earlier epoch stands behind a fence.
fn nothing_behind_fences(shop: &Shop, key: &str) {
    let mut least = 0;
    for (seq, (kind, epoch)) in shop.records(key) {
        assert!(epoch >= least, "record {seq} of epoch {epoch} stands behind a fence of epoch {least}");
        if kind == "fence" {
            least = epoch;
        }
    }
    assert!(least > 0, "there is a fence");
}

#[test]
fn a_second_runner_waits_and_takes_over_from_a_killed_holder() {
    for (name, shop) in Shop::both(&place_before("base")) {
        let mut holder = base(&shop);
        holder.until_checkpoint("base", 1);
        let mut second = base(&shop);
        second.until_log("waiting for process");
        holder.signal(libc::SIGKILL);
        let (holder, second) = (holder.end(), second.end());
        assert_eq!((holder.code, second.code), (None, Some(0)), "{name}: {}", second.errors);
        assert_eq!(second.outcome("base"), Some("done"));
        let (one, two) = (committed(&holder, "base"), committed(&second, "base"));
        assert!(one.iter().all(|seq| !two.contains(seq)), "{name}: {one:?} and {two:?}");
        nothing_behind_fences(&shop, &second.key("base"));
        shop.is_undisturbed("base");
    }
}

#[test]
fn a_second_runner_waits_for_a_living_holder_and_finds_its_result() {
    for (name, shop) in Shop::both(&place_before("base")) {
        let mut holder = base(&shop);
        holder.until_checkpoint("base", 1);
        let mut second = base(&shop);
        second.until_log("waiting for process");
        let (holder, second) = (holder.end(), second.end());
        assert_eq!((holder.code, second.code), (Some(0), Some(0)), "{name}: {}", second.errors);
        assert_eq!((holder.outcome("base"), second.outcome("base")), (Some("done"), Some("cached")));
        assert!(shop.records(&holder.key("base")).values().all(|(kind, _)| kind == "checkpoint"));
        shop.is_undisturbed("base");
    }
}

/// A holder is paused past its expiry, a second process of the same run takes over, and the first one wakes: while its
/// successor works, or after it has finished.
fn paused(shop: &Shop, while_it_works: bool, place: &str) {
    let mut holder = base(shop);
    holder.until_checkpoint("base", 2);
    holder.signal(libc::SIGSTOP);
    let mut second = shop.start(&[&["resume", "last"][..], &LEASE].concat());
    second.until_log("waiting for process");
    second.until_checkpoint("base", 3);
    let (first, second) = if while_it_works {
        holder.signal(libc::SIGCONT);
        let first = holder.end();
        (first, second.end())
    } else {
        let second = second.end();
        holder.signal(libc::SIGCONT);
        (holder.end(), second)
    };
    assert_eq!((first.code, second.code), (Some(75), Some(0)), "{place}: {}\n{}", first.errors, second.errors);
    assert!(first.errors.contains("has taken over this stage; this process commits nothing more"), "{}", first.errors);
    let (key, run) = (second.key("base"), second.last()["run"].as_str().expect("a run"));
    let (one, two) = (committed(&first, "base"), committed(&second, "base"));
    assert!(one.iter().all(|seq| !two.contains(seq)), "{place}: {one:?} and {two:?}");
    nothing_behind_fences(shop, &key);
    shop.is_undisturbed("base");
    // What the replaced one thinks of the run does not count either.
    let status = shop.status(run);
    assert_eq!((&status["state"], &status["detail"]["stages"]["base"]["outcome"]), (&"done".into(), &"done".into()));
}

#[test]
fn a_paused_holder_wakes_beside_its_successor_and_commits_nothing_more() {
    for (name, shop) in Shop::both(&place_before("base")) {
        paused(&shop, true, name);
    }
}

#[test]
fn a_paused_holder_wakes_after_its_successor_and_commits_nothing_more() {
    for (name, shop) in Shop::both(&place_before("base")) {
        paused(&shop, false, name);
    }
}

#[test]
fn a_second_runner_refuses_with_75_and_names_the_holder() {
    for (name, shop) in Shop::both(&place_before("base")) {
        let mut holder = base(&shop);
        holder.until_checkpoint("base", 1);
        let refuse = ["--if-held", "refuse"];
        let another = shop.start(&[&["run", &recipe(), "--until", "base"][..], &refuse].concat()).end();
        assert_eq!(another.code, Some(75), "{name}: {}", another.errors);
        let run = holder.seen()[0]["run"].as_str().expect("a run").to_owned();
        for part in [format!("process {} on ", holder.id()), format!("(run {run})"), "its heartbeat changed".to_owned()]
        {
            assert!(another.errors.contains(&part), "{name}: `{part}` is not in {}", another.errors);
        }
        let own = another.last()["run"].as_str().expect("a run");
        assert_eq!(shop.status(own)["state"], "cancelled");
        // A process of the same run leaves the run's status to the holder.
        let same = shop.start(&[&["exec", &run, "base"][..], &refuse].concat()).end();
        assert_eq!((same.code, &shop.status(&run)["state"]), (Some(75), &"running".into()), "{name}: {}", same.errors);
        assert_eq!(holder.end().code, Some(0));
        shop.is_undisturbed("base");
    }
}

/// In YAML, overridden by the command line; and one that waits can be told to stop, or stops by itself.
#[test]
fn settings_stand_in_yaml_and_waiting_ends_when_asked() {
    let shop = Shop::on_disk(&place_before("base"));
    let mut holder = base(&shop);
    holder.until_checkpoint("base", 1);
    let yaml = ["run", &recipe(), "--until", "base", "--set", "lease.if_held=refuse"];
    assert_eq!(shop.start(&yaml).end().code, Some(75));
    let mut waiting = shop.start(&[&yaml[..], &["--if-held", "wait"]].concat());
    waiting.until_log("waiting for process");
    waiting.signal(libc::SIGTERM);
    let waiting = waiting.end();
    assert_eq!(waiting.code, Some(75), "{}", waiting.errors);
    assert!(waiting.errors.contains("stopped while waiting for process"), "{}", waiting.errors);
    let late = shop.start(&["run", &recipe(), "--until", "base", "--stop-after", "1s"]).end();
    assert_eq!(late.code, Some(75), "{}", late.errors);
    assert!(late.errors.contains("1 s are over: stopping"), "{}", late.errors);
    let wrong = shop.start(&["run", &recipe(), "--lease-beat", "2s", "--lease-expire", "3s"]).end();
    assert_eq!(wrong.code, Some(64), "{}", wrong.errors);
    assert_eq!(holder.end().code, Some(0));
}
