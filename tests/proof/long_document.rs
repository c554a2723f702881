//! One document of many megabytes in a Parquet file: it becomes tokens, all of them, in time that grows with its length and
//! in memory of a few times its length; and a request to stop is heard in the middle of it.
//!
//! `DSV3_DOCUMENT_MB=200 cargo test --release --test main long_document -- --nocapture` is the long form;
//! `tests/README.md` has its figures. Default 8 MB.

use std::{fmt::Write, path::PathBuf, sync::Arc, time::Instant};

use arrow::{
    array::{RecordBatch, StringArray},
    datatypes::{DataType, Field, Schema},
};
use dsv3_core::Rng;
use dsv3_data::{TokenDataset, TokenMeta, Tokenizer};
use parquet::arrow::ArrowWriter;
use serde_json::Value;

use crate::tiny::{Ended, Place};

fn megabytes() -> usize {
    std::env::var("DSV3_DOCUMENT_MB").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

/// Prose, numbers and tables whose parts do not repeat.
fn document(bytes: usize) -> String {
    let mut rng = Rng::new(11);
    let words = "the of shells counted river and seven never a house under which green letters to";
    let words: Vec<&str> = words.split(' ').collect();
    let mut text = String::with_capacity(bytes + 1000);
    while text.len() < bytes {
        let word = |rng: &mut Rng| words[rng.below(words.len() as u64) as usize];
        let sentence: Vec<&str> = (0..5 + rng.below(12)).map(|_| word(&mut rng)).collect();
        let _ = write!(text, "{} {}; {} x{}.", sentence.join(" "), rng.next_u64(), word(&mut rng), rng.below(1000));
        text += ["\n", " ", "\n\n\t", " \u{e9}\u{65e5}\u{672c} "][rng.below(4) as usize];
    }
    text
}

/// A pipeline that learns a tokenizer from a few short documents and packs the long one with it.
fn pipeline(place: &Place, text: &str) -> String {
    let short: String = (0..50)
        .map(|i| format!("{}\n", serde_json::json!({ "text": format!("{i}: {}", document(400 + i)) })))
        .collect();
    place.write("short.jsonl", short);
    let schema = Arc::new(Schema::new(vec![Field::new("text", DataType::Utf8, false)]));
    let batch = RecordBatch::try_new(schema, vec![Arc::new(StringArray::from(vec!["before", text, "after"]))]);
    let batch = batch.expect("a batch");
    let file = std::fs::File::create(place.path().join("long.parquet")).expect("a file");
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("written");
    writer.close().expect("written");
    place.write(
        "long.yaml",
        "version: 1\nstages:\n  words: { type: ingest, inputs: { documents: short.jsonl }, config: { vocab_size: 700, \
         row_tokens: 128 } }\n  long: { type: ingest, inputs: { documents: long.parquet, tokenizer: words.tokenizer }, config: { \
         shuffle: false, row_tokens: 1024, shard_tokens: 1048576 } }\n",
    )
}

/// The packed stream and its tokenizer, read from the store.
fn stream(place: &Place, ended: &Ended) -> (Vec<u32>, Tokenizer) {
    let blob = |digest: &str| place.store().join("blobs").join(digest);
    let manifest = |digest: &str| -> Value {
        serde_json::from_slice(&std::fs::read(blob(digest)).expect("a manifest")).expect("JSON")
    };
    let tokens = manifest(&ended.output("long", "tokens"));
    let files = tokens["files"].as_array().expect("files").iter();
    let shards: Vec<PathBuf> = files.map(|file| blob(file["digest"].as_str().expect("a digest"))).collect();
    let meta: TokenMeta = serde_json::from_value(tokens["meta"].clone()).expect("the facts");
    let dataset = TokenDataset::open(&shards, &meta).expect("a data set");
    let tokenizer = std::fs::read(blob(&place.file_digest(&ended.output("long", "tokenizer"), ""))).expect("a file");
    (dataset.read(0..meta.total_tokens).expect("tokens"), Tokenizer::from_bytes(&tokenizer).expect("a tokenizer"))
}

/// Largest resident size of any child of this process so far, in bytes.
fn children_bytes_max() -> u64 {
    // SAFETY: the call fills a structure of integers that is ours.
    #[allow(unsafe_code)]
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    usage.ru_maxrss as u64 * 1024
}

#[test]
fn a_long_document_becomes_its_tokens() {
    let (place, text) = (Place::new(), document(megabytes() << 20));
    let pipeline = pipeline(&place, &text);
    let began = Instant::now();
    let ended = place.watch(&["run", &pipeline], |_| None);
    assert_eq!(ended.code, Some(0), "{}", ended.errors);
    let (seconds, resident) = (began.elapsed().as_secs_f64(), children_bytes_max());
    println!("{} MB: {seconds:.1} s, resident at most {} MB (any child process)", text.len() >> 20, resident >> 20);
    let (stream, tokenizer) = stream(&place, &ended);
    let eos = tokenizer.specials().eos.expect("an end");
    let documents: Vec<String> = stream.split(|id| *id == eos).map(|ids| tokenizer.decode(ids)).collect();
    assert!(documents == ["before", &text, "after", ""], "every byte of it is there, in its place");
}

#[test]
fn a_request_to_stop_is_heard_inside_a_long_document() {
    let place = Place::new();
    let pipeline = pipeline(&place, &document(megabytes() << 20));
    // The last thing that is said before the document is tokenised is that it was read.
    let read = |event: &Value| (event["event"] == "progress" && event["stage"] == "long").then_some(libc::SIGINT);
    let began = Instant::now();
    let ended = place.watch(&["run", &pipeline], read);
    println!("stopped after {:.1} s in all", began.elapsed().as_secs_f64());
    assert_eq!(ended.code, Some(75), "{}", ended.errors);
    let said = ended.of("progress", "long").count();
    assert_eq!(said, 1, "it was not tokenised to its end: {:?}", ended.of("progress", "long").collect::<Vec<_>>());
    let again = place.watch(&["run", &pipeline, "--until", "words"], |_| None);
    assert_eq!((again.code, again.outcome("words")), (Some(0), Some("cached")), "{}", again.errors);
}
