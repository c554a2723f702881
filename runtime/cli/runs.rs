//! `dsv3-pipeline runs`: the runs of a store, oldest first.

use crate::common::{self, Failure};

/// Arguments of `runs`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Store to list
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
    /// Print one JSON value per run
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let runs = engine.runs(&store).await?;
    if args.json {
        return runs.iter().try_for_each(common::say_json);
    }
    for run in runs {
        let stages: Vec<String> = run.stages.iter().map(|(name, outcome)| format!("{name} {outcome}")).collect();
        let (when, pipeline) = (utc(run.unix_millis), run.pipeline);
        common::say(format!("{}  {when}  {:9}  {pipeline}  {}", run.run, run.state, stages.join(", ")));
    }
    Ok(())
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
    fn dates_follow_the_calendar() {
        assert_eq!(super::utc(0), "1970-01-01 00:00:00");
        assert_eq!(super::utc(951_782_399_000), "2000-02-28 23:59:59");
        assert_eq!(super::utc(951_782_400_000), "2000-02-29 00:00:00");
        assert_eq!(super::utc(1_795_508_446_000), "2026-11-24 08:20:46");
    }
}
