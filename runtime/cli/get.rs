//! `dsv3-pipeline get RUN STAGE.OUTPUT FOLDER`: an artifact as a plain folder, so that nothing of ours is needed to use it.
//!
//! Files are written under the artifact's own names; every digest is verified on the way. The folder must be empty or new.

use std::path::{Path, PathBuf};

use dsv3_core::{Error, Manifest};
use dsv3_pipeline::Store;

use crate::common::{self, Failure};

/// Arguments of `get`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// A run (`latest`, or the beginning of its name)
    run: String,
    /// An output of a stage: STAGE.OUTPUT, such as release.model
    output: String,
    /// Folder to write; must be empty or absent
    folder: PathBuf,
    /// Store of the run
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let runs = engine.runs(&store).await?;
    let id = engine.find_run(&store, &args.run).await?;
    let (stage, port) = args
        .output
        .split_once('.')
        .ok_or_else(|| Error::invalid(format!("{}: write STAGE.OUTPUT, such as release.model", args.output)))?;
    let key = runs.iter().find(|run| run.run == id).and_then(|run| run.keys.get(stage));
    let key = key.ok_or_else(|| Error::invalid(format!("run {id} has not come to a stage `{stage}`")))?;
    let result = store.read_result(key).await?;
    let result = result.ok_or_else(|| Error::invalid(format!("stage `{stage}` of run {id} has not finished")))?;
    let names: Vec<&str> = result.outputs.iter().map(|output| output.name.as_str()).collect();
    let found = result.outputs.iter().find(|output| output.name == port);
    let digest = found
        .ok_or_else(|| Error::invalid(format!("stage `{stage}` has no output `{port}`; it has {}", names.join(", "))))?
        .digest;
    let manifest = store.manifest(digest).await?;
    write(&store, &manifest, &args.folder).await?;
    let (files, bytes) = (manifest.files.len(), manifest.bytes());
    common::say(format!(
        "{}: {files} files, {bytes} bytes of {} {}",
        args.folder.display(),
        manifest.kind,
        digest.short()
    ));
    Ok(())
}

/// Writes the files of an artifact into a new folder.
pub(crate) async fn write(store: &Store, manifest: &Manifest, folder: &Path) -> Result<(), Error> {
    let failed = |path: &Path, error| Error::unavailable(format!("cannot write {}", path.display())).source(error);
    std::fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    let mut entries = std::fs::read_dir(folder).map_err(|error| failed(folder, error))?;
    if entries.next().is_some() {
        let error = Error::invalid(format!("{} is not empty", folder.display()));
        return Err(error.help("name a folder that does not exist yet"));
    }
    for file in &manifest.files {
        let inside = !file.path.starts_with('/') && file.path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !inside {
            return Err(Error::data(format!("the artifact names a file outside the folder: {:?}", file.path)));
        }
        let path = folder.join(&file.path);
        let bytes = store.get_blob(file.digest).await?;
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
        }
        std::fs::write(&path, bytes).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}
