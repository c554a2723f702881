//! Records of data sets in the columns people publish: documents, chats, prompts with answers, distillation traces,
//! benchmarks. Each from Parquet or JSONL.

use std::path::{Path, PathBuf};

use arrow::{
    array::{Array, AsArray, LargeStringArray, StringArray, StringViewArray},
    datatypes::DataType,
    record_batch::RecordBatch,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    chat::Message,
    error::{DataError, Location, Result},
    rows::{BATCH_BYTES, BATCH_ROWS, ParquetReader, Row, Rows, is_parquet},
};

/// Which columns of a document file are read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DocumentColumns {
    /// Column with the text.
    pub text: String,
    /// Column that names where a document comes from; read when it is there.
    pub source: String,
}

impl Default for DocumentColumns {
    fn default() -> Self {
        Self { text: "text".to_owned(), source: "source".to_owned() }
    }
}

/// A document of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Where it stands.
    pub at: Location,
    /// Its text.
    pub text: String,
    /// Where it comes from, when the file says so.
    pub source: Option<String>,
}

/// Reads documents of all files in order, in batches of at most 1024 documents and, about, 64 MiB of text.
///
/// # Errors
/// Each item may be one: a damaged file, a missing text column, a null or a wrong type, with the place.
pub fn read_documents<'a>(
    paths: &'a [PathBuf],
    columns: &'a DocumentColumns,
) -> impl Iterator<Item = Result<Vec<Document>>> + 'a {
    paths.iter().flat_map(move |path| match DocumentFile::open(path, columns) {
        Ok(file) => Box::new(file) as Box<dyn Iterator<Item = Result<Vec<Document>>>>,
        Err(error) => Box::new(std::iter::once(Err(error))),
    })
}

pub(crate) enum DocumentFile<'a> {
    Parquet(ParquetReader, &'a DocumentColumns),
    Lines(Rows, &'a DocumentColumns),
    Done,
}

impl<'a> DocumentFile<'a> {
    pub(crate) fn open(path: &Path, columns: &'a DocumentColumns) -> Result<Self> {
        if !is_parquet(path)? {
            return Ok(Self::Lines(Rows::open(path)?, columns));
        }
        let wanted = [columns.text.as_str(), columns.source.as_str()];
        let reader = ParquetReader::open(path, Some(&wanted))?;
        let problem =
            |message: String| Err(DataError::Column { path: path.to_owned(), column: columns.text.clone(), message });
        match reader.schema().field_with_name(&columns.text) {
            Err(_) => {
                let all = ParquetReader::open(path, None)?.schema();
                let names: Vec<&str> = all.fields().iter().map(|f| f.name().as_str()).collect();
                problem(format!("is missing; the file has {}", names.join(", ")))
            }
            Ok(field) if !is_text(field.data_type()) => {
                problem(format!("has type {}, a text is expected", field.data_type()))
            }
            Ok(_) => Ok(Self::Parquet(reader, columns)),
        }
    }

    fn step(&mut self) -> Result<Option<Vec<Document>>> {
        match self {
            Self::Done => Ok(None),
            Self::Lines(rows, columns) => {
                let (mut batch, mut bytes) = (Vec::new(), 0);
                for row in rows.by_ref().take(BATCH_ROWS) {
                    let row = row?;
                    let text = row.text(&columns.text)?.to_owned();
                    let source = row.optional_text(&columns.source)?.map(str::to_owned);
                    bytes += text.len();
                    batch.push(Document { at: row.at, text, source });
                    if bytes >= BATCH_BYTES {
                        break;
                    }
                }
                Ok((!batch.is_empty()).then_some(batch))
            }
            Self::Parquet(reader, columns) => {
                let Some(batch) = reader.next_batch()? else { return Ok(None) };
                document_batch(reader, &batch, columns).map(Some)
            }
        }
    }
}

impl Iterator for DocumentFile<'_> {
    type Item = Result<Vec<Document>>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if !matches!(step, Some(Ok(_))) {
            *self = Self::Done;
        }
        step
    }
}

fn document_batch(reader: &ParquetReader, batch: &RecordBatch, columns: &DocumentColumns) -> Result<Vec<Document>> {
    let text = batch.column_by_name(&columns.text);
    let source = batch.column_by_name(&columns.source);
    let document = |index: usize| {
        let at = reader.location(index);
        let Some(text) = text.and_then(|column| text_at(column.as_ref(), index)) else {
            let message = "is null, a text is expected".to_owned();
            return Err(DataError::Value { at, column: columns.text.clone(), message });
        };
        let source = source.and_then(|column| text_at(column.as_ref(), index)).map(str::to_owned);
        Ok(Document { at, text: text.to_owned(), source })
    };
    (0..batch.num_rows()).map(document).collect()
}

fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => is_text(values),
        _ => false,
    }
}

fn text_at(array: &dyn Array, index: usize) -> Option<&str> {
    if array.is_null(index) {
        return None;
    }
    let any = array.as_any();
    match array.data_type() {
        DataType::Utf8 => any.downcast_ref::<StringArray>().map(|a| a.value(index)),
        DataType::LargeUtf8 => any.downcast_ref::<LargeStringArray>().map(|a| a.value(index)),
        DataType::Utf8View => any.downcast_ref::<StringViewArray>().map(|a| a.value(index)),
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = dictionary.normalized_keys().get(index).copied()?;
            text_at(dictionary.values().as_ref(), key)
        }
        _ => None,
    }
}

/// A conversation to learn from.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRecord {
    /// Where it stands.
    pub at: Location,
    /// Turns, the last of them the assistant's.
    pub messages: Vec<Message>,
    /// All other columns.
    pub metadata: Map<String, Value>,
}

/// A prompt whose answer is checked by a rule or a hook.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptRecord {
    /// Where it stands.
    pub at: Location,
    /// Turns, the last of them the user's.
    pub messages: Vec<Message>,
    /// The right answer.
    pub answer: String,
    /// Which rule or hook configuration judges it.
    pub task: Option<String>,
    /// The data set's own response, when it has one (column `solution`, `response` or `completion`).
    pub solution: Option<String>,
    /// All other columns, for rewards.
    pub metadata: Map<String, Value>,
}

/// A problem with the traces a teacher wrote for it.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceRecord {
    /// Where it stands.
    pub at: Location,
    /// The problem.
    pub problem: String,
    /// The right answer.
    pub answer: String,
    /// The data set's own response, when it has one.
    pub solution: Option<String>,
    /// The teacher's responses, right and wrong ones, in the order they were made.
    pub generations: Vec<String>,
    /// All other columns.
    pub metadata: Map<String, Value>,
}

/// Reads conversations: `messages` (or `conversations` with `from` and `value`), or `prompt` and `completion` (or
/// `response`), with `system` beside them if it is there.
///
/// # Errors
/// At the first file, row or column that cannot be used, with its place.
pub fn read_chat(paths: &[PathBuf]) -> Result<Vec<ChatRecord>> {
    read_all(paths, chat_record)
}

pub(crate) fn chat_record(row: &Row) -> Result<ChatRecord> {
    let mut messages = conversation(row)?;
    let mut used = vec!["messages", "conversations", "prompt", "system"];
    if messages.last().is_none_or(|last| last.role != "assistant") {
        let column = first_of(row, &["completion", "response", "answer"]).unwrap_or("completion");
        messages.extend(turn_texts(row, column, "assistant")?);
        used.push(column);
    }
    Ok(ChatRecord { at: row.at.clone(), messages, metadata: rest(row, &used) })
}

/// Reads prompts: `messages`, `prompt`, `problem` or `question`, with `answer` and, if they are there, `task`, `system`
/// and `solution`. A GSM8K answer counts from its `####` on.
///
/// # Errors
/// At the first file, row or column that cannot be used, with its place.
pub fn read_prompts(paths: &[PathBuf]) -> Result<Vec<PromptRecord>> {
    read_all(paths, prompt_record)
}

pub(crate) fn prompt_record(row: &Row) -> Result<PromptRecord> {
    let messages = conversation(row)?;
    let answer = scalar(row, "answer")?;
    let solution_column = first_of(row, &["solution", "response", "completion"]);
    let solution = solution_column.map(|column| row.text(column)).transpose()?.map(str::to_owned);
    let mut used = vec!["messages", "conversations", "prompt", "problem", "question", "system", "answer", "task"];
    used.extend(solution_column);
    Ok(PromptRecord {
        at: row.at.clone(),
        messages,
        answer: final_answer(&answer).to_owned(),
        task: row.optional_text("task")?.map(str::to_owned),
        solution,
        metadata: rest(row, &used),
    })
}

/// Reads distillation traces in the columns of the public R1 sets: `problem` (or `question`, `prompt`), `generations` (a
/// list; or one text in `generation`, `response`, or `deepseek_reasoning` with `deepseek_solution`), `answer` (or
/// `ground_truth_solution`), `solution`.
///
/// # Errors
/// At the first file, row or column that cannot be used, with its place.
pub fn read_traces(paths: &[PathBuf]) -> Result<Vec<TraceRecord>> {
    read_all(paths, trace_record)
}

pub(crate) fn trace_record(row: &Row) -> Result<TraceRecord> {
    let problem_column = first_of(row, &["problem", "question", "prompt"]).unwrap_or("problem");
    let problem = row.text(problem_column)?.to_owned();
    let generations = match first_of(row, &["generations", "generation", "response", "deepseek_reasoning"]) {
        Some("deepseek_reasoning") => {
            let (thought, said) = (row.text("deepseek_reasoning")?, row.text("deepseek_solution")?);
            vec![format!("<think>{thought}</think>\n{said}")]
        }
        column => row.texts(column.unwrap_or("generations"))?.into_iter().map(str::to_owned).collect(),
    };
    let answer_column = first_of(row, &["answer", "ground_truth_solution", "solution"]).unwrap_or("answer");
    let answer = scalar(row, answer_column)?;
    let solution = row.optional_text("solution")?.map(str::to_owned);
    let used = [problem_column, "generations", "generation", "response", answer_column, "solution"];
    let metadata = rest(row, &used);
    let answer = final_answer(&answer).to_owned();
    Ok(TraceRecord { at: row.at.clone(), problem, answer, solution, generations, metadata })
}

/// A benchmark question in its published columns.
#[derive(Clone, Debug, PartialEq)]
pub enum BenchmarkRecord {
    /// One final answer, compared exactly: GSM8K (`question`, `answer` with `####`), or any `question` and `answer`.
    Exact {
        /// The question.
        question: String,
        /// The final answer, thousands separators removed.
        answer: String,
    },
    /// Several choices: MMLU (`choices`, `answer`), MMLU-Pro (`options`, `answer_index`), GPQA (`Question`, `Correct
    /// Answer`, `Incorrect Answer 1` to `3`; the correct one first).
    Choice {
        /// The question.
        question: String,
        /// The choices.
        choices: Vec<String>,
        /// Index of the right one.
        correct: usize,
    },
    /// HumanEval (`prompt`, `test`, `entry_point`, `canonical_solution`).
    Code {
        /// Start of the program.
        prompt: String,
        /// Program that checks it.
        test: String,
        /// Function under test.
        entry_point: String,
        /// The published solution.
        canonical_solution: String,
    },
}

/// Reads a benchmark; its columns say which form it has.
///
/// # Errors
/// At the first file, row or column that cannot be used, with its place.
pub fn read_benchmark(paths: &[PathBuf]) -> Result<Vec<BenchmarkRecord>> {
    read_all(paths, benchmark_row)
}

fn benchmark_row(row: &Row) -> Result<BenchmarkRecord> {
    let owned = |column: &str| row.text(column).map(str::to_owned);
    if row.has("entry_point") {
        return Ok(BenchmarkRecord::Code {
            prompt: owned("prompt")?,
            test: owned("test")?,
            entry_point: owned("entry_point")?,
            canonical_solution: owned("canonical_solution")?,
        });
    }
    if row.has("Correct Answer") {
        let columns = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"];
        let choices = columns.into_iter().map(owned).collect::<Result<_>>()?;
        return Ok(BenchmarkRecord::Choice { question: owned("Question")?, choices, correct: 0 });
    }
    let question_column = first_of(row, &["question", "problem", "prompt"]).unwrap_or("question");
    let question = owned(question_column)?;
    let Some(column) = first_of(row, &["choices", "options"]) else {
        let answer = scalar(row, "answer")?;
        return Ok(BenchmarkRecord::Exact { question, answer: final_answer(&answer).replace(',', "") });
    };
    let choices: Vec<String> = row.texts(column)?.into_iter().map(str::to_owned).collect();
    let answer_column = first_of(row, &["answer_index", "answer"]).unwrap_or("answer");
    let correct = match row.get(answer_column) {
        Some(Value::Number(number)) => number.as_u64().map(|n| n as usize),
        Some(Value::String(text)) => choice_letter(text),
        _ => None,
    };
    match correct {
        Some(correct) if correct < choices.len() => Ok(BenchmarkRecord::Choice { question, choices, correct }),
        _ => Err(row.error(answer_column, format!("names none of the {} choices", choices.len()))),
    }
}

/// `B` is 1; digits count as themselves.
fn choice_letter(text: &str) -> Option<usize> {
    match text.trim().as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
        _ => text.trim().parse().ok(),
    }
}

/// What stands after the last `####`, or the whole text.
fn final_answer(text: &str) -> &str {
    text.rsplit("####").next().unwrap_or(text).trim()
}

fn read_all<T>(paths: &[PathBuf], record: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    let mut all = Vec::new();
    for path in paths {
        for row in Rows::open(path)? {
            all.push(record(&row?)?);
        }
    }
    Ok(all)
}

fn first_of<'a>(row: &Row, columns: &[&'a str]) -> Option<&'a str> {
    columns.iter().copied().find(|column| row.get(column).is_some())
}

/// A text, or a number as text.
fn scalar(row: &Row, column: &str) -> Result<String> {
    match row.get(column) {
        Some(Value::Number(number)) => Ok(number.to_string()),
        _ => row.text(column).map(str::to_owned),
    }
}

fn rest(row: &Row, used: &[&str]) -> Map<String, Value> {
    row.values.iter().filter(|(name, _)| !used.contains(&name.as_str())).map(|(n, v)| (n.clone(), v.clone())).collect()
}

/// The turns of a row, with `system` first if that column is there and no system turn is.
fn conversation(row: &Row) -> Result<Vec<Message>> {
    let column = first_of(row, &["messages", "conversations", "prompt", "problem", "question"]).unwrap_or("messages");
    let mut messages = turn_texts(row, column, "user")?;
    if messages.is_empty() {
        return Err(row.error(column, "holds no message"));
    }
    if let Some(system) = row.optional_text("system")?
        && messages[0].role != "system"
    {
        messages.insert(0, Message::system(system));
    }
    Ok(messages)
}

/// A column that is a list of messages, or one text of `role`.
fn turn_texts(row: &Row, column: &str, role: &str) -> Result<Vec<Message>> {
    let Some(Value::Array(list)) = row.get(column) else {
        return Ok(vec![Message::new(role, row.text(column)?)]);
    };
    list.iter().enumerate().map(|(i, value)| message(row, column, i, value)).collect()
}

fn message(row: &Row, column: &str, index: usize, value: &Value) -> Result<Message> {
    let field = |names: [&str; 2]| names.into_iter().find_map(|name| value.get(name)?.as_str());
    let missing = |name| row.error(column, format!("message {index} has no text {name}"));
    let role = field(["role", "from"]).ok_or_else(|| missing("role"))?;
    let content = field(["content", "value"]).ok_or_else(|| missing("content"))?;
    let role = match role {
        "human" => "user",
        "gpt" => "assistant",
        other => other,
    };
    Ok(Message::new(role, content))
}

#[cfg(test)]
mod tests;
