//! `dsv3-pipeline plan PIPELINE`: each stage with its key, what a run would do with it, and what it says of itself:
//! sizes, and schedules at the token counts of `--at`.

use dsv3_engine::{StageState, State};

use crate::common::{self, Failure, PipelineArgs};

/// Arguments of `plan`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Show schedules at this token count: 469e9, 469B, 14.3T
    #[arg(long = "at", value_name = "TOKENS", value_parser = parse_tokens)]
    at_tokens: Vec<u64>,
    /// Print one JSON value per stage
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let engine = common::engine();
    let spec = args.pipeline.load(&engine, &args.at_tokens)?;
    if spec.has_remote_inputs() {
        return show(&spec.outline(), args.json);
    }
    let plan = engine.plan(spec).await?;
    show(&engine.states(&plan).await?, args.json)
}

/// Prints the stages.
pub(crate) fn show(states: &[StageState], json: bool) -> Result<(), Failure> {
    if json {
        return states.iter().try_for_each(common::say_json);
    }
    let width = |of: fn(&StageState) -> &str| states.iter().map(|state| of(state).chars().count()).max().unwrap_or(0);
    let (names, kinds) = (width(|state| &state.stage).max(5), width(|state| &state.kind).max(4));
    common::say(format!("{:names$}  {:kinds$}  {:12}  would", "stage", "type", "key"));
    for state in states {
        let key = state.key.as_deref().map_or("-", |key| &key[..12]);
        let line = format!("{:names$}  {:kinds$}  {key:12}  {}", state.stage, state.kind, would(&state.state));
        common::say(line.trim_end());
        let facts = state.facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in &state.facts {
            common::say(format!("    {name:facts$}  {value}"));
        }
    }
    Ok(())
}

/// What a run would do.
pub(crate) fn would(state: &State) -> String {
    match state {
        State::Cached => "be found finished".to_owned(),
        State::Resumes { step } => format!("go on after step {step}"),
        State::Runs => "run".to_owned(),
        State::Broken { why } => format!("run again: {why}"),
        State::Unread => "run (inputs in object stores are read then)".to_owned(),
        State::Waits { stage } => format!("run after `{stage}`"),
    }
}

/// `469e9`, `469B`, `14.3T`, `2K`, `12_000`.
fn parse_tokens(text: &str) -> Result<u64, String> {
    let plain = text.replace('_', "");
    let (digits, scale) = match plain.chars().last() {
        Some('K' | 'k') => (&plain[..plain.len() - 1], 1e3),
        Some('M' | 'm') => (&plain[..plain.len() - 1], 1e6),
        Some('B' | 'b' | 'G') => (&plain[..plain.len() - 1], 1e9),
        Some('T' | 't') => (&plain[..plain.len() - 1], 1e12),
        _ => (plain.as_str(), 1.0),
    };
    if let (Ok(count), true) = (digits.parse::<u64>(), scale == 1.0) {
        return Ok(count);
    }
    match digits.parse::<f64>() {
        Ok(count) if count >= 0.0 && count * scale < 9.0e18 => Ok((count * scale).round() as u64),
        _ => Err("a token count is expected, such as 469e9, 469B or 14.3T".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_have_short_forms() {
        let cases =
            [("0", 0), ("469e9", 469_000_000_000), ("14.633T", 14_633_000_000_000), ("2K", 2000), ("12_000", 12_000)];
        for (text, count) in cases {
            assert_eq!(parse_tokens(text), Ok(count), "{text}");
        }
        for text in ["", "T", "-1", "many", "1e30"] {
            assert!(parse_tokens(text).is_err(), "{text}");
        }
    }
}
