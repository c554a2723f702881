//! `gc`, retention and `runs`, by the program: what is kept stays usable, what nobody names goes, on a local disk and on S3.

use std::fs;

use serde_json::Value;

use super::shop::Shop;
use crate::{
    faults::place_before,
    tiny::{Place, recipe, undisturbed},
};

fn json_lines(shop: &Shop, args: &[&str]) -> Vec<Value> {
    let output = shop.command(&[args, &["--store", &shop.url(), "--json"]].concat()).output().expect("it runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn blobs(shop: &Shop) -> usize {
    fs::read_dir(shop.folder().join("blobs")).expect("blobs").count()
}

/// A whole life is kept to the last byte; once its run is dropped, nothing is left of it.
#[test]
fn a_kept_run_loses_nothing_and_a_dropped_one_goes_entirely() {
    for (name, shop) in Shop::both(&undisturbed().0) {
        let before = blobs(&shop);
        let dry = json_lines(&shop, &["gc", "--grace", "0s", "--dry-run"]);
        let real = json_lines(&shop, &["gc", "--grace", "0s"]);
        let sum = |lines: &[Value]| {
            (lines.last().expect("a sum")["removed"].clone(), lines.last().expect("a sum")["bytes"].clone())
        };
        assert_eq!(sum(&dry), sum(&real), "{name}");
        assert!(blobs(&shop) <= before);
        for stage in ["corpus", "base", "extended", "traces", "sft", "rl", "evaluation", "release", "server"] {
            shop.is_undisturbed(stage);
        }
        // Other tests may have run again in the place that was copied.
        let earlier = json_lines(&shop, &["runs"]).len();
        let again = shop.start(&["run", &recipe()]).end();
        assert_eq!(again.code, Some(0), "{}", again.errors);
        let ran = again.events.iter().filter(|event| event["event"] == "stage_started").count();
        assert_eq!(ran, 0, "{name}: everything is finished and whole");
        let runs = json_lines(&shop, &["runs"]);
        assert_eq!(runs.len(), earlier + 1);
        for run in &runs {
            assert_eq!(
                (&run["state"], &run["stages_done"], &run["stages_total"]),
                (&"done".into(), &9.into(), &9.into())
            );
            assert!(run["bytes"].as_u64() > Some(100_000), "{run}");
        }
        // All but one of the runs that name the same stages may go without them.
        let ids: Vec<&str> = runs.iter().filter_map(|run| run["run"].as_str()).collect();
        let (last, others) = ids.split_last().expect("a run");
        for id in others {
            json_lines(&shop, &["gc", "--grace", "0s", "--drop-run", id]);
        }
        shop.is_undisturbed("server");
        json_lines(&shop, &["gc", "--grace", "0s", "--drop-run", last]);
        assert_eq!(json_lines(&shop, &["runs"]), Vec::<Value>::new());
        assert_eq!(blobs(&shop), 0, "{name}");
        let fresh = shop.start(&["run", &recipe(), "--until", "base"]).end();
        assert_eq!(fresh.code, Some(0), "{}", fresh.errors);
        shop.is_undisturbed("base");
    }
}

/// Young things, and whatever a holder may be about to name, are left alone.
#[test]
fn a_running_stage_loses_nothing_to_a_collection() {
    for (name, shop) in Shop::both(&place_before("base")) {
        let mut runner = shop.start(&["run", &recipe(), "--until", "base"]);
        runner.until_checkpoint("base", 1);
        let shown = json_lines(&shop, &["gc", "--grace", "0s"]);
        let live = &shown.last().expect("a sum")["live"];
        assert!(live.to_string().contains(&undisturbed().1.key("base")), "{name}: {live}");
        let run = runner.seen()[0]["run"].as_str().expect("a run").to_owned();
        let listed = json_lines(&shop, &["runs"]);
        let own = listed.iter().find(|one| one["run"] == run.as_str()).expect("listed");
        assert!(own["holder"].to_string().contains(&format!("process {} on", runner.id())), "{name}: {own}");
        assert_eq!(own["state"], "running");
        // It cannot be dropped either.
        let drop = shop.command(&["gc", "--drop-run", &run, "--store", &shop.url()]).output().expect("it runs");
        assert_eq!(drop.status.code(), Some(75), "{}", String::from_utf8_lossy(&drop.stderr));
        assert_eq!(runner.end().code, Some(0));
        shop.is_undisturbed("base");
        assert_eq!(shop.start(&["run", &recipe(), "--until", "extended"]).end().code, Some(0));
        shop.is_undisturbed("extended");
    }
}

/// Superseded checkpoints go by themselves, the key and the outputs stay what they are.
#[test]
fn retention_removes_superseded_checkpoints_and_changes_nothing_else() {
    for (name, shop) in Shop::both(&place_before("base")) {
        let policy = "stages.base.retention={ keep_last: 1, keep_every: 8, keep_best: { metric: loss } }";
        let mut runner = shop.start(&["run", &recipe(), "--until", "base", "--set", policy]);
        runner.until_checkpoint("base", 4);
        runner.signal(libc::SIGKILL);
        runner.end();
        let ended = shop.start(&["run", &recipe(), "--until", "base", "--set", policy]).end();
        assert_eq!(ended.code, Some(0), "{}", ended.errors);
        shop.is_undisturbed("base");
        let key = undisturbed().1.key("base");
        let kept: Vec<u64> =
            shop.records(&key).into_iter().filter(|(_, (kind, _))| kind == "checkpoint").map(|(seq, _)| seq).collect();
        let all = undisturbed().0.store().join("stages").join(&key).join("checkpoints");
        let all = fs::read_dir(all).expect("checkpoints").count();
        assert!(kept.len() < all, "{name}: kept {kept:?} of {all}");
        // What is left can be gone on from and is named whole.
        json_lines(&shop, &["gc", "--grace", "0s"]);
        fs::remove_file(shop.folder().join(format!("stages/{key}/result.json"))).expect("a result");
        let last = shop.start(&["run", &recipe(), "--until", "base", "--set", policy]).end();
        assert_eq!(last.code, Some(0), "{}", last.errors);
        assert_eq!(last.of("metric", "base").filter(|event| event["name"] == "loss").count(), 0, "{name}");
        shop.is_undisturbed("base");
    }
}

/// What an interrupted process left behind goes once it is old enough, and not before.
#[test]
fn what_nobody_names_goes_after_the_grace_period() {
    let shop = Shop::on_disk(&Place::new());
    let mut runner = shop.start(&["run", &recipe(), "--until", "corpus"]);
    runner.until(|event| event["event"] == "artifact");
    runner.signal(libc::SIGKILL);
    runner.end();
    let temporary = shop.folder().join("tmp/left-behind");
    fs::create_dir_all(shop.folder().join("tmp")).expect("a folder");
    fs::write(&temporary, b"half").expect("a file");
    let young = json_lines(&shop, &["gc"]);
    assert_eq!(young.last().expect("a sum")["removed"], 0);
    assert!(young.last().expect("a sum")["spared_bytes"].as_u64() > Some(0));
    let old = json_lines(&shop, &["gc", "--grace", "0s"]);
    assert!(old.iter().any(|item| item["what"] == "blob") && !temporary.exists(), "{old:?}");
    assert_eq!(shop.start(&["run", &recipe(), "--until", "corpus"]).end().code, Some(0));
    shop.is_undisturbed("corpus");
}
