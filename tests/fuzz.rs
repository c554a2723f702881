//! The CI sample of the fuzz targets: every file of the corpus and seeded changes of them through the same bodies, in a
//! process of its own whose data may not exceed 3 GB. `tests/fuzz/README.md` has the long runs.
//!
//! `DSV3_FUZZ_CHANGES=N` sets the number of changed inputs a target (default 600). An input that ends the process lies in
//! `fuzz-TARGET.bytes` of the folder that the failure names; put it into the corpus once it is mended.

// The bodies are those of the targets.
#[path = "fuzz/src/lib.rs"]
mod bodies;
mod mutate;
mod seeds;

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use dsv3_core::Rng;

/// Set in the process that runs a target.
const TARGET: &str = "DSV3_FUZZ_TARGET";
/// Most bytes of private data of that process.
const DATA_BYTES_MAX: u64 = 3 << 30;
/// Longest file of the corpus.
const FILE_BYTES_MAX: u64 = 64 << 10;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("readable"))).collect()
}

/// Runs one target in a process of its own.
fn sample(target: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["fuzz::one_target", "--exact", "--nocapture"]).env(TARGET, target).current_dir(folder.path());
    #[allow(unsafe_code)]
    // SAFETY: between fork and exec the child makes one system call on a value of its own.
    unsafe {
        command.pre_exec(|| {
            let limit = libc::rlimit { rlim_cur: DATA_BYTES_MAX, rlim_max: DATA_BYTES_MAX };
            match libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let output = command.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let folder = folder.keep();
        panic!("{target} ended with {}; its input is in {}\n{said}", output.status, folder.display());
    }
    assert!(said.contains("1 passed") && said.contains("changed inputs"), "{said}");
    print!("{}", said.lines().filter(|line| line.contains("changed inputs")).collect::<String>());
}

/// Does nothing unless [`sample`] started it.
#[test]
fn one_target() {
    let Ok(target) = std::env::var(TARGET) else { return };
    let body = bodies::TARGETS.iter().find(|(name, _)| *name == target).expect("a target").1;
    let changes = std::env::var("DSV3_FUZZ_CHANGES").ok().and_then(|text| text.parse().ok()).unwrap_or(600_u64);
    let corpus = corpus(&target);
    let run = |bytes: &[u8]| {
        std::fs::write(format!("fuzz-{target}.bytes"), bytes).expect("written");
        body(bytes);
    };
    for (path, bytes) in &corpus {
        println!("{}", path.display());
        run(bytes);
    }
    let root = Rng::new(4).key(target.as_str());
    for change in 0..changes {
        let mut rng = root.key(change);
        let pick = |rng: &mut Rng| &corpus[rng.below(corpus.len() as u64) as usize].1;
        let (bytes, other) = (pick(&mut rng).clone(), pick(&mut rng));
        run(&mutate::mutate(bytes, other, &mut rng));
    }
    println!("{target}: {} files, {changes} changed inputs", corpus.len());
}

#[test]
fn pipelines_never_panic() {
    sample("yaml");
}

#[test]
fn records_of_a_store_never_panic() {
    sample("manifest");
}

#[test]
fn weights_never_panic() {
    sample("safetensors");
}

#[test]
fn tokenizers_never_panic() {
    sample("tokenizer");
}

#[test]
fn request_bodies_never_panic() {
    sample("http");
}

/// `DSV3_UPDATE=1` writes the seeds; files that a fuzzer found stand beside them.
#[test]
fn the_corpus_is_there_and_small() {
    if std::env::var_os("DSV3_UPDATE").is_some() {
        seeds::write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus"));
    }
    for (target, _) in bodies::TARGETS {
        let files = corpus(target);
        assert!(files.len() >= 12, "{target} has {} files", files.len());
        for (path, bytes) in files {
            assert!(bytes.len() as u64 <= FILE_BYTES_MAX, "{} has {} bytes", path.display(), bytes.len());
        }
    }
}
