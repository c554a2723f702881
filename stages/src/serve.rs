//! `serve`: starts the OpenAI-compatible server on a model, asks it something over HTTP, and stops unless told to stay.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use dsv3_core::{
    Artifact, Error,
    kinds::{Model as ModelKind, Report},
};
use dsv3_http::{AppState, ModelText, Served, SmokeOptions, smoke};
use dsv3_infer::{Engine, Options};
use dsv3_model::LoadPrecision;
use dsv3_stage::{Ctx, InputFacts, Problems, Shrink, Stage, ports};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::shared::{facts, folder};

/// Options of `serve`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// What the server is asked once it runs: user messages, or raw prompts for a model without a chat template.
    prompts: Vec<String>,
    /// New tokens of an answer at most.
    tokens_max: usize,
    /// Drafts with the multi-token prediction head; the text stays the same.
    #[schemars(extend("x-key" = "performance"))]
    speculate: bool,
    /// Address to listen on; port 0 takes a free one.
    #[schemars(extend("x-key" = "performance"))]
    address: SocketAddr,
    /// Latent cache in MiB at most.
    #[schemars(extend("x-key" = "performance"))]
    cache_mib: usize,
}

impl Default for Config {
    fn default() -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { prompts: vec!["Hello".to_owned()], tokens_max: 64, speculate: true, address, cache_mib: 512 }
    }
}

ports! {
    /// Inputs of `serve`.
    pub(crate) struct Inputs {
        /// Model to serve, in its own precision.
        model: Artifact<ModelKind>,
    }
}

ports! {
    /// Outputs of `serve`.
    pub(crate) struct Outputs {
        /// Questions and answers.
        report: Artifact<Report>,
    }
}

/// The stage.
pub(crate) struct Serve;

impl Stage for Serve {
    const NAME: &'static str = "serve";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "Serves a model over an OpenAI-compatible HTTP API and checks that it answers";
    const LOOSE_FIGURES: &'static [&'static str] = &["tokens_per_second", "draft_acceptance"];
    const SHRINK: &'static [Shrink] = &[Shrink::AtMost("tokens_max", 4)];
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        facts::check_model_folder(inputs, "model", problems);
        facts::check_new_tokens(inputs, "model", config.tokens_max, "config.tokens_max", problems);
        if config.tokens_max == 0 {
            problems.push("config.tokens_max", "an answer needs at least one token", "");
        }
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let dir = ctx.local_dir(&inputs.model)?;
        let loaded =
            dsv3_model::load(&dir, LoadPrecision::Own, false).map_err(|error| ctx.in_artifact(&inputs.model, error))?;
        folder::warn(ctx, &dir, &loaded.warnings);
        let model = Arc::new(loaded.model);
        let served = Served {
            model_id: ctx.stage().to_owned(),
            aliases: Vec::new(),
            text: ModelText::from_folder(&dir).map_err(|error| ctx.in_artifact(&inputs.model, error))?,
            context_tokens: model.config.max_position_embeddings,
            vocab_size: model.config.vocab_size,
            speculate: config.speculate,
        };
        let options = Options::default().fitting(model.as_ref(), config.cache_mib << 20);
        let state = AppState::new(served, Engine::start(model, options)?);
        let ask = SmokeOptions {
            address: config.address,
            prompts: config.prompts.clone(),
            max_tokens: config.tokens_max,
            timeout: Duration::from_secs(120),
            stay: ctx.stay(),
        };
        let said = smoke(&state, &ask, ctx.cancel(), |address| ctx.log_info(format!("serving on http://{address}")))?;
        ctx.set_metric("tokens_per_second", said.tokens_per_second);
        ctx.set_metric("completion_tokens", said.completion_tokens as f64);
        if let Some(acceptance) = said.draft_acceptance {
            ctx.set_metric("draft_acceptance", acceptance);
        }
        let pairs: Vec<_> = config.prompts.iter().zip(&said.answers).collect();
        for (prompt, answer) in &pairs {
            ctx.log_info(format!("{prompt:?} -> {answer:?}"));
        }
        let text = serde_json::to_vec_pretty(&pairs)
            .map_err(|source| Error::internal("the answers cannot be written").source(source))?;
        Ok(Outputs { report: ctx.publish(vec![ctx.put("answers.json", text)?], json!({}))? })
    }
}
