//! Tiny stages for the engine's tests: `count` counts with checkpoints, `sum` adds reports, `read` reads files.

use dsv3_core::{Artifact, Error, kinds};
use dsv3_stage::{Ctx, InputFacts, NoPorts, Problems, Stage, StageEntry, ports};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Every test stage.
pub(super) const ALL: &[StageEntry] = &[StageEntry::of::<Count>(), StageEntry::of::<Sum>(), StageEntry::of::<Read>()];

/// Options of `count`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CountConfig {
    /// Number to count to.
    until: u64,
    /// Milliseconds between numbers.
    #[serde(default)]
    #[schemars(extend("x-key" = "performance"))]
    pause_ms: u64,
    /// Size of a micro-batch.
    #[serde(default)]
    #[schemars(extend("x-key" = "numerics"))]
    micro: u64,
    /// Step that fails.
    #[serde(default)]
    fail_at: Option<u64>,
    /// Step that panics.
    #[serde(default)]
    panic_at: Option<u64>,
}

ports! {
    /// Inputs of `count`.
    pub(super) struct CountInputs {
        /// Where to begin.
        before: Option<Artifact<kinds::Report>>,
    }
}

ports! {
    /// One report.
    pub(super) struct OneReport {
        /// The number reached.
        report: Artifact<kinds::Report>,
    }
}

/// Counts, with a checkpoint after each number.
pub(super) struct Count;

fn number(ctx: &Ctx, report: &Artifact<kinds::Report>) -> Result<u64, Error> {
    let bytes = ctx.read(report, "number.json")?;
    serde_json::from_slice(&bytes).map_err(|error| Error::data("a report holds no number").source(error))
}

impl Stage for Count {
    const NAME: &'static str = "count";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "Counts.";
    type Config = CountConfig;
    type Inputs = CountInputs;
    type Outputs = OneReport;

    fn check(config: &CountConfig, _: &InputFacts, problems: &mut Problems) {
        if config.until == 13 {
            problems.push("config.until", "thirteen is refused", "take another number");
        }
    }

    fn run(config: CountConfig, inputs: CountInputs, ctx: &mut Ctx) -> Result<OneReport, Error> {
        let base = inputs.before.as_ref().map_or(Ok(0), |report| number(ctx, report))?;
        let first = ctx.checkpoints().latest()?.map_or(0, |checkpoint| checkpoint.step) + 1;
        for step in first..=config.until {
            assert_ne!(config.panic_at, Some(step), "step {step} was asked to panic");
            if config.fail_at == Some(step) {
                return Err(Error::data(format!("step {step} was asked to fail")));
            }
            std::thread::sleep(std::time::Duration::from_millis(config.pause_ms));
            ctx.metric("step", step, step as f64);
            ctx.checkpoints().save(step, Vec::new(), json!({}))?;
            // Give a request that came with the checkpoint's event the time to arrive.
            if config.until == 5 {
                std::thread::sleep(std::time::Duration::from_millis(60));
            }
            ctx.check_cancelled()?;
        }
        let reached = base + config.until;
        ctx.set_metric("reached", reached as f64);
        let file = ctx.put("number.json", reached.to_string().into_bytes())?;
        Ok(OneReport { report: ctx.publish(vec![file], json!({}))? })
    }
}

/// No options.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

ports! {
    /// Inputs of `sum`.
    pub(super) struct SumInputs {
        /// Numbers to add.
        reports: Vec<Artifact<kinds::Report>>,
    }
}

/// Adds the numbers of reports.
pub(super) struct Sum;

impl Stage for Sum {
    const NAME: &'static str = "sum";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "Adds.";
    type Config = Nothing;
    type Inputs = SumInputs;
    type Outputs = OneReport;

    fn run(_: Nothing, inputs: SumInputs, ctx: &mut Ctx) -> Result<OneReport, Error> {
        let numbers: Result<Vec<u64>, Error> = inputs.reports.iter().map(|report| number(ctx, report)).collect();
        let sum: u64 = numbers?.iter().sum();
        ctx.set_metric("sum", sum as f64);
        let file = ctx.put("number.json", sum.to_string().into_bytes())?;
        Ok(OneReport { report: ctx.publish(vec![file], json!({}))? })
    }
}

ports! {
    /// Inputs of `read`.
    pub(super) struct ReadInputs {
        /// Files to read.
        documents: Artifact<kinds::Documents>,
    }
}

/// Reads files and counts their bytes.
pub(super) struct Read;

impl Stage for Read {
    const NAME: &'static str = "read";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "Reads.";
    type Config = Nothing;
    type Inputs = ReadInputs;
    type Outputs = NoPorts;

    fn run(_: Nothing, inputs: ReadInputs, ctx: &mut Ctx) -> Result<NoPorts, Error> {
        let manifest = ctx.manifest(&inputs.documents)?;
        let bytes: usize = manifest
            .files
            .iter()
            .map(|file| Ok(ctx.read(&inputs.documents, &file.path)?.len()))
            .sum::<Result<usize, Error>>()?;
        ctx.set_metric("bytes", bytes as f64);
        Ok(NoPorts {})
    }
}
