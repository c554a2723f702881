//! Stored runs: every format that was ever written stays readable, a copy is as good as the original, `verify` finds what
//! was changed and does steps again, a stage resumes from checkpoints of any number of shards and from any of them.
//!
//! `tests/data/stores/<format>/` holds stores written by the build of that format (`README.md` there says how).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use dsv3_core::json_digest;
use dsv3_test_s3::S3Server;
use serde_json::{Value, json};

use crate::tiny::{Ended, Place};

const SIGTERM: i32 = 15;

/// Folders of `tests/data/stores`, by format.
fn corpora() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/stores");
    let entries = std::fs::read_dir(folder).expect("the corpus").flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries.filter(|path| path.join("expected.json").is_file()).collect();
    found.sort();
    assert!(found.len() >= 2, "{found:?}");
    found
}

fn newest() -> PathBuf {
    corpora().pop().expect("a corpus")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().expect("a parent")).expect("a folder");
    assert!(Command::new("cp").arg("-r").arg(from).arg(to).status().expect("cp runs").success());
    // Blobs are read-only; tests damage and move them.
    assert!(Command::new("chmod").args(["-R", "u+w"]).arg(to).status().expect("chmod runs").success());
}

/// A copy of a stored store, and what must be found in it.
fn opened(corpus: &Path) -> (Place, Value) {
    let place = Place::new();
    copy(&corpus.join("store"), &place.store());
    let text = std::fs::read_to_string(corpus.join("expected.json")).expect("what to expect");
    (place, serde_json::from_str(&text).expect("JSON"))
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("no {pointer} in {value}"))
}

/// Runs the program in a place; gives exit code and both outputs.
fn ask(place: &Place, args: &[&str]) -> (Option<i32>, String) {
    let output = place.command(args).output().expect("the program runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

fn expect(place: &Place, code: i32, args: &[&str]) -> String {
    let (found, said) = ask(place, args);
    assert_eq!(found, Some(code), "{args:?}\n{said}");
    said
}

fn resumed(place: &Place, args: &[&str]) -> Ended {
    let ended = place.watch(&[&["resume"], args].concat(), |_| None);
    assert_eq!(ended.code, Some(0), "{args:?}\n{}", ended.errors);
    ended
}

/// Files of a folder by name.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let read = |path: PathBuf| std::fs::read(path).expect("a file");
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), read(entry.path()))).collect()
}

#[test]
fn every_stored_format_lists_verifies_exports_and_resumes_with_the_same_bits() {
    for corpus in corpora() {
        let (place, expected) = opened(&corpus);
        let (done, stopped) = (text(&expected, "/finished_run"), text(&expected, "/stopped_run"));
        let listed = expect(&place, 0, &["runs"]);
        assert!(listed.contains(done) && listed.contains(stopped), "{listed}");
        for run in [done, stopped] {
            let said = expect(&place, 0, &["verify", run]);
            assert!(said.contains("certificate: runs/"), "{said}");
        }
        // A checkpoint of a stage that has not finished, and the last of one that has: the latter is the stage's own end.
        let out = |name: &str| place.path().join(name).display().to_string();
        let said = expect(&place, 0, &["inspect", stopped, "longer"]);
        assert!(said.contains("\"finished\": false") && said.contains("checkpoint 1: step "), "{said}");
        expect(&place, 0, &["export", stopped, "longer", "--at", "1", "--out", &out("longer-1")]);
        dsv3_model::load(Path::new(&out("longer-1")), dsv3_model::LoadPrecision::Own, false).expect("a model");
        expect(&place, 0, &["export", done, "base", "--at", "1", "--out", &out("base-1")]);
        expect(&place, 0, &["export", done, "base", "--at", "2", "--out", &out("base-2")]);
        expect(&place, 0, &["get", done, "base.model", &out("base")]);
        assert!(files(Path::new(&out("base-2"))) == files(Path::new(&out("base"))), "{}", corpus.display());
        assert!(files(Path::new(&out("base-1"))) != files(Path::new(&out("base"))));
        let ended = resumed(&place, &[stopped]);
        assert_eq!(ended.key("longer"), text(&expected, "/keys/longer"));
        assert_eq!(ended.output("longer", "model"), text(&expected, "/outputs/longer/model"), "{}", corpus.display());
        let step = ended.of("stage_started", "longer").next().expect("a start")["resumed_from"].as_u64();
        assert!(step.is_some_and(|step| step > 0), "{step:?}");
        expect(&place, 0, &["verify", stopped]);
    }
}

#[test]
fn what_a_newer_build_wrote_is_refused_with_the_build_to_use() {
    let (place, expected) = opened(&newest());
    let (run, key) = (text(&expected, "/stopped_run"), text(&expected, "/keys/longer"));
    let newer = |path: &Path| {
        let mut value: Value = serde_json::from_slice(&std::fs::read(path).expect("a record")).expect("JSON");
        let fields = value.as_object_mut().expect("a map");
        fields.insert("format".to_owned(), json!(77));
        fields.insert("build".to_owned(), json!("8.1.0"));
        if fields.remove("check").is_some() {
            let check = json_digest(&value).to_string();
            value["check"] = json!(check);
        }
        let old = std::fs::read(path).expect("a record");
        std::fs::write(path, serde_json::to_vec(&value).expect("JSON")).expect("written");
        old
    };
    let checkpoint = place.store().join(format!("stages/{key}/checkpoints/00000001.json"));
    for later in 2..9 {
        let _ = std::fs::remove_file(place.store().join(format!("stages/{key}/checkpoints/{later:08}.json")));
    }
    let old = newer(&checkpoint);
    for args in [&["resume", run][..], &["verify", run], &["export", run, "longer", "--out", "x"]] {
        let said = expect(&place, 65, args);
        assert!(said.contains("is of format 77, written by dsv3-pipeline 8.1.0; this build ("), "{said}");
        assert!(said.contains("use that version of dsv3-pipeline, or a newer one"), "{said}");
    }
    std::fs::write(&checkpoint, old).expect("written");
    let plan = place.store().join(format!("runs/{run}/plan.json"));
    newer(&plan);
    let said = expect(&place, 65, &["resume", run]);
    assert!(said.contains("the plan is of format 77, written by dsv3-pipeline 8.1.0"), "{said}");
}

/// One byte is changed in each kind of object; `verify` names the object and nothing else is wrong.
#[test]
fn verify_names_what_was_changed() {
    let (place, expected) = opened(&newest());
    let (run, key) = (text(&expected, "/finished_run").to_owned(), text(&expected, "/keys/base"));
    let store = place.store();
    let record: Value = serde_json::from_slice(
        &std::fs::read(store.join(format!("stages/{key}/checkpoints/00000001.json"))).expect("a record"),
    )
    .expect("JSON");
    let shard = text(&record, "/files/0/digest").to_owned();
    let result: Value =
        serde_json::from_slice(&std::fs::read(store.join(format!("stages/{key}/result.json"))).expect("a result"))
            .expect("JSON");
    let manifest = text(&result, "/outputs/0/digest").to_owned();
    let objects = [
        format!("runs/{run}/plan.json"),
        format!("runs/{run}/status/00000001.json"),
        format!("runs/{run}/events/00000001.jsonl"),
        format!("stages/{key}/key.json"),
        format!("stages/{key}/result.json"),
        format!("stages/{key}/leases/00000001.json"),
        format!("stages/{key}/checkpoints/00000002.json"),
        format!("blobs/{shard}"),
        format!("blobs/{manifest}"),
        format!("blobs/{}", place.file_digest(&manifest, "config.json")),
    ];
    for object in objects {
        let path = store.join(&object);
        let good = std::fs::read(&path).expect("an object");
        let mut bad = good.clone();
        // A quote or a letter in the middle of it: no text of ours survives the change of a digit or of its structure.
        let middle = bad.len() / 2;
        bad[middle] ^= 0x10;
        std::fs::write(&path, bad).expect("written");
        let said = expect(&place, 65, &["verify", &run]);
        assert!(said.contains("damaged: ") && said.contains(&object), "{object}\n{said}");
        assert!(!said.contains("certificate:"), "{said}");
        std::fs::write(&path, good).expect("written");
    }
    // A file that is gone is named too, and whole again everything is.
    let path = store.join(format!("blobs/{shard}"));
    let good = std::fs::read(&path).expect("a shard");
    std::fs::remove_file(&path).expect("removed");
    let said = expect(&place, 65, &["verify", &run, "base"]);
    assert!(
        said.contains(&shard) && said.contains("does not exist") && said.contains("checkpoint 1 of base"),
        "{said}"
    );
    std::fs::write(&path, good).expect("written");
    expect(&place, 0, &["verify", &run]);
}

#[test]
fn a_replay_has_the_bits_of_the_log_and_of_the_next_checkpoint() {
    let (place, expected) = opened(&newest());
    let (run, key) = (text(&expected, "/finished_run"), text(&expected, "/keys/base"));
    let before = files(&place.store().join(format!("stages/{key}/checkpoints")));
    let said = expect(&place, 0, &["verify", run, "base", "--replay", "10", "--at", "1"]);
    assert!(said.contains("steps 4 to 6 again from checkpoint 1: 3 losses and"), "{said}");
    assert!(said.contains("state and tensors compared with checkpoint 2"), "{said}");
    // Two steps do not reach the next checkpoint: their figures are compared alone.
    let said = expect(&place, 0, &["verify", run, "base", "--replay", "2", "--at", "1"]);
    assert!(said.contains("steps 4 to 5 again") && said.contains("no tensors compared"), "{said}");
    assert!(before == files(&place.store().join(format!("stages/{key}/checkpoints"))));
    let certificate = place.store().join(format!("runs/{run}/certificates/00000001.json"));
    let certificate: Value = serde_json::from_slice(&std::fs::read(certificate).expect("written")).expect("JSON");
    assert_eq!(certificate["format"], 1);
    assert_eq!(certificate["replay"]["losses"], 3);
    assert_eq!(certificate["replay"]["compared_seq"], 2);
    assert!(certificate["machine"]["version"].is_string() && certificate["profile"]["device"] == "cpu");
    // Another loss in the log, though every line of it is an event.
    let log = place.store().join(format!("runs/{run}/events/00000001.jsonl"));
    let lines = std::fs::read_to_string(&log).expect("a log");
    // Without its header, as segments once were: that one would find the change at once.
    let changed: Vec<String> = lines
        .lines()
        .skip(1)
        .map(|line| match serde_json::from_str::<Value>(line) {
            Ok(mut event) if event["stage"] == "base" && event["name"] == "loss" && event["step"] == 5 => {
                let value = event["value"].as_f64().expect("a loss");
                event["value"] = json!(f64::from_bits(value.to_bits() + 1));
                event.to_string()
            }
            _ => line.to_owned(),
        })
        .collect();
    std::fs::write(&log, changed.join("\n") + "\n").expect("written");
    let said = expect(&place, 65, &["verify", run, "base", "--replay", "3", "--at", "1"]);
    assert!(said.contains("differs: step 5: loss is"), "{said}");
}

/// A finished stage is done again from an old checkpoint and comes out the same; what was committed stays.
#[test]
fn a_stage_resumes_at_a_checkpoint_and_nothing_committed_is_lost() {
    let (place, expected) = opened(&newest());
    let (run, key) = (text(&expected, "/finished_run"), text(&expected, "/keys/base"));
    let folder = place.store().join(format!("stages/{key}/checkpoints"));
    let before = files(&folder);
    let said = expect(&place, 0, &["inspect", run, "base"]);
    assert!(said.contains("checkpoint 1: step 3, ") && said.contains("checkpoint 2: step 6, "), "{said}");
    let ended = resumed(&place, &[run, "base", "--at", "1"]);
    assert_eq!(ended.of("stage_started", "base").next().expect("a start")["resumed_from"], 3);
    assert_eq!(ended.output("base", "model"), text(&expected, "/outputs/base/model"));
    let steps: Vec<u64> = ended
        .of("metric", "base")
        .filter(|event| event["name"] == "loss")
        .filter_map(|event| event["step"].as_u64())
        .collect();
    assert_eq!(steps, [4, 5, 6]);
    let after = files(&folder);
    assert!(before.iter().all(|(name, bytes)| after.get(name) == Some(bytes)), "an old record was changed");
    // A rewind and one more checkpoint.
    assert_eq!(after.len(), before.len() + 2);
    let rewind: Value = serde_json::from_slice(&after["00000003.json"]).expect("JSON");
    assert_eq!(
        (&rewind["kind"], &rewind["rewind"]["to"], &rewind["rewind"]["run"]),
        (&json!("rewind"), &json!(1), &json!(run))
    );
    expect(&place, 0, &["verify", run]);
    // The last run is the stopped one: the short form takes its stage.
    let ended = resumed(&place, &["longer", "--at", "1"]);
    assert_eq!(ended.output("longer", "model"), text(&expected, "/outputs/longer/model"));
    for (args, code, said) in [
        (vec!["resume", run, "base", "--at", "3"], 65, "no checkpoint 3; it has 1, 2, 4"),
        (vec!["resume", run, "base", "--at", "77"], 65, "no checkpoint 77; it has 1, 2, 4"),
        (vec!["resume", run, "nothing", "--at", "1"], 64, "no stage"),
        (vec!["resume", run, "base"], 64, "--at"),
    ] {
        let found = expect(&place, code, &args);
        assert!(found.contains(said), "{args:?}\n{found}");
    }
}

/// A real stage is stopped with its checkpoint in 1 to 4 shards and goes on: key and output are those of one shard.
#[test]
fn a_stage_saved_in_one_to_four_shards_ends_with_the_same_bits() {
    let newest = newest();
    let recipe = newest.parent().expect("a folder").join("store.yaml").display().to_string();
    let expected = opened(&newest).1;
    for shards in 1..=4 {
        let place = Place::new();
        let set = format!("stages.longer.config.training.checkpoint.shards={shards}");
        let run = ["run", &recipe, "--set", &set, "--threads", "1"];
        let late = |event: &Value| event["event"] == "metric" && event["stage"] == "longer" && event["step"] == 17;
        let ended = place.watch(&run, |event| late(event).then_some(SIGTERM));
        assert_eq!(ended.code, Some(75), "{}", ended.errors);
        let key = ended.key("longer");
        assert_eq!(key, text(&expected, "/keys/longer"), "shards are in the key");
        let record = std::fs::read(place.store().join(format!("stages/{key}/checkpoints/00000001.json")));
        let record: Value = serde_json::from_slice(&record.expect("a record")).expect("JSON");
        assert_eq!(record["files"].as_array().map(Vec::len), Some(2 * shards));
        assert_eq!(record["format"], 2);
        let ended = resumed(&place, &["last"]);
        assert_eq!(ended.output("longer", "model"), text(&expected, "/outputs/longer/model"), "{shards} shards");
        // How long saving took is told in events and nowhere else.
        for name in ["checkpoint_stall_seconds", "checkpoint_save_seconds"] {
            assert!(ended.of("metric", "longer").any(|event| event["name"] == name), "no {name}");
        }
        assert!(!place.result(&key).to_string().contains("checkpoint_"));
        expect(&place, 0, &["verify", "last", "longer", "--replay", "8", "--at", "1"]);
    }
}

/// The store is copied to another folder, into a bucket and from one prefix of it to another; what it was copied from goes.
#[test]
fn a_copied_store_is_as_good_as_the_original() {
    let (place, expected) = opened(&newest());
    let (done, stopped) = (text(&expected, "/finished_run"), text(&expected, "/stopped_run"));
    let server = S3Server::start();
    let bucket = server.bucket_folder();
    copy(&place.store(), &bucket.join("one"));
    std::fs::rename(bucket.join("one"), bucket.join("elsewhere")).expect("moved");
    let url = server.url("elsewhere");
    let in_bucket = |code: i32, args: &[&str]| {
        let output = place.command(args).args(["--store", &url]).envs(server.env()).output().expect("the program runs");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}\n{said}");
        said
    };
    in_bucket(0, &["verify", done]);
    let said = in_bucket(0, &["resume", stopped, "--json"]);
    assert!(said.contains(text(&expected, "/outputs/longer/model")), "{said}");
    in_bucket(0, &["verify", stopped]);
    // From the bucket back into a folder, and on from there.
    let back = place.path().join("back");
    copy(&bucket.join("elsewhere"), &back);
    drop(server);
    std::fs::remove_dir_all(place.store()).expect("removed");
    let store = format!("file://{}", back.display());
    for run in [done, stopped] {
        expect(&place, 0, &["verify", run, "--store", &store]);
        expect(&place, 0, &["resume", run, "--store", &store]);
    }
}
