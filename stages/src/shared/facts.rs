//! What is known about models and tokens before anything runs.

use dsv3_model::{HfConfig, ModelConfig};
use dsv3_stage::{InputFacts, OutputFacts, PortFacts, Problems};
use serde_json::{Value, json};

/// The configuration of the model at `port`: stated by the stage that makes it, or read from the folder.
pub(crate) fn model_config(facts: &InputFacts, port: &str) -> Option<ModelConfig> {
    if let Some(config) = facts.fact(port, "config") {
        return serde_json::from_value(config.clone()).ok();
    }
    let bytes = std::fs::read(facts.external_file(port, "config.json")?).ok()?;
    HfConfig::from_json(&bytes).ok().map(|config| config.model)
}

/// Checks a model folder given from outside: there must be a readable `config.json`, weights and a tokenizer.
pub(crate) fn check_model_folder(facts: &InputFacts, port: &str, problems: &mut Problems) {
    let Some(files) = facts.external(port) else { return };
    let path = format!("inputs.{port}");
    let Some(config) = facts.external_file(port, "config.json") else {
        let has_config = files.iter().any(|file| file.ends_with("/config.json"));
        if !has_config {
            problems.push(path, "the folder has no config.json", "give a Hugging Face model folder");
        }
        return;
    };
    // Names, shapes and types against config.json; no weight is read.
    let folder = config.parent().unwrap_or(config);
    if let Err(error) = dsv3_model::check_folder(folder) {
        let problem = dsv3_core::Error::from(error);
        problems.push(path.clone(), chain(&problem), problem.help.unwrap_or_default());
        return;
    }
    if !files.iter().any(|file| file.ends_with(".safetensors")) {
        problems.push(path.clone(), "the folder has no .safetensors file", "give a Hugging Face model folder");
    }
    if facts.external_file(port, "tokenizer.json").is_none() {
        problems.push(path, "the folder has no tokenizer.json", "put the model's tokenizer.json into the folder");
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Facts of a model output.
pub(crate) fn of_model(config: &ModelConfig, format: &str, has_template: bool) -> Value {
    json!({ "config": config, "dtype": format, "chat_template": has_template })
}

/// The facts of a stage whose only output is `model`.
pub(crate) fn model_output(config: Option<&ModelConfig>, format: &str, has_template: bool) -> OutputFacts {
    let mut facts = OutputFacts::new();
    if let Some(config) = config {
        facts.insert("model".to_owned(), of_model(config, format, has_template));
    }
    facts
}

/// Whether the model at `port` is known to come with a chat template; none when nothing is known.
pub(crate) fn has_template(facts: &InputFacts, port: &str) -> Option<bool> {
    if let Some(known) = facts.fact(port, "chat_template") {
        return known.as_bool();
    }
    facts.external(port)?;
    let named = ["chat_template.jinja", "chat_template.json"];
    if named.iter().any(|name| facts.external_file(port, name).is_some()) {
        return Some(true);
    }
    let Some(config) = facts.external_file(port, "tokenizer_config.json") else { return Some(false) };
    let bytes = std::fs::read(config).ok()?;
    Some(dsv3_data::ChatTemplate::from_tokenizer_config(&bytes).ok()?.is_some())
}

/// Vocabulary size of the tokenizer or tokens at `port`, if it is known.
pub(crate) fn vocab_size(facts: &InputFacts, port: &str) -> Option<usize> {
    if let Some(known) = facts.fact(port, "vocab_size") {
        return known.as_u64().map(|size| size as usize);
    }
    let file = facts.external(port)?.iter().find(|file| file.ends_with(".json") && !file.contains("://"))?;
    dsv3_data::Tokenizer::from_file(std::path::Path::new(file)).ok().map(|tokenizer| tokenizer.vocab_size())
}

/// Checks that the tokenizer or tokens at `port` fit a model of `vocab_size` rows.
pub(crate) fn check_vocabulary(facts: &InputFacts, port: &str, rows: usize, at: &str, problems: &mut Problems) {
    if let Some(found) = vocab_size(facts, port)
        && found > rows
    {
        let message = format!("the model has {rows} rows, but `{port}` uses a vocabulary of {found} tokens");
        problems.push(at, message, format!("set vocab_size to at least {found}"));
    }
}

/// Checks that `tokens` new tokens leave room for a prompt in the context of the model at `port`, if that is known.
pub(crate) fn check_new_tokens(facts: &InputFacts, port: &str, tokens: usize, at: &str, problems: &mut Problems) {
    let Some(most) = model_config(facts, port).map(|model| model.max_position_embeddings) else { return };
    if tokens >= most {
        let message = format!("{tokens} new tokens leave no room for a prompt in the model's {most} positions");
        problems.push(at, message, format!("set it below {most}, less the longest prompt"));
    }
}

/// Checks that something rewards: a hook at `reward`, or a rule.
pub(crate) fn check_reward(facts: &InputFacts, rules: usize, problems: &mut Problems) {
    if rules == 0 && !facts.has_hook("reward") {
        problems.push("config.rules", "there is no rule and no reward hook", "set hooks.reward or config.rules");
    }
}

/// Names of the external files of one artifact.
pub(crate) fn file_names(facts: &PortFacts) -> Vec<&str> {
    match facts {
        PortFacts::Upstream(_) => Vec::new(),
        PortFacts::External(files) => files.iter().filter_map(|file| file.rsplit('/').next()).collect(),
    }
}

/// Checks that there is a chat template: `given` in the config, or known to come with the model at `port`.
pub(crate) fn check_template(facts: &InputFacts, port: &str, given: Option<&str>, problems: &mut Problems) {
    let at = "config.chat_template";
    match given.map(dsv3_data::ChatTemplate::new) {
        Some(Err(error)) => problems.push(at, error.to_string(), ""),
        Some(Ok(_)) => {}
        None if has_template(facts, port) == Some(false) => {
            let message = format!("the model at `{port}` has no chat template and the config gives none");
            problems.push(at, message, "set chat_template, or add chat_template.jinja to the folder");
        }
        None => {}
    }
}
