//! A whole life in a bucket: a real S3 server over HTTP in this process, the program beside it, found by environment
//! variables alone. What it makes has the bits of a run in a folder, also when it is killed, when answers are lost on the way
//! and when the store does not honour conditional create and the user said so.

use dsv3_test_s3::{Fault, S3Server};
use serde_json::Value;

use crate::tiny::{Ended, Place, recipe, undisturbed};

/// Every stage that finished has the key and the outputs of the undisturbed run in a folder.
fn equals_undisturbed(place: &Place, ended: &Ended, stages: usize) {
    let (folder, reference) = undisturbed();
    let started = ended.events.iter().filter(|event| event["event"] == "stage_finished");
    let names: Vec<&str> = started.filter_map(|event| event["stage"].as_str()).collect();
    assert_eq!(names.len(), stages, "{names:?}");
    for stage in names {
        let key = reference.key(stage);
        assert_eq!(place.result(&key)["outputs"], folder.result(&key)["outputs"], "{stage}");
    }
}

fn says(place: &Place, args: &[&str]) -> (Option<i32>, String) {
    let output = place.command(args).output().expect("the program runs");
    (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn a_whole_life_in_a_bucket_is_that_of_a_folder() {
    let server = S3Server::start();
    let place = Place::in_bucket(&server, "team/runs");
    // Some of everything that passes by itself.
    for (method, fault) in [
        ("PUT", Fault::Status(503)),
        ("PUT", Fault::LostAnswer(500)),
        ("PUT", Fault::CutAfter),
        ("GET", Fault::CutBody),
        ("GET", Fault::Status(429)),
    ] {
        server.faults().plan(method, "stages/", fault, 1);
    }
    let ended = place.done(&["--threads", "2"]);
    let stages = undisturbed().1.events.iter().filter(|event| event["event"] == "stage_finished").count();
    equals_undisturbed(&place, &ended, stages);
    assert_eq!(server.open_uploads(), 0);
    let again = place.done(&[]);
    assert!(again.events.iter().all(|event| event["event"] != "stage_started"), "all is cached");
    // Commands that get a URL alone find the bucket by the environment.
    let url = server.url("team/runs");
    let (code, runs) = says(&place, &["runs", "--store", &url]);
    assert!(code == Some(0) && runs.contains("tiny"), "{runs}");
    let (code, got) = says(&place, &["get", "last", "release.model", "model", "--store", &url]);
    assert_eq!(code, Some(0), "{got}");
    assert!(place.path().join("model/config.json").is_file());
}

#[test]
fn killed_in_a_bucket_a_run_goes_on_from_its_checkpoint() {
    let server = S3Server::start();
    let place = Place::in_bucket(&server, "runs");
    let kill_at = |step: u64| {
        move |event: &Value| {
            let there = event["event"] == "metric" && event["stage"] == "base" && event["step"].as_u64() >= Some(step);
            there.then_some(libc::SIGKILL)
        }
    };
    let killed = place.watch(&["run", &recipe(), "--until", "base"], kill_at(9));
    assert_eq!(killed.code, None, "{}", killed.errors);
    let killed = place.watch(&["resume", "last"], kill_at(17));
    assert_eq!(killed.code, None, "{}", killed.errors);
    let first = killed.of("metric", "base").find_map(|event| event["step"].as_u64());
    assert!(first > Some(4), "it goes on from a checkpoint: {first:?}");
    let ended = place.watch(&["exec", "last", "base"], |_| None);
    assert_eq!(ended.code, Some(0), "{}", ended.errors);
    equals_undisturbed(&place, &ended, 1);
}

#[test]
fn a_bucket_without_conditional_create_is_refused_or_promised_to_one_writer() {
    let server = S3Server::start();
    server.faults().ignore_conditions(true);
    let place = Place::in_bucket(&server, "runs");
    let refused = place.run(&["--until", "corpus"]);
    assert_eq!(refused.code, Some(64), "{}", refused.errors);
    for part in ["does not honour conditional create", "help: ", "conditional_create: single_writer"] {
        assert!(refused.errors.contains(part), "{part} in\n{}", refused.errors);
    }
    assert!(!place.store().join("runs").exists(), "nothing of a run was written");
    let map = format!("{{ url: \"{}\", conditional_create: single_writer }}", server.url("runs"));
    for (store, code) in [(&server.url("runs"), 64), (&map, 0)] {
        let collected = place.command(&["gc", store]).output().expect("it runs");
        let said = String::from_utf8_lossy(&collected.stderr).into_owned();
        assert_eq!(collected.status.code(), Some(code), "{said}");
        assert!(said.contains("does not honour conditional create"), "{said}");
    }
    let place = place.reached(map, server.env());
    let warned = |ended: &Ended| {
        let mut said = ended.of("log", "store").filter_map(|event| event["message"].as_str());
        assert!(said.any(|text| text.contains("single_writer")), "{}", ended.errors);
    };
    let ended = place.done(&["--until", "corpus"]);
    warned(&ended);
    equals_undisturbed(&place, &ended, 1);
    // The run's plan says it, so that a later process need not.
    let place = place.reached(server.url("runs"), server.env());
    let ended = place.watch(&["resume", "last"], |event| (event["event"] == "run_started").then_some(libc::SIGTERM));
    warned(&ended);
}

#[test]
fn options_of_the_yaml_reach_the_bucket_and_hold_no_secret() {
    let server = S3Server::start();
    let map = format!(
        "{{ url: \"{}\", endpoint: \"{}\", region: us-east-1, path_style: true, allow_http: true, part_mib: 5 }}",
        server.url("runs"),
        server.endpoint()
    );
    let place = Place::in_bucket(&server, "runs").reached(map, server.credentials());
    let ended = place.done(&["--until", "corpus"]);
    equals_undisturbed(&place, &ended, 1);
    let run = ended.last()["run"].as_str().expect("a run").to_owned();
    let plan = std::fs::read_to_string(place.store().join("runs").join(&run).join("plan.json")).expect("a plan");
    assert!(plan.contains(&server.endpoint()) && plan.contains("\"part_mib\": 5"), "{plan}");
    for (name, value) in server.credentials().iter().filter(|(name, _)| name.contains("KEY")) {
        assert!(!plan.contains(value), "{name} is in the plan");
    }
    let again = place.watch(&["exec", "last", "corpus"], |_| None);
    assert_eq!(again.code, Some(0), "{}", again.errors);
    let wrong = server.credentials().into_iter().map(|(name, value)| match name.contains("SECRET") {
        true => (name, "another".to_owned()),
        false => (name, value),
    });
    let place = place.reached(server.url("runs"), [wrong.collect(), server.env().split_off(3)].concat());
    let denied = place.run(&["--until", "corpus"]);
    assert_eq!(denied.code, Some(69), "{}", denied.errors);
}
