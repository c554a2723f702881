//! `dsv3-pipeline schema`: the JSON Schema of pipeline files, as committed in `schemas/pipeline.schema.json`.

use dsv3_core::Error;

use crate::common::{self, Failure};

/// Arguments of `schema`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Print the schema of one stage type's config
    #[arg(value_name = "TYPE")]
    stage: Option<String>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let engine = common::engine();
    let schema = match &args.stage {
        None => engine.schema(),
        Some(name) => {
            let entry = engine.stages().iter().find(|entry| entry.name == name);
            let names: Vec<&str> = engine.stages().iter().map(|entry| entry.name).collect();
            let unknown = || Error::invalid(format!("there is no stage type `{name}`")).help(names.join(", "));
            entry.ok_or_else(unknown)?.config_schema()
        }
    };
    let text = serde_json::to_string_pretty(&schema);
    common::say(text.map_err(|error| Error::internal("cannot write JSON").source(error))?);
    Ok(())
}
