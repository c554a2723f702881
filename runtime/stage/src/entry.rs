//! The trait a stage implements, and the type-erased form the engine holds.

use std::panic::{AssertUnwindSafe, catch_unwind};

use dsv3_core::Error;
use dsv3_hooks::World;
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Ctx, InputFacts, KeyClass, OutputFacts, PortSpec, Ports, Problem, Problems, Shrink, keys,
    shape::{self, Checked},
    shrink,
};

/// A place for a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookPort {
    /// Name in pipelines.
    pub name: &'static str,
    /// World a hook must export.
    pub world: World,
    /// Whether there must be one.
    pub required: bool,
    /// What it is asked.
    pub doc: &'static str,
}

/// A type of stage.
pub trait Stage: Send + Sync + 'static {
    /// Name in pipelines (`type:`).
    const NAME: &'static str;
    /// Semantic version: raised when equal inputs and config give another result. Part of the key.
    const VERSION: u32;
    /// One sentence for the schema.
    const ABOUT: &'static str;
    /// Places for hooks.
    const HOOKS: &'static [HookPort] = &[];
    /// How its config becomes small where only the order of its store operations matters, as in `chaos`.
    const SHRINK: &'static [Shrink] = &[];
    /// Closing figures that a second run need not repeat: rates, and what depends on when a request arrives.
    const LOOSE_FIGURES: &'static [&'static str] = &[];
    /// Options. A field is semantic unless `#[schemars(extend("x-key" = "performance"))]` or `"numerics"` says otherwise.
    type Config: DeserializeOwned + Serialize + JsonSchema;
    /// Inputs, declared with [`crate::ports!`].
    type Inputs: Ports;
    /// Outputs, declared with [`crate::ports!`].
    type Outputs: Ports;

    /// Checks what can be known before anything runs. Paths are dotted, below the stage (`config.model.n_group`).
    fn check(_config: &Self::Config, _facts: &InputFacts, _problems: &mut Problems) {}

    /// What is known of the outputs before anything runs, for the checks of later stages.
    fn facts(_config: &Self::Config, _facts: &InputFacts) -> OutputFacts {
        OutputFacts::new()
    }

    /// Lines about a run of this stage before it runs (sizes, schedules), as names and values; `at_tokens` are token
    /// counts at which schedules are wanted.
    fn describe(_config: &Self::Config, _facts: &InputFacts, _at_tokens: &[u64]) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Does the work, on an OS thread of its own.
    ///
    /// # Errors
    /// Whatever stops it; [`Error::cancelled`] when it was asked to stop and has checkpointed.
    fn run(config: Self::Config, inputs: Self::Inputs, ctx: &mut Ctx) -> Result<Self::Outputs, Error>;
}

/// A stage without its types.
#[derive(Clone, Copy)]
pub struct StageEntry {
    /// [`Stage::NAME`].
    pub name: &'static str,
    /// [`Stage::VERSION`].
    pub version: u32,
    /// [`Stage::ABOUT`].
    pub about: &'static str,
    /// [`Stage::HOOKS`].
    pub hooks: &'static [HookPort],
    /// [`Stage::SHRINK`].
    pub shrink: &'static [Shrink],
    /// [`Stage::LOOSE_FIGURES`].
    pub loose_figures: &'static [&'static str],
    inputs: fn() -> Vec<PortSpec>,
    outputs: fn() -> Vec<PortSpec>,
    schema: fn() -> Value,
    resolve: fn(&Value) -> Result<Value, Error>,
    check: fn(&Value, &InputFacts, &mut Problems) -> Result<(), Error>,
    facts: fn(&Value, &InputFacts) -> Result<OutputFacts, Error>,
    describe: DescribeFn,
    run: fn(&Value, &Value, &mut Ctx) -> Result<Value, Error>,
}

type DescribeFn = fn(&Value, &InputFacts, &[u64]) -> Result<Vec<(String, String)>, Error>;

impl std::fmt::Debug for StageEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StageEntry({} v{})", self.name, self.version)
    }
}

fn parse<T: DeserializeOwned>(config: &Value) -> Result<T, Error> {
    serde_json::from_value(config.clone())
        .map_err(|source| Error::invalid("the config does not fit the stage").source(source))
}

impl StageEntry {
    /// The entry of a stage.
    pub const fn of<T: Stage>() -> Self {
        Self {
            name: T::NAME,
            version: T::VERSION,
            about: T::ABOUT,
            hooks: T::HOOKS,
            shrink: T::SHRINK,
            loose_figures: T::LOOSE_FIGURES,
            inputs: T::Inputs::specs,
            outputs: T::Outputs::specs,
            schema: || {
                let mut generator = SchemaGenerator::new(SchemaSettings::draft2020_12());
                generator.root_schema_for::<T::Config>().into()
            },
            resolve: |config| {
                serde_json::to_value(parse::<T::Config>(config)?)
                    .map_err(|source| Error::internal("the config cannot be written as JSON").source(source))
            },
            check: |config, facts, problems| {
                T::check(&parse(config)?, facts, problems);
                Ok(())
            },
            facts: |config, facts| Ok(T::facts(&parse(config)?, facts)),
            describe: |config, facts, at_tokens| Ok(T::describe(&parse(config)?, facts, at_tokens)),
            run: |config, inputs, ctx| Ok(T::run(parse(config)?, T::Inputs::from_json(inputs)?, ctx)?.to_json()),
        }
    }

    /// Input ports.
    pub fn inputs(&self) -> Vec<PortSpec> {
        (self.inputs)()
    }

    /// Output ports.
    pub fn outputs(&self) -> Vec<PortSpec> {
        (self.outputs)()
    }

    /// JSON Schema of the config, a whole document with its own `$defs`.
    pub fn config_schema(&self) -> Value {
        (self.schema)()
    }

    /// Everything wrong with the shape of a config: unknown and missing fields, types, ranges, variants; all at once.
    /// Paths begin with `config`.
    pub fn check_shape(&self, config: &Value) -> Vec<Problem> {
        let schema = self.config_schema();
        let mut checked = Checked::new(&schema);
        checked.check(&schema, config, "config");
        let mut problems = checked.into_problems();
        if problems.is_empty()
            && let Err(error) = self.resolve_config(config)
        {
            problems.push(shape::problem_of(&error));
        }
        problems
    }

    /// The config with every default filled in. Keys are made from this form.
    ///
    /// # Errors
    /// [`dsv3_core::ErrorKind::Invalid`] when it does not fit.
    pub fn resolve_config(&self, config: &Value) -> Result<Value, Error> {
        (self.resolve)(config)
    }

    /// What [`Stage::SHRINK`] changes in a resolved config: dotted paths below `config` and new values.
    pub fn shrink_changes(&self, config: &Value) -> Vec<(String, Value)> {
        shrink::changes(self.shrink, config)
    }

    /// The fields that change the result, defaults filled in: what goes into the key.
    ///
    /// # Errors
    /// As [`StageEntry::resolve_config`].
    pub fn key_config(&self, config: &Value) -> Result<Value, Error> {
        self.config_of(config, KeyClass::Semantic)
    }

    /// The numerics fields, defaults filled in: the profile a result records.
    ///
    /// # Errors
    /// As [`StageEntry::resolve_config`].
    pub fn profile_config(&self, config: &Value) -> Result<Value, Error> {
        self.config_of(config, KeyClass::Numerics)
    }

    fn config_of(&self, config: &Value, class: KeyClass) -> Result<Value, Error> {
        Ok(keys::project(&self.config_schema(), &self.resolve_config(config)?, class))
    }

    /// [`Stage::check`]; a config that does not parse is one problem.
    pub fn check(&self, config: &Value, facts: &InputFacts, problems: &mut Problems) {
        if let Err(error) = (self.check)(config, facts, problems) {
            problems.extend([shape::problem_of(&error)]);
        }
    }

    /// [`Stage::facts`]; nothing when the config does not parse.
    pub fn facts(&self, config: &Value, facts: &InputFacts) -> OutputFacts {
        (self.facts)(config, facts).unwrap_or_default()
    }

    /// [`Stage::describe`]; nothing when the config does not parse.
    pub fn describe(&self, config: &Value, facts: &InputFacts, at_tokens: &[u64]) -> Vec<(String, String)> {
        (self.describe)(config, facts, at_tokens).unwrap_or_default()
    }

    /// [`Stage::run`] on JSON: inputs and outputs are `{port: {kind, digest} | [..]}`. A panic becomes an internal error.
    ///
    /// # Errors
    /// Whatever stops the stage.
    pub fn run(&self, config: &Value, inputs: &Value, ctx: &mut Ctx) -> Result<Value, Error> {
        // The context is not used after a panic except to report.
        match catch_unwind(AssertUnwindSafe(|| (self.run)(config, inputs, ctx))) {
            Ok(outcome) => outcome.map_err(|error| ctx.name_files(error)),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it gave no message");
                Err(Error::internal(format!("stage {} panicked: {text}", self.name))
                    .help("this is a bug: please report it with the pipeline file"))
            }
        }
    }

    /// [`StageEntry::run`] on an OS thread of its own, for an async caller; gives the context back.
    ///
    /// # Errors
    /// When the thread cannot be made or ends without an answer.
    pub async fn run_on_thread(
        &self,
        config: Value,
        inputs: Value,
        mut ctx: Ctx,
    ) -> Result<(Result<Value, Error>, Ctx), Error> {
        let entry = *self;
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let body = move || {
            let outcome = entry.run(&config, &inputs, &mut ctx);
            // The caller may have gone away; there is nobody else to tell.
            let _ = sender.send((outcome, ctx));
        };
        std::thread::Builder::new()
            .name(format!("stage {}", self.name))
            .spawn(body)
            .map_err(|source| Error::unavailable("cannot start a thread").source(source))?;
        receiver.await.map_err(|source| Error::internal(format!("stage {} vanished", self.name)).source(source))
    }
}
