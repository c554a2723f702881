//! `dsv3-pipeline gc STORE`: removes what no kept run of a store names, or says what would go.

use std::collections::BTreeMap;

use dsv3_core::Cancel;
use dsv3_engine::{GcOptions, GcReport};
use dsv3_store::Removed;
use serde_json::json;

use crate::{
    common::{self, Failure},
    runner::Span,
    runs::size,
    signals::{self, unless_stopped},
};

/// Arguments of `gc`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Store to collect in
    #[arg(value_name = "STORE", conflicts_with = "store")]
    url: Option<String>,
    /// The same, as other commands take it
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Say what would go, with sizes, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Leave alone what no run names but is younger than this
    #[arg(long, value_name = "SPAN", default_value = "24h")]
    grace: Span,
    /// Give up these runs: ids, or beginnings of ids
    #[arg(long = "drop-run", value_name = "ID", num_args = 1..)]
    drop_runs: Vec<String>,
    /// Print one JSON value for each thing, and a last one with the sum
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let cancel = Cancel::new();
    signals::watch(cancel.clone(), None)?;
    let engine = common::engine();
    let url = args.url.or(args.store).unwrap_or_else(|| common::DEFAULT_STORE.to_owned());
    let store = common::open_store(&engine, &url)?;
    let mut drop_runs = Vec::new();
    for text in &args.drop_runs {
        drop_runs.push(unless_stopped(&cancel, engine.find_run(&store, text)).await?);
    }
    let options = GcOptions { dry_run: args.dry_run, grace: args.grace.0, drop_runs, cancel: cancel.clone() };
    let waiting = |holder: &dsv3_store::Holder| common::tell(format!("waiting for {holder}, which collects here"));
    // A collection may be interrupted anywhere; the next one finishes it.
    let report = unless_stopped(&cancel, engine.collect(&store, &options, waiting)).await?;
    report.warning.iter().for_each(|warning| common::tell(format!("warning: {warning}")));
    show(&report, args.dry_run, args.json)
}

fn word(what: Removed, count: usize) -> String {
    let noun = match what {
        Removed::Stage => "stage",
        Removed::Checkpoint => "checkpoint",
        Removed::Blob => "blob",
        Removed::Temporary => "temporary file",
        Removed::Run => "run",
    };
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Everything on a dry run; the sum always.
fn show(report: &GcReport, dry_run: bool, json: bool) -> Result<(), Failure> {
    let GcReport { runs_kept, collected, .. } = report;
    let bytes: u64 = collected.items.iter().map(|item| item.bytes).sum();
    let mut sums: BTreeMap<Removed, (usize, u64)> = BTreeMap::new();
    for item in &collected.items {
        let sum = sums.entry(item.what).or_default();
        *sum = (sum.0 + 1, sum.1 + item.bytes);
    }
    if json {
        collected.items.iter().try_for_each(common::say_json)?;
        return common::say_json(&json!({
            "dry_run": dry_run,
            "removed": sums.values().map(|(count, _)| count).sum::<usize>(),
            "bytes": bytes,
            "spared_bytes": collected.spared_bytes,
            "runs_kept": runs_kept,
            "live": collected.live,
        }));
    }
    if dry_run {
        for item in &collected.items {
            common::say(format!("{:>10}  {}", size(item.bytes), item.path));
        }
    }
    for holder in &collected.live {
        common::say(format!("held, and spared with what it may have written: {holder}"));
    }
    let parts: Vec<String> = sums.iter().map(|(what, (count, _))| word(*what, *count)).collect();
    let what = if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") };
    let verb = if dry_run { "would remove" } else { "removed" };
    common::say(format!("{verb} {what}: {}; {runs_kept} runs kept", size(bytes)));
    if collected.spared_bytes > 0 {
        common::say(format!(
            "{} that no run names are too young, or a running stage may need them",
            size(collected.spared_bytes)
        ));
    }
    Ok(())
}
