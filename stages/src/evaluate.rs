//! `evaluate`: benchmarks in their published columns, on one model or on two of which the second is the yardstick.

use std::path::PathBuf;

use dsv3_core::{
    Artifact, Error, Rng,
    kinds::{Benchmark, Model as ModelKind, Report},
};
use dsv3_data::{BenchmarkRecord, ChatTemplate, read_benchmark};
use dsv3_eval::{ChoiceForm, ExactItem, ExactOptions, Extractor};
use dsv3_model::LoadPrecision;
use dsv3_stage::{Ctx, InputFacts, Problems, Shrink, Stage, ports};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::shared::{facts, folder::ModelFolder, needles};

/// How a task asks and scores.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Kind {
    /// The model answers in a chat; its final answer must equal the reference.
    Exact {
        /// System prompt.
        #[serde(default)]
        system: Option<String>,
        /// 0 is greedy.
        #[serde(default)]
        temperature: f64,
        /// Answers per question.
        #[serde(default = "one")]
        samples: usize,
        /// New tokens of an answer at most.
        #[serde(default = "new_tokens")]
        tokens_max: usize,
        /// Where the answer is looked for.
        #[serde(default)]
        extractor: Extractor,
        /// Questions of more prompt tokens are left out.
        #[serde(default)]
        prompt_tokens_max: Option<usize>,
    },
    /// The choice with the highest mean log-likelihood counts as the answer.
    Choice {
        /// How the question is put.
        #[serde(default)]
        form: ChoiceForm,
    },
    /// A sentence hidden in unrelated text must be recalled.
    Needle {},
    /// Likelihood of published solutions; nothing is executed.
    Code {},
}

fn one() -> usize {
    1
}

fn new_tokens() -> usize {
    256
}

/// One benchmark.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Task {
    /// Name of its figures.
    name: String,
    /// Name of the file among the `data` inputs.
    file: String,
    /// Questions drawn, by the stage's seed; all when absent.
    #[serde(default)]
    questions_max: Option<usize>,
    /// How it asks and scores.
    score: Kind,
}

/// Options of `evaluate`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Benchmarks.
    tasks: Vec<Task>,
    /// Chat template (Jinja) instead of the model's own.
    #[serde(default)]
    chat_template: Option<String>,
}

ports! {
    /// Inputs of `evaluate`.
    pub(crate) struct Inputs {
        /// Model to evaluate.
        model: Artifact<ModelKind>,
        /// Model whose figures are subtracted.
        baseline: Option<Artifact<ModelKind>>,
        /// Benchmark files.
        data: Vec<Artifact<Benchmark>>,
    }
}

ports! {
    /// Outputs of `evaluate`.
    pub(crate) struct Outputs {
        /// All counts, and the first answers of each task.
        report: Artifact<Report>,
    }
}

/// The stage.
pub(crate) struct Evaluate;

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "Scores a model on benchmarks: exact answers, choices by likelihood, retrieval";
    const SHRINK: &'static [Shrink] = &[
        Shrink::Put("tasks.*.questions_max", "2"),
        Shrink::AtMost("tasks.*.score.tokens_max", 8),
        Shrink::AtMost("tasks.*.score.samples", 1),
    ];
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        facts::check_model_folder(inputs, "model", problems);
        facts::check_model_folder(inputs, "baseline", problems);
        let files: Vec<&str> = inputs.all("data").iter().flat_map(facts::file_names).collect();
        let mut names: Vec<&str> = Vec::new();
        for (i, task) in config.tasks.iter().enumerate() {
            if names.contains(&task.name.as_str()) {
                problems.push(format!("config.tasks.{i}.name"), format!("`{}` names two tasks", task.name), "");
            }
            names.push(&task.name);
            if !files.contains(&task.file.as_str()) {
                let help = format!("the inputs have {}", files.join(", "));
                problems.push(format!("config.tasks.{i}.file"), format!("no input is called `{}`", task.file), help);
            }
            if let Kind::Exact { tokens_max, .. } = &task.score {
                let at = format!("config.tasks.{i}.score.tokens_max");
                facts::check_new_tokens(inputs, "model", *tokens_max, &at, problems);
            }
        }
        if config.tasks.iter().any(|task| matches!(task.score, Kind::Exact { .. })) {
            for port in ["model", "baseline"] {
                facts::check_template(inputs, port, config.chat_template.as_deref(), problems);
            }
        }
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let files = local_files(ctx, &inputs.data)?;
        let after = Subject::open(ctx, &inputs.model, &config)?;
        let before = inputs.baseline.as_ref().map(|model| Subject::open(ctx, model, &config)).transpose()?;
        let mut report = serde_json::Map::new();
        for (done, task) in config.tasks.iter().enumerate() {
            ctx.progress(done as u64, Some(config.tasks.len() as u64), "tasks");
            let path = files.iter().find(|(name, _)| *name == task.file).map(|(_, path)| path.clone());
            let path = path.ok_or_else(|| Error::data(format!("task {}: no input file {}", task.name, task.file)))?;
            let scored = after.score(ctx, task, &path)?;
            let yardstick = before.as_ref().map(|subject| subject.score(ctx, task, &path)).transpose()?;
            for (figure, value) in &scored.figures {
                let name = format!("{}.{figure}", task.name);
                ctx.set_metric(&name, *value);
                let old = yardstick.as_ref().and_then(|old| old.figures.iter().find(|(other, _)| other == figure));
                if let Some((_, old)) = old {
                    ctx.set_metric(&suffixed(&name, "_before"), *old);
                    ctx.set_metric(&suffixed(&name, "_gain"), value - old);
                }
            }
            let before = yardstick.map(|old| old.counts);
            report.insert(task.name.clone(), json!({ "model": scored.counts, "baseline": before }));
        }
        let text = serde_json::to_vec_pretty(&report)
            .map_err(|source| Error::internal("the report cannot be written").source(source))?;
        Ok(Outputs { report: ctx.publish(vec![ctx.put("report.json", text)?], json!({}))? })
    }
}

/// `name` with `suffix`, which goes before the place in a grid: `needle.words_gain.512.10`.
fn suffixed(name: &str, suffix: &str) -> String {
    let is_place = |part: &str| part.parse::<u64>().is_ok();
    match name.rsplitn(3, '.').collect::<Vec<_>>()[..] {
        [column, row, family] if is_place(column) && is_place(row) => format!("{family}{suffix}.{row}.{column}"),
        _ => format!("{name}{suffix}"),
    }
}

/// Names and local paths of all benchmark files.
fn local_files(ctx: &Ctx, data: &[Artifact<Benchmark>]) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut files = Vec::new();
    for artifact in data {
        files.extend(ctx.local_files(artifact)?.into_iter().map(|(file, path)| (file.path, path)));
    }
    Ok(files)
}

/// A model under evaluation.
struct Subject {
    folder: ModelFolder,
    template: ChatTemplate,
}

/// What a task gave: figures for the table, counts and first answers for the report.
struct Scored {
    figures: Vec<(String, f64)>,
    counts: Value,
}

impl Subject {
    fn open(ctx: &Ctx, model: &Artifact<ModelKind>, config: &Config) -> Result<Self, Error> {
        let folder = ModelFolder::open(ctx, model, LoadPrecision::Own, false)?;
        let template = match config.tasks.iter().any(|task| matches!(task.score, Kind::Exact { .. })) {
            true => folder.template_or(config.chat_template.as_deref())?,
            false => ChatTemplate::default(),
        };
        Ok(Self { folder, template })
    }

    fn score(&self, ctx: &Ctx, task: &Task, path: &std::path::Path) -> Result<Scored, Error> {
        let (model, tokenizer) = (&self.folder.model, &self.folder.tokenizer);
        let paths = [path.to_owned()];
        // Needles have columns of their own; all other tasks share one reader.
        let records = || read_benchmark(&paths);
        match &task.score {
            Kind::Needle {} => {
                let report = needles::find(model, tokenizer, &paths, ctx.cancel())?;
                some(report.lengths().count(), task)?;
                Ok(Scored { figures: needles::figures(&report), counts: json!(report) })
            }
            Kind::Exact { .. } => self.score_exact(ctx, task, &records()?),
            Kind::Choice { form } => {
                let mut items = dsv3_eval::choice_items(tokenizer, &records()?, form, ctx.seed())?;
                draw(&mut items, task, ctx.seed());
                some(items.len(), task)?;
                let (report, _) = dsv3_eval::choose(model, &items, ctx.cancel())?;
                let figures =
                    vec![("accuracy".to_owned(), report.accuracy()), ("chance".to_owned(), report.chance_accuracy())];
                Ok(Scored { figures, counts: json!(report) })
            }
            Kind::Code {} => {
                let report = dsv3_eval::score_code(model, tokenizer, &records()?, ctx.cancel())?;
                some(report.items as usize, task)?;
                let figures = vec![("logprob_mean".to_owned(), report.logprob_mean())];
                Ok(Scored { figures, counts: json!(report) })
            }
        }
    }

    fn score_exact(&self, ctx: &Ctx, task: &Task, records: &[BenchmarkRecord]) -> Result<Scored, Error> {
        let Kind::Exact { system, temperature, samples, tokens_max, extractor, prompt_tokens_max } = &task.score else {
            return Err(Error::internal(format!("task {} is no exact match", task.name)));
        };
        let tokenizer = &self.folder.tokenizer;
        let questions = records.iter().filter_map(|record| match record {
            BenchmarkRecord::Exact { question, answer } => Some((question.as_str(), answer.as_str())),
            _ => None,
        });
        let mut items: Vec<ExactItem> = dsv3_eval::chat_items(&self.template, tokenizer, system.as_deref(), questions)?;
        items.retain(|item| prompt_tokens_max.is_none_or(|most| item.prompt.len() < most));
        draw(&mut items, task, ctx.seed());
        some(items.len(), task)?;
        let eos = tokenizer.specials().eos.or(self.folder.model.config.eos_token_id);
        let options = ExactOptions {
            max_tokens: *tokens_max,
            temperature: *temperature,
            samples: *samples,
            seed: ctx.seed(),
            eos: eos.ok_or_else(|| Error::data("the tokenizer names no end-of-sequence token"))?,
            extractor: *extractor,
        };
        let (report, answers) = dsv3_eval::exact_match(&self.folder.model, tokenizer, &items, &options, ctx.cancel())?;
        let figures = vec![
            ("accuracy".to_owned(), report.accuracy()),
            ("format".to_owned(), report.format_share()),
            ("tokens".to_owned(), report.length_mean()),
        ];
        let shown: Vec<_> = answers.iter().take(8).collect();
        Ok(Scored { figures, counts: json!({ "counts": report, "first_answers": shown }) })
    }
}

/// Refuses a task without items: its figures would be shares of nothing.
fn some(items: usize, task: &Task) -> Result<(), Error> {
    if items > 0 {
        return Ok(());
    }
    Err(Error::data(format!("task {}: {} holds no question that it can ask", task.name, task.file))
        .help("check the columns of the file, the kind of the task and prompt_tokens_max"))
}

/// Keeps `questions_max` items, drawn by `seed`, in their order.
fn draw<T>(items: &mut Vec<T>, task: &Task, seed: u64) {
    let Some(most) = task.questions_max.filter(|most| *most < items.len()) else { return };
    let mut order: Vec<usize> = (0..items.len()).collect();
    Rng::new(seed).key("questions").key(task.name.as_str()).shuffle(&mut order);
    let mut kept = vec![false; items.len()];
    order[..most].iter().for_each(|i| kept[*i] = true);
    let mut i = 0;
    items.retain(|_| {
        i += 1;
        kept[i - 1]
    });
}
