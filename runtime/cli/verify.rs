//! `dsv3-pipeline verify RUN [STAGE]`: reads everything a stored run names and compares every digest; with `--replay K` also
//! does up to K steps of a training stage again from a checkpoint, in memory, and compares every figure and, where the next
//! checkpoint is reached, every tensor bit for bit. A sound run gets a certificate, `runs/<id>/certificates/<n>.json`.
//!
//! Exit 65 when anything is not what was written; each such object is named on a line of its own. Exit 69 when the run is
//! sound and the store takes no certificate; `--no-certificate` wants none.

use dsv3_core::Error;
use dsv3_engine::{Replay, Verification, VerifyOptions};

use crate::{
    common::{self, Failure},
    signals::{self, unless_stopped},
};

/// Arguments of `verify`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Id of the run, the beginning of it, or `last`
    run: String,
    /// A stage alone
    stage: Option<String>,
    /// Steps of the stage to do again from a checkpoint
    #[arg(long, value_name = "K", requires = "stage", value_parser = clap::value_parser!(u64).range(1..))]
    replay: Option<u64>,
    /// Checkpoint to do them from; the last that another follows when absent
    #[arg(long, value_name = "SEQ", requires = "replay")]
    at: Option<u64>,
    /// Store of the run
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
    /// Compute threads of the replay; results do not depend on them
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Write nothing: no certificate of a sound run
    #[arg(long)]
    no_certificate: bool,
    /// Print one JSON value
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let cancel = dsv3_core::Cancel::new();
    signals::watch(cancel.clone(), None)?;
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let id = engine.find_run(&store, &args.run).await?;
    common::set_threads(args.threads);
    let Args { stage, replay, at, threads, no_certificate, .. } = args;
    let options = VerifyOptions { stage, replay, at, threads, no_certificate, cancel: cancel.clone() };
    let found = unless_stopped(&cancel, engine.verify(&store, &id, &options)).await?;
    if args.json {
        common::say_json(&found)?;
    } else {
        show(&found);
    }
    if let Some(refusal) = found.uncertified {
        let error = Error::unavailable(format!("run {id} is sound; no certificate was written: {refusal}"));
        return Err(error.help("give write access, or verify with --no-certificate").into());
    }
    if found.is_sound() {
        return Ok(());
    }
    let count = found.damaged.len() + found.replay.map_or(0, |replay| replay.differences.len());
    let error = Error::data(format!("run {id}: {count} of what was looked at is not what was written"));
    Err(error.help("delete a damaged object and run again: what made it is made anew").into())
}

fn show(found: &Verification) {
    for damage in &found.damaged {
        common::say(format!("damaged: {}: {}", damage.path, damage.problem));
    }
    for stage in &found.stages {
        let state = if stage.finished { "finished" } else { "not finished" };
        common::say(format!(
            "{}: {state}, {} outputs, checkpoints {:?}",
            stage.stage, stage.outputs, stage.checkpoints
        ));
    }
    common::say(format!("{} objects, {} bytes read", found.objects, found.bytes));
    if let Some(replay) = &found.replay {
        show_replay(replay);
    }
    if let Some(certificate) = &found.certificate {
        common::say(format!("certificate: {certificate}"));
    }
}

fn show_replay(replay: &Replay) {
    let Replay { stage, from_seq, from_step, to_step, losses, figures, unlogged, .. } = replay;
    common::say(format!(
        "{stage}: steps {} to {to_step} again from checkpoint {from_seq}: {losses} losses and {} other figures compared",
        from_step + 1,
        figures - losses
    ));
    if *unlogged > 0 {
        common::say(format!("  the logs hold no loss of {unlogged} of these steps"));
    }
    match replay.compared_seq {
        Some(seq) => common::say(format!("  state and tensors compared with checkpoint {seq}")),
        None => common::say("  the next checkpoint lies further on: no tensors compared"),
    }
    for difference in &replay.differences {
        common::say(format!("  differs: {difference}"));
    }
}
