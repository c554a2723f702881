//! `dsv3-pipeline generate` (hidden): writes the data that the recipes ship with, or checks that it is what the generator
//! makes. The generator is seeded: equal real text gives equal files.

use std::path::{Path, PathBuf};

use dsv3_core::Error;
use dsv3_ingest::demo;

/// Arguments of `generate`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with the shipped data; the real text is read from it.
    #[arg(long, default_value = "pipelines/data")]
    data: PathBuf,
    /// First makes the files of real text from what their authors publish: this folder holds tinyshakespeare/input.txt,
    /// gsm8k/train.jsonl and gsm8k/test.jsonl.
    #[arg(long)]
    raw: Option<PathBuf>,
    /// Writes nothing; fails when a generated file differs from the one in the folder.
    #[arg(long, conflicts_with = "raw")]
    check: bool,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args) -> Result<(), Error> {
    if let Some(raw) = &args.raw {
        for (name, bytes) in demo::real::import(raw)? {
            write(&args.data, &name, &bytes)?;
        }
    }
    let files = demo::generate(&args.data)?;
    let mut different = Vec::new();
    for (name, bytes) in &files {
        if !args.check {
            write(&args.data, name, bytes)?;
        } else if std::fs::read(args.data.join(name)).ok().as_ref() != Some(bytes) {
            different.push(name.as_str());
        }
    }
    if different.is_empty() {
        return Ok(());
    }
    let message = format!("differs from what the generator makes: {}", different.join(", "));
    Err(Error::data(message).help("run `dsv3-pipeline generate` to write it again"))
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let path = folder.join(name);
    let failed = |source| Error::unavailable(format!("{}: cannot be written", path.display())).source(source);
    std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, bytes)).map_err(failed)?;
    println!("{}  {} bytes", path.display(), bytes.len());
    Ok(())
}
