//! `dsv3-pipeline export RUN STAGE --at SEQ --out FOLDER`: a checkpoint of a training stage, finished or not, as the Hugging
//! Face folder that the stage would end with: `get` of the finished model and `export` of the last checkpoint are equal.

use std::path::PathBuf;

use dsv3_core::Cancel;

use crate::{
    common::{self, Failure},
    get, signals,
};

/// Arguments of `export`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Id of the run, the beginning of it, or `last`
    run: String,
    /// A stage that trains
    stage: String,
    /// Number of the checkpoint, as the events name it; the newest when absent
    #[arg(long, value_name = "SEQ")]
    at: Option<u64>,
    /// Folder to write; must be empty or absent
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Store of the run
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
    /// Compute threads
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let cancel = Cancel::new();
    signals::watch(cancel.clone(), None)?;
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let id = engine.find_run(&store, &args.run).await?;
    common::set_threads(args.threads);
    let made = engine.export_checkpoint(&store, &id, &args.stage, args.at, args.threads, &cancel).await?;
    get::write(&made.store, &made.manifest, &args.out).await?;
    common::say(format!(
        "{}: {} files, {} bytes of checkpoint {} (step {}) of {}, model {}",
        args.out.display(),
        made.manifest.files.len(),
        made.manifest.bytes(),
        made.seq,
        made.step,
        args.stage,
        made.digest.short()
    ));
    Ok(())
}
