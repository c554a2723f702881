//! What subcommands share: the engine, the arguments that load a pipeline, and how a failure is told.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

use dsv3_core::{Error, ErrorKind};
use dsv3_engine::{Diagnostics, Engine, EngineBuilder, EngineError, LoadOptions, Spec};
use dsv3_store::{Store, StoreError};
use serde_json::{Value, json};
use tracing_subscriber::EnvFilter;

/// Store of a command that reads no pipeline.
pub(crate) const DEFAULT_STORE: &str = "file://./runs";

/// Arguments of every command that reads a pipeline.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PipelineArgs {
    /// Pipeline file
    pub(crate) pipeline: PathBuf,
    /// Override a field by its dotted path, or a param by its name
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub(crate) sets: Vec<String>,
    /// Store that replaces the one of the pipeline: file://, memory://, s3://, gs:// or az://, or {url: .., OPTION: ..}
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Compute threads; results do not depend on them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) threads: Option<u16>,
}

impl PipelineArgs {
    /// Reads and checks the pipeline.
    pub(crate) fn load(&self, engine: &Engine, at_tokens: &[u64]) -> Result<Spec, Failure> {
        let options = LoadOptions {
            sets: self.sets.clone(),
            store: self.store.clone(),
            threads: self.threads.map(usize::from),
            at_tokens: at_tokens.to_vec(),
            ..LoadOptions::default()
        };
        Ok(engine.load(&self.pipeline, &options)?)
    }
}

/// The engine with all our stages. Compiled hooks are kept in the user's cache folder.
pub(crate) fn engine() -> Engine {
    built(Engine::builder().stages(dsv3_stages::ALL))
}

/// The engine with all our stages, on a store whatever the pipeline names.
pub(crate) fn engine_on(store: Store) -> Engine {
    built(Engine::builder().stages(dsv3_stages::ALL).store(store))
}

fn built(builder: EngineBuilder) -> Engine {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    match cache {
        Some(cache) if cache.is_absolute() => builder.cache_dir(cache.join("dsv3-pipeline")).build(),
        _ => builder.build(),
    }
}

/// The compute pool of the process. Only the first call has an effect.
pub(crate) fn set_threads(threads: Option<usize>) {
    if let Some(threads) = threads {
        // A pool that stands already is as good: results do not depend on threads.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

/// Diagnostics of libraries, on standard error; `RUST_LOG` chooses what is shown.
pub(crate) fn init_tracing() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    // A subscriber that stands already is the host's.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Prints a line on standard output. Nobody is left to tell when it is closed.
pub(crate) fn say(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a line on standard error. A run must not end because nobody reads along.
pub(crate) fn tell(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints a value as one line of JSON.
pub(crate) fn say_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|error| Error::internal("cannot write JSON").source(error))?;
    say(text);
    Ok(())
}

/// Why a command ends with another code than 0.
#[derive(Debug)]
pub(crate) struct Failure {
    error: EngineError,
    /// Whether the event stream has already said so.
    told: bool,
}

impl Failure {
    /// A failure that the event stream has already ended with.
    pub(crate) fn told(error: EngineError) -> Self {
        Self { error, told: true }
    }

    /// Tells it and gives the exit code.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        let kind = self.error.kind();
        let mut err = std::io::stderr().lock();
        let text = match &self.error {
            EngineError::Refused(report) => report.render(std::io::stderr().is_terminal()),
            EngineError::Failed(_) => {
                let head = if kind == ErrorKind::Cancelled { "stopped" } else { "error" };
                let mut lines: Vec<String> = self.error.chain();
                lines[0] = format!("{head}: {}", lines[0]);
                lines[1..].iter_mut().for_each(|cause| *cause = format!("  caused by: {cause}"));
                lines.extend(self.error.help().map(|help| format!("  help: {help}")));
                lines.join("\n")
            }
        };
        // Nobody is left to tell when standard error is closed.
        let _ = writeln!(err, "{text}");
        if json && !self.told {
            say(self.final_event());
        }
        ExitCode::from(kind.exit_code())
    }

    /// The last line of `--json` when no run has begun.
    fn final_event(&self) -> Value {
        let problems = match &self.error {
            EngineError::Refused(report) => report.to_json(),
            EngineError::Failed(_) => Vec::new(),
        };
        json!({
            "event": "run_finished",
            "run": "",
            "outcome": if self.error.kind() == ErrorKind::Cancelled { "cancelled" } else { "failed" },
            "kind": self.error.kind(),
            "messages": self.error.chain(),
            "help": self.error.help(),
            "problems": problems,
            "seconds": 0.0,
            "metrics": {},
        })
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self { error, told: false }
    }
}

impl From<Diagnostics> for Failure {
    fn from(report: Diagnostics) -> Self {
        EngineError::from(report).into()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        EngineError::from(error).into()
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        EngineError::from(error).into()
    }
}

/// Opens the store of a command that reads no pipeline; a folder that is not there is not made.
pub(crate) fn open_store(engine: &Engine, url: &str) -> Result<Store, Failure> {
    let (url, options) = Engine::parse_store(url)?;
    let local = url.strip_prefix("file://").or((!url.contains("://")).then_some(url.as_str()));
    if let Some(path) = local.filter(|path| !std::path::Path::new(path).is_dir()) {
        let error = Error::invalid(format!("there is no store at {path}"));
        return Err(error.help("`--store` names the store; a run makes it").into());
    }
    Ok(engine.open_store_with(&url, &options)?)
}
