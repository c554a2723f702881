//! `ingest`: Parquet or JSONL documents to a shuffled, packed stream of tokens.

use dsv3_core::{
    Artifact, Error,
    kinds::{Documents, Report, Tokenizer as TokenizerKind, Tokens},
};
use dsv3_data::{RecordKind, Tokenizer};
use dsv3_hooks::World;
use dsv3_ingest::{DocumentFilter, Host, IngestOptions};
use dsv3_stage::{Ctx, HookPort, InputFacts, OutputFacts, Problems, Shrink, Stage, ports};
use serde_json::json;

use crate::shared::{facts, records::check_records};

ports! {
    /// Inputs of `ingest`.
    pub(crate) struct Inputs {
        /// Parquet or JSONL files with a text column.
        documents: Artifact<Documents>,
        /// A tokenizer.json; without it one is trained on the documents.
        tokenizer: Option<Artifact<TokenizerKind>>,
    }
}

ports! {
    /// Outputs of `ingest`.
    pub(crate) struct Outputs {
        /// The packed stream.
        tokens: Artifact<Tokens>,
        /// The tokenizer the stream was made with.
        tokenizer: Artifact<TokenizerKind>,
        /// What came in, what was dropped and why.
        report: Artifact<Report>,
    }
}

/// The stage.
pub(crate) struct Ingest;

impl Stage for Ingest {
    const NAME: &'static str = "ingest";
    const VERSION: u32 = 1;
    const ABOUT: &'static str =
        "Reads documents, filters and deduplicates them, and packs them into a stream of tokens";
    const HOOKS: &'static [HookPort] = &[HookPort {
        name: "filter",
        world: World::DocumentFilter,
        required: false,
        doc: "Keeps, drops or rewrites documents before anything else is done with them",
    }];
    const SHRINK: &'static [Shrink] = &[Shrink::AtMost("shard_tokens", 4096)];
    type Config = IngestOptions;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Self::Config, inputs: &InputFacts, problems: &mut Problems) {
        check_records(inputs, "documents", RecordKind::Documents(&config.columns), problems);
        for (field, message) in config.problems() {
            problems.push(format!("config.{field}"), message, "");
        }
    }

    fn facts(config: &Self::Config, inputs: &InputFacts) -> OutputFacts {
        let vocab_size = match inputs.has("tokenizer") {
            true => facts::vocab_size(inputs, "tokenizer"),
            false => Some(config.vocab_size),
        };
        let Some(vocab_size) = vocab_size else { return OutputFacts::new() };
        let fact = json!({ "vocab_size": vocab_size });
        [("tokens".to_owned(), fact.clone()), ("tokenizer".to_owned(), fact)].into()
    }

    fn run(config: Self::Config, inputs: Self::Inputs, ctx: &mut Ctx) -> Result<Self::Outputs, Error> {
        let tokenizer = inputs.tokenizer.as_ref().map(|artifact| open_tokenizer(ctx, artifact)).transpose()?;
        let paths: Vec<_> = ctx.local_files(&inputs.documents)?.into_iter().map(|(_, path)| path).collect();
        let hook = ctx.hook("filter").cloned();
        let filter = hook.as_deref().map(|hook| hook as &dyn DocumentFilter);
        let progress = |step: &'static str, done: u64, total: Option<u64>| match step {
            "train tokenizer" => ctx.log_info("training the tokenizer"),
            step => ctx.progress(done, total, unit(step)),
        };
        let host = Host { progress: &progress, cancel: ctx.cancel(), scratch: Some(ctx.scratch_dir()?) };
        let mut files = Vec::new();
        let made = dsv3_ingest::ingest(&config, &paths, tokenizer, filter, ctx.seed(), &host, &mut |name, bytes| {
            files.push(ctx.put(name, bytes)?);
            Ok(())
        })?;
        let report = &made.report;
        ctx.set_metric("documents_in", report.documents_in as f64);
        ctx.set_metric("documents_out", report.documents_out as f64);
        ctx.set_metric("tokens", report.tokens as f64);
        ctx.set_metric("bytes_per_token", report.bytes_per_token);
        ctx.set_metric("filter_faults", report.filter_faults as f64);
        let dropped = report.dropped_text();
        if !dropped.is_empty() {
            ctx.log_info(format!("dropped: {dropped}"));
        }
        let json = |what, source| Error::internal(format!("{what} cannot be written")).source(source);
        let meta = serde_json::to_value(&made.meta).map_err(|source| json("the token counts", source))?;
        let text = serde_json::to_vec_pretty(report).map_err(|source| json("the report", source))?;
        let tokenizer = ctx.put("tokenizer.json", made.tokenizer.to_bytes().to_vec())?;
        Ok(Outputs {
            tokens: ctx.publish(files, meta)?,
            tokenizer: ctx.publish(vec![tokenizer], json!({ "vocab_size": made.tokenizer.vocab_size() }))?,
            report: ctx.publish(vec![ctx.put("report.json", text)?], json!({}))?,
        })
    }
}

/// What a step of the work counts.
fn unit(step: &str) -> &'static str {
    match step {
        "read" => "documents read",
        "tokenise" => "documents tokenised",
        _ => "documents packed",
    }
}

/// Reads the one file of a tokenizer artifact.
pub(crate) fn open_tokenizer(ctx: &Ctx, artifact: &Artifact<TokenizerKind>) -> Result<Tokenizer, Error> {
    let manifest = ctx.manifest(artifact)?;
    let file = manifest.files.iter().find(|file| file.path.ends_with(".json"));
    let file = file.ok_or_else(|| Error::data("the tokenizer artifact holds no tokenizer.json"))?;
    let bytes = ctx.read(artifact, &file.path)?;
    Tokenizer::from_bytes(&bytes).map_err(|error| ctx.in_artifact(artifact, error))
}
