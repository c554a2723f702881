//! `dsv3-pipeline runs`: the runs of a store, oldest first: state, stages, last activity, size, and who holds one of its
//! stages at the moment.

use dsv3_engine::RunListing;
use serde_json::{Value, json};

use crate::common::{self, Failure};

/// Arguments of `runs`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Store to list
    #[arg(value_name = "STORE", conflicts_with = "store")]
    url: Option<String>,
    /// The same, as other commands take it
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Print one JSON value per run
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let engine = common::engine();
    let url = args.url.or(args.store).unwrap_or_else(|| common::DEFAULT_STORE.to_owned());
    let store = common::open_store(&engine, &url)?;
    let runs = engine.list_runs(&store).await?;
    if args.json {
        return runs.iter().try_for_each(|run| common::say_json(&value(run)?));
    }
    if runs.is_empty() {
        common::say("no runs");
        return Ok(());
    }
    let rows: Vec<[String; 7]> = runs.iter().map(row).collect();
    let head = ["run", "pipeline", "state", "stages", "last activity (UTC)", "size", "held by"].map(str::to_owned);
    let rows: Vec<&[String; 7]> = std::iter::once(&head).chain(&rows).collect();
    let widths: Vec<usize> = (0..7).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        common::say(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    Ok(())
}

/// Everything known, with the state as the leases show it.
fn value(run: &RunListing) -> Result<Value, Failure> {
    let mut value =
        serde_json::to_value(run).map_err(|error| dsv3_core::Error::internal("cannot write JSON").source(error))?;
    value["state"] = json!(run.state());
    value["last_unix_millis"] = json!(run.last_unix_millis());
    Ok(value)
}

fn row(run: &RunListing) -> [String; 7] {
    let total = run.stages_total.map_or_else(|| "?".to_owned(), |total| total.to_string());
    [
        run.summary.run.clone(),
        run.summary.pipeline.clone(),
        run.state().to_owned(),
        format!("{}/{total}", run.stages_done),
        utc(run.last_unix_millis()),
        size(run.bytes),
        run.holder.clone().unwrap_or_default(),
    ]
}

/// `812 B`, `4.2 kB`, `1.3 GB`.
pub(crate) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// `2026-11-24 08:20:46` of milliseconds since 1970, by the civil calendar.
pub(crate) fn utc(unix_millis: u64) -> String {
    let (days, seconds) = ((unix_millis / 86_400_000) as i64, unix_millis / 1000 % 86_400);
    // Days to year, month and day with years that begin in March (Howard Hinnant, "chrono-compatible date algorithms").
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_short() {
        let sizes = [0, 999, 1000, 4_210_000, 1_300_000_000_000].map(super::size);
        assert_eq!(sizes, ["0 B", "999 B", "1.0 kB", "4.2 MB", "1.3 TB"]);
    }

    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(super::utc(0), "1970-01-01 00:00:00");
        assert_eq!(super::utc(951_782_399_000), "2000-02-28 23:59:59");
        assert_eq!(super::utc(951_782_400_000), "2000-02-29 00:00:00");
        assert_eq!(super::utc(1_795_508_446_000), "2026-11-24 08:20:46");
    }
}
