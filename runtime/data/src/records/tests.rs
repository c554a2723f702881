//! Records come from Parquet and JSON lines alike, and faults name file, row and column.

use std::{fs, sync::Arc};

use arrow::{
    array::{ArrayRef, Int64Array, ListBuilder, StringArray, StringBuilder},
    datatypes::{Field, Schema},
};
use parquet::{arrow::ArrowWriter, file::properties::WriterProperties};
use serde_json::json;

use super::*;
use crate::rows::Rows;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn lines(&self, name: &str, rows: &[Value]) -> Vec<PathBuf> {
        let path = self.0.path().join(name);
        fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        vec![path]
    }

    fn parquet(&self, name: &str, columns: Vec<(&str, ArrayRef)>, group_rows: usize) -> Vec<PathBuf> {
        let path = self.0.path().join(name);
        let fields: Vec<Field> = columns.iter().map(|(n, a)| Field::new(*n, a.data_type().clone(), true)).collect();
        let arrays = columns.into_iter().map(|(_, array)| array).collect();
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap();
        let properties = WriterProperties::builder().set_max_row_group_row_count(Some(group_rows)).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        fs::write(&path, writer.into_inner().unwrap()).unwrap();
        vec![path]
    }
}

fn texts(values: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn read(paths: &[PathBuf]) -> Result<Vec<Document>> {
    let columns = DocumentColumns::default();
    let batches: Vec<Result<Vec<Document>>> = read_documents(paths, &columns).collect();
    batches.into_iter().try_fold(Vec::new(), |mut all, batch| {
        all.extend(batch?);
        Ok(all)
    })
}

fn complaint<T: std::fmt::Debug>(result: Result<T>, folder: &Folder) -> String {
    let text = result.unwrap_err().to_string();
    text.replace(&format!("{}/", folder.0.path().display()), "")
}

#[test]
fn documents_come_from_parquet_and_lines_alike() {
    let folder = Folder::new();
    let parquet = folder.parquet(
        "a.parquet",
        vec![("text", texts(&[Some("one"), Some("two")])), ("source", texts(&[Some("s"), None]))],
        1,
    );
    let lines = folder.lines("a.jsonl", &[json!({"text": "one", "source": "s"}), json!({"text": "two", "other": 3})]);
    let plain =
        |paths: &[PathBuf]| -> Vec<_> { read(paths).unwrap().into_iter().map(|d| (d.text, d.source)).collect() };
    assert_eq!(plain(&parquet), [("one".to_owned(), Some("s".to_owned())), ("two".to_owned(), None)]);
    assert_eq!(plain(&parquet), plain(&lines));
}

#[test]
fn faults_of_documents_name_file_row_and_column() {
    let folder = Folder::new();
    let null = folder.parquet("null.parquet", vec![("text", texts(&[Some("a"), Some("b"), None]))], 2);
    assert_eq!(
        complaint(read(&null), &folder),
        "null.parquet: row 2 (row group 1): column \"text\": is null, a text is expected"
    );
    let missing = folder.parquet("missing.parquet", vec![("body", texts(&[Some("a")]))], 2);
    assert_eq!(complaint(read(&missing), &folder), "missing.parquet: column \"text\": is missing; the file has body");
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let number = folder.parquet("number.parquet", vec![("text", numbers)], 2);
    assert_eq!(
        complaint(read(&number), &folder),
        "number.parquet: column \"text\": has type Int64, a text is expected"
    );
    let lines = folder.lines("bad.jsonl", &[json!({"text": "a"}), json!({"text": 4})]);
    assert_eq!(complaint(read(&lines), &folder), "bad.jsonl: line 2: column \"text\": is a number, a text is expected");
    let path = folder.0.path().join("cut.jsonl");
    fs::write(&path, "{\"text\": \"a\"}\n{\"text\":").unwrap();
    assert!(complaint(read(&[path]), &folder).starts_with("cut.jsonl: line 2: is not JSON"));
}

#[test]
fn damaged_parquet_is_one_clear_error_and_never_a_panic() {
    let folder = Folder::new();
    let long: Vec<String> = (0..3000).map(|i| format!("document number {i}")).collect();
    let column: ArrayRef = Arc::new(StringArray::from(long));
    let paths = folder.parquet("whole.parquet", vec![("text", column)], 1000);
    let bytes = fs::read(&paths[0]).unwrap();
    assert_eq!(read(&paths).unwrap().len(), 3000);
    for cut in [0, 3, 4, 8, bytes.len() / 2, bytes.len() - 1] {
        let path = folder.0.path().join("cut.parquet");
        fs::write(&path, &bytes[..cut]).unwrap();
        assert_eq!(complaint(read(&[path]), &folder), "cut.parquet: not a readable Parquet file", "cut at {cut}");
    }
    for at in (4..bytes.len()).step_by(bytes.len() / 97) {
        let path = folder.0.path().join("flipped.parquet");
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x5A;
        fs::write(&path, flipped).unwrap();
        if let Err(error) = read(&[path]) {
            assert!(error.to_string().contains("flipped.parquet: "), "{error}");
        }
    }
}

#[test]
fn chats_are_read_in_three_forms() {
    let folder = Folder::new();
    let rows = [
        json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": 3}),
        json!({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        json!({"prompt": "q", "completion": "a"}),
    ];
    let chats = read_chat(&folder.lines("chat.jsonl", &rows)).unwrap();
    let (user, assistant) = (Message::user("q"), Message::assistant("a"));
    assert_eq!(chats[0].messages, [user.clone(), assistant.clone()]);
    assert_eq!(chats[0].metadata.get("id"), Some(&json!(3)));
    assert_eq!(chats[1].messages, [Message::system("s"), user.clone(), assistant.clone()]);
    assert_eq!(chats[2].messages, [user, assistant]);
    let bad = folder.lines("bad.jsonl", &[json!({"messages": [{"role": "user"}]})]);
    assert_eq!(
        complaint(read_chat(&bad), &folder),
        "bad.jsonl: line 1: column \"messages\": message 0 has no text content"
    );
}

#[test]
fn prompts_keep_what_rewards_need() {
    let folder = Folder::new();
    let rows = [json!({"question": "q", "answer": "48 + 24\n#### 72", "task": "maths", "level": 5, "solution": "s"})];
    let prompt = &read_prompts(&folder.lines("prompts.jsonl", &rows)).unwrap()[0];
    assert_eq!((prompt.answer.as_str(), prompt.task.as_deref()), ("72", Some("maths")));
    assert_eq!((prompt.solution.as_deref(), prompt.metadata.get("level")), (Some("s"), Some(&json!(5))));
    let number = folder.lines("number.jsonl", &[json!({"prompt": "q", "answer": 14})]);
    assert_eq!(read_prompts(&number).unwrap()[0].answer, "14");
    let none = folder.lines("none.jsonl", &[json!({"prompt": "q"})]);
    assert!(complaint(read_prompts(&none), &folder).contains("line 1: column \"answer\": is missing or null"));
}

#[test]
fn traces_are_read_in_the_public_columns() {
    let folder = Folder::new();
    let mut generations = ListBuilder::new(StringBuilder::new());
    generations.append_value(["<think>a</think>1", "<think>b</think>2"].map(Some));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("problem", texts(&[Some("p")])),
        ("solution", texts(&[Some("s")])),
        ("answer", texts(&[Some("2")])),
        ("generations", Arc::new(generations.finish())),
        ("uuid", texts(&[Some("u")])),
    ];
    let trace = &read_traces(&folder.parquet("r1.parquet", columns, 10)).unwrap()[0];
    assert_eq!(trace.generations, ["<think>a</think>1", "<think>b</think>2"]);
    assert_eq!((trace.answer.as_str(), trace.solution.as_deref()), ("2", Some("s")));
    assert_eq!(trace.metadata.get("uuid"), Some(&json!("u")));
    let row =
        json!({"problem": "p", "deepseek_reasoning": "r", "deepseek_solution": "s", "ground_truth_solution": "7"});
    let other = &read_traces(&folder.lines("open.jsonl", &[row])).unwrap()[0];
    assert_eq!((other.generations[0].as_str(), other.answer.as_str()), ("<think>r</think>\ns", "7"));
}

#[test]
fn benchmarks_are_read_in_their_published_columns() {
    let folder = Folder::new();
    let rows = [
        json!({"question": "q", "answer": "x\n#### 1,024"}),
        json!({"question": "q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2}),
        json!({"question_id": 1, "question": "q", "options": ["a", "b"], "answer": "B", "answer_index": 1}),
        json!({"Question": "q", "Correct Answer": "r", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y",
               "Incorrect Answer 3": "z"}),
        json!({"task_id": "HumanEval/0", "prompt": "def f", "canonical_solution": "c", "test": "t", "entry_point": "f"}),
    ];
    let records = read_benchmark(&folder.lines("bench.jsonl", &rows)).unwrap();
    assert_eq!(records[0], BenchmarkRecord::Exact { question: "q".to_owned(), answer: "1024".to_owned() });
    let right = |record: &BenchmarkRecord| match record {
        BenchmarkRecord::Choice { choices, correct, .. } => choices[*correct].clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!([1, 2, 3].map(|i| right(&records[i])), ["c", "b", "r"]);
    assert!(matches!(&records[4], BenchmarkRecord::Code { entry_point, .. } if entry_point == "f"));
    let bad = folder.lines("bad.jsonl", &[json!({"question": "q", "choices": ["a"], "answer": 7})]);
    assert_eq!(
        complaint(read_benchmark(&bad), &folder),
        "bad.jsonl: line 1: column \"answer\": names none of the 1 choices"
    );
}

#[test]
fn rows_carry_every_common_type() {
    let folder = Folder::new();
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
    let dictionary: arrow::array::DictionaryArray<arrow::datatypes::Int32Type> = vec!["x", "y"].into_iter().collect();
    let columns: Vec<(&str, ArrayRef)> = vec![("n", numbers), ("d", Arc::new(dictionary))];
    let paths = folder.parquet("types.parquet", columns, 10);
    let rows: Vec<Row> = Rows::open(&paths[0]).unwrap().map(|row| row.unwrap()).collect();
    assert_eq!(rows[0].values, json!({"n": 1, "d": "x"}).as_object().unwrap().clone());
    assert!(rows[1].has("n") && rows[1].get("n").is_none());
}
