//! Every shipped pipeline is a complete recipe: it validates, and the full-size one plans to the published numbers.

use std::{path::Path, process::Command};

fn program(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_dsv3-pipeline")).args(args).output().expect("the program runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn pipelines() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines")
}

#[test]
fn every_shipped_pipeline_validates() {
    let mut seen = 0;
    for entry in std::fs::read_dir(pipelines()).expect("the pipelines").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let (code, _, err) = program(&["validate", path.to_str().expect("a UTF-8 path")]);
            assert_eq!(code, Some(0), "{}\n{err}", path.display());
            let text = std::fs::read_to_string(&path).expect("a pipeline");
            assert!(text.starts_with("# yaml-language-server: $schema="), "{} names its schema", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 5, "full, pretrain, balance, my-data, v3-671b");
}

#[test]
fn the_full_size_plans_to_the_published_numbers() {
    let store = tempfile::tempdir().expect("a folder");
    let path = pipelines().join("v3-671b.yaml");
    let store = format!("file://{}", store.path().display());
    let (code, out, err) =
        program(&["plan", path.to_str().expect("a UTF-8 path"), "--store", &store, "--at", "0", "--at", "14.8T"]);
    assert_eq!(code, Some(0), "{err}");
    for number in ["671,026,419,200", "36,625,618,432", "684,489,845,504"] {
        assert!(out.contains(number), "{number} in\n{out}");
    }
}
