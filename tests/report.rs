//! `report` as a user sees it: page and plots of a whole tiny life, several seeds, the guard's lineage, refusals.

use std::{collections::BTreeMap, path::Path, process::Output};

use dsv3_pipeline::{StageResult, Store};
use quick_xml::{Reader, events::Event};
use serde_json::{Value, json};

use crate::tiny::{self, Place};

/// Stages of the tiny recipe that train.
const TRAINED: [&str; 4] = ["base", "extended", "sft", "rl"];

fn run(place: &Place, args: &[&str]) -> Output {
    place.command(&[&["report"], args].concat()).output().expect("the program runs")
}

/// Runs `report` to a good end; what it said and the folder's files by name.
fn report(place: &Place, args: &[&str]) -> (String, BTreeMap<String, String>) {
    let out = tempfile::tempdir().expect("a temporary folder");
    let folder = out.path().display().to_string();
    let output = run(place, &[args, &["--out", &folder]].concat());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let entries = std::fs::read_dir(out.path()).expect("a folder").flatten();
    let read = |path: &Path| std::fs::read_to_string(path).expect("a text file");
    (said, entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), read(&entry.path()))).collect())
}

/// The curves of an SVG: lines of more than two points. The text must be well-formed XML.
fn curves(svg: &str) -> usize {
    let (mut reader, mut found, mut depth) = (Reader::from_str(svg), 0, 0);
    loop {
        match reader.read_event().unwrap_or_else(|error| panic!("{error}: {svg}")) {
            Event::Start(_) => depth += 1,
            Event::End(_) => depth -= 1,
            Event::Empty(element) if element.name().as_ref() == b"polyline" => {
                let points = element.try_get_attribute("points").expect("attributes").expect("points");
                found += usize::from(String::from_utf8_lossy(&points.value).split_whitespace().count() > 2);
            }
            Event::Eof => break,
            _ => {}
        }
    }
    assert_eq!(depth, 0, "{svg}");
    found
}

/// The cells of the table's line for a figure.
fn line<'a>(page: &'a str, figure: &str) -> Vec<&'a str> {
    let line = page.lines().find(|line| line.starts_with(&format!("| `{figure}` |")));
    line.unwrap_or_else(|| panic!("{figure} is missing in\n{page}"))
        .trim_matches('|')
        .split('|')
        .map(str::trim)
        .collect()
}

fn close(cell: &str, value: f64) -> bool {
    let read: f64 = cell.replace(',', "").parse().unwrap_or(f64::NAN);
    (read - value).abs() <= 1e-3 * value.abs()
}

#[test]
fn every_closing_figure_and_every_curve_of_a_life_is_in_the_report() {
    let (place, ended) = tiny::undisturbed();
    let (said, files) = report(place, &[]);
    assert_eq!(said.lines().count(), 3, "{said}");
    let page = &files["report.md"];
    assert!(page.starts_with("# tiny: 1 run"), "{page}");
    for words in ["| 3 | done |", "threads on", "1 of 1 floors met", "dsv3-pipeline run ", "No finished stage skipped"]
    {
        assert!(page.contains(words), "{words} in\n{page}");
    }
    let mut figures = 0;
    for stage in ended.events.iter().filter(|event| event["event"] == "stage_started") {
        let (name, key) = (stage["stage"].as_str().expect("a name"), stage["key"].as_str().expect("a key"));
        assert!(page.contains(&key[..12]), "{name}");
        for (metric, figure) in place.result(key)["metrics"].as_object().expect("metrics") {
            let (value, full) = (figure["value"].as_f64().expect("a number"), format!("{name}.{metric}"));
            figures += 1;
            // Figures by length and depth stand in small matrices instead.
            let parts: Vec<&str> = metric.split('.').collect();
            let cell = parts.windows(2).any(|pair| pair.iter().all(|part| part.parse::<u64>().is_ok()));
            assert!(cell || line(page, &full).iter().any(|cell| close(cell, value)), "{full} {value} in\n{page}");
        }
    }
    assert!(figures > 100, "{figures}");
    assert_eq!(curves(&files["loss.svg"]), TRAINED.len());
    assert!(files["loss.svg"].contains("mean reward") && files["loss.svg"].contains("loss (nats per token)"));
    assert_eq!(curves(&files["accuracy.svg"]), 0);
    assert!(files["accuracy.svg"].contains("YaRN untrained") && files["accuracy.svg"].contains("exact.accuracy"));

    let (said, _) = report(place, &["latest", "--json"]);
    let value: Value = serde_json::from_str(&said).expect("one JSON value");
    assert_eq!((&value["floors_met"], &value["files"].as_array().map(Vec::len)), (&json!(1), &Some(3)));
    let stages = value["report"]["runs"][0]["stages"].as_array().expect("stages");
    let base = stages.iter().find(|stage| stage["stage"] == "base").expect("base");
    let steps: Vec<u64> =
        base["series"]["loss"].as_array().expect("a series").iter().filter_map(|at| at[0].as_u64()).collect();
    assert_eq!(steps, (1..=24).collect::<Vec<u64>>());
}

#[test]
fn two_seeds_in_two_stores_have_mean_and_spread() {
    let (first, _) = tiny::undisturbed();
    let second = Place::new();
    second.done(&["--set", "seed=4", "--until", "base"]);
    let other = format!("latest@file://{}", second.store().display());
    let (_, files) = report(first, &["latest", &other, "--prefix", "tiny-"]);
    let page = &files["tiny-report.md"];
    assert!(page.contains("sample standard deviation (n = 2"), "{page}");
    let cells = line(page, "base.val_loss_last");
    let [a, b, mean, spread] = [1, 2, 3, 4].map(|i| cells[i].parse::<f64>().expect("a number"));
    assert!(a != b && (mean - (a + b) / 2.0).abs() < 2e-3, "{cells:?}");
    assert!((spread - (a - b).abs() / 2f64.sqrt()).abs() < 2e-3, "{cells:?}");
    // The second run was not asked for more than the base model.
    assert!(line(page, "sft.loss_last").contains(&"–"), "{page}");
    assert_eq!(curves(&files["tiny-loss.svg"]), TRAINED.len() + 1);
    assert!(files["tiny-loss.svg"].contains("seed 4"));
}

#[test]
fn the_tables_go_between_the_marks_of_a_file() {
    let (place, _) = tiny::undisturbed();
    let own = Place::new();
    let file = own.write("README.md", "before\n<!-- report -->\nold\n<!-- /report -->\nafter\n");
    report(place, &["--into", &file]);
    let text = std::fs::read_to_string(&file).expect("a file");
    assert!(text.starts_with("before\n<!-- report -->\n") && text.ends_with("<!-- /report -->\nafter\n"), "{text}");
    assert!(text.contains("`base.val_loss_ratio`") && !text.contains("old"), "{text}");
    assert!(text.contains("loss.svg)") && text.contains("report.md)"), "{text}");
}

#[test]
fn what_the_guard_did_is_in_the_report() {
    let place = Place::new();
    let ended = place.done(&["--until", "base"]);
    let key = ended.key("base");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let store = Store::open(&format!("file://{}", place.store().display())).expect("the store");
        let mut result: StageResult = store.read_result(&key).await.expect("a record").expect("a result");
        result.lineage = json!({ "guard": [
            { "action": "skipped", "step": 5, "last_step": 5, "samples": [24, 32], "loss": null },
            { "action": "rewound", "step": 9, "last_step": 11, "samples": [56, 80], "loss": 9.25, "back_to_step": 4 },
        ]});
        store.delete(&format!("stages/{key}/result.json")).await.expect("a deleted record");
        store.commit_result(&key, &result).await.expect("a new record");
    });
    let (_, files) = report(&place, &[]);
    let page = &files["report.md"];
    assert!(page.contains("| seed 3 | `base` | skipped the step | 5 | not finite | 24..32 |"), "{page}");
    assert!(
        page.contains("| seed 3 | `base` | went back to step 4, left the samples out | 9–11 | 9.250 | 56..80 |"),
        "{page}"
    );
}

#[test]
fn a_report_of_nothing_says_what_to_do() {
    let place = Place::new();
    let refused = |args: &[&str], code: i32, words: &[&str]| {
        let output = run(&place, &[args, &["--out", "out"]].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{word} in {said}"));
    };
    refused(&[], 64, &["there is no store at ./runs"]);
    std::fs::create_dir(place.store()).expect("a folder");
    refused(&[], 64, &["holds no runs", "dsv3-pipeline run PIPELINE --store"]);
    place.done(&["--until", "corpus"]);
    refused(&["zzz"], 64, &["no run `zzz`", "dsv3-pipeline runs"]);
    refused(&["latest@file://./nowhere"], 64, &["there is no store at ./nowhere"]);
    refused(&["latest", "latest"], 64, &["stands twice"]);
    refused(&["--into", "nowhere.md"], 64, &["nowhere.md"]);
    let file = place.write("file", "");
    let output = run(&place, &["--out", &format!("{file}/below")]);
    assert_eq!(output.status.code(), Some(69), "{}", String::from_utf8_lossy(&output.stderr));
    // A run that stopped before anything finished.
    let run_folder =
        std::fs::read_dir(place.store().join("runs")).expect("runs").flatten().next().expect("a run").path();
    std::fs::create_dir_all(place.store().join("runs/zz/status")).expect("a folder");
    std::fs::copy(run_folder.join("plan.json"), place.store().join("runs/zz/plan.json")).expect("a copy");
    std::fs::remove_dir_all(place.store().join("stages")).expect("removed results");
    refused(&["zz"], 64, &["has finished no stage", "dsv3-pipeline resume zz"]);
}
