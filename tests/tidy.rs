//! Rules of the repository that a compiler does not check: allowed edges between crates, file headers, file lengths,
//! words that mark unfinished work.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

/// Longest source file, in lines.
const LINES_MAX: usize = 800;
/// Folders that hold no sources of ours.
const SKIPPED: [&str; 2] = ["target", "shared"];

/// What each crate may use besides `core`, which is free to all. The root package may use everything.
const EDGES: [(&str, &[&str]); 17] = [
    ("core", &[]),
    ("test-s3", &[]),
    ("ops", &[]),
    ("store", &[]),
    ("hooks", &[]),
    ("stage", &["store", "hooks", "ops"]),
    ("engine", &["store", "hooks", "stage"]),
    ("data", &["store"]),
    ("ingest", &["store", "data", "hooks"]),
    ("model", &["store", "ops"]),
    ("train", &["store", "data", "model", "ops"]),
    ("infer", &["data", "model", "ops"]),
    ("posttrain", &["data", "hooks", "model", "ops", "train", "infer"]),
    ("eval", &["data", "hooks", "infer"]),
    ("http", &["data", "infer"]),
    ("estimate", &["model"]),
    (
        "stages",
        &[
            "ops",
            "store",
            "hooks",
            "stage",
            "data",
            "ingest",
            "model",
            "train",
            "infer",
            "posttrain",
            "eval",
            "http",
            "estimate",
        ],
    ),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn crates_use_only_what_the_design_allows() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        EDGES.iter().map(|(name, uses)| (*name, uses.iter().copied().collect())).collect();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let Some(name) = package["name"].as_str().and_then(|name| name.strip_prefix("dsv3-")) else { continue };
        if name == "pipeline" {
            continue;
        }
        let Some(uses) = allowed.get(name) else {
            wrong.push(format!("{name} is not in the table of edges"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            // Test code may reach further: it ships to nobody.
            let shipped = dependency["kind"].as_str() != Some("dev");
            let used = dependency["name"].as_str().and_then(|name| name.strip_prefix("dsv3-"));
            if let Some(used) = used.filter(|used| shipped && *used != "core" && !uses.contains(used)) {
                wrong.push(format!("{name} may not use {used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a readable folder").flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() && !SKIPPED.contains(&name.as_str()) && !name.starts_with('.') {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn sources_have_a_header_and_a_readable_length() {
    let mut found = Vec::new();
    sources(&root(), &mut found);
    assert!(found.len() > 20, "the walk finds the sources");
    let mut wrong = Vec::new();
    for path in found {
        let text = std::fs::read_to_string(&path).expect("a readable file");
        let shown = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
        if !text.starts_with("//!") {
            wrong.push(format!("{shown}: does not open with `//!`"));
        }
        if text.lines().count() > LINES_MAX {
            wrong.push(format!("{shown}: {} lines, {LINES_MAX} at most", text.lines().count()));
        }
        // Assembled here so that this file does not find itself.
        for word in [["TO", "DO"], ["FIX", "ME"], ["todo", "!("], ["unimple", "mented!("], ["#[ig", "nore"]] {
            if text.contains(&word.concat()) {
                wrong.push(format!("{shown}: holds `{}`", word.concat()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
