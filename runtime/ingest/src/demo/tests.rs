//! What ships is what the generator makes, and holds what its documentation says. `DSV3_UPDATE=1` rewrites the files.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use dsv3_core::Cancel;
use dsv3_data::{BenchmarkRecord, Rows, Tokenizer, read_benchmark, read_documents, read_prompts, read_traces};

use super::{
    corpus::{JUNK, LONG, MIX},
    passkeys::{ANIMALS, COLOURS, Key},
    problems::Problem,
    real::Part,
    *,
};
use crate::{AlignOptions, FimOptions, Host, Ingested, ingest};

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../pipelines/data")
}

fn files(prefix: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(shipped()).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix));
    all.sort();
    assert!(!all.is_empty(), "no shipped file {prefix}*");
    all
}

fn run(options: &IngestOptions, paths: &[PathBuf], tokenizer: Option<Tokenizer>) -> Ingested {
    let host = Host { progress: &|_, _, _| (), cancel: &Cancel::new(), scratch: None };
    ingest(options, paths, tokenizer, Some(quality()), 7, &host, &mut |_, _| Ok(())).unwrap()
}

/// The example filter as the recipe configures it.
fn quality() -> &'static dsv3_hooks::Hook {
    static HOOK: OnceLock<(dsv3_hooks::Host, dsv3_hooks::Hook)> = OnceLock::new();
    let (_, hook) = HOOK.get_or_init(|| {
        let wasm = shipped().join("../../schemas/hooks/examples/quality.wasm");
        let config = serde_json::json!({ "min_words": 5 });
        let (limits, policy) = (dsv3_hooks::Limits::default(), dsv3_hooks::OnError::Fail);
        let host = dsv3_hooks::Host::new(None).unwrap();
        let bytes = std::fs::read(wasm).unwrap();
        let hook = host.load("quality", &bytes, dsv3_hooks::World::DocumentFilter, &config, limits, policy).unwrap();
        (host, hook)
    });
    hook
}

/// The ingest of `pipelines/full.yaml`.
fn corpus_run() -> &'static Ingested {
    static RUN: OnceLock<Ingested> = OnceLock::new();
    RUN.get_or_init(|| {
        let sources = ["shakespeare", "gsm8k"].map(str::to_owned).to_vec();
        let options = IngestOptions { row_tokens: 128, fim: FimOptions { rate: 0.1, sources }, ..tokenizer_options() };
        run(&options, &files("corpus-"), None)
    })
}

#[test]
fn shipped_files_are_what_the_generator_makes() {
    let update = std::env::var_os("DSV3_UPDATE").is_some();
    if let Some(raw) = std::env::var_os("DSV3_RAW").filter(|_| update) {
        for (name, bytes) in real::import(Path::new(&raw)).unwrap() {
            std::fs::write(shipped().join(name), bytes).unwrap();
        }
    }
    let content = |path: &Path| Rows::open(path).unwrap().map(|row| row.unwrap().values).collect::<Vec<_>>();
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in generate(&shipped()).unwrap() {
        assert!(bytes.len() <= FILE_BYTES_MAX, "{name}: {} bytes", bytes.len());
        if update {
            std::fs::write(shipped().join(&name), &bytes).unwrap();
        }
        let fresh = folder.path().join(&name);
        std::fs::write(&fresh, bytes).unwrap();
        let committed = shipped().join(&name);
        assert!(committed.is_file(), "{name} is not committed: run `dsv3-pipeline generate`");
        assert!(content(&fresh) == content(&committed), "{name} differs: run `dsv3-pipeline generate`");
    }
}

#[test]
fn numbers_and_code_words_are_one_token() {
    let tokenizer = &corpus_run().tokenizer;
    let numbers = (0..20).map(|n| format!(" {n}"));
    let marks = TRACE_WORDS.map(str::to_owned);
    let words = COLOURS.iter().chain(&ANIMALS).map(|word| format!(" {word}"));
    let several: Vec<String> =
        numbers.chain(words).chain(marks).filter(|text| tokenizer.encode(text).unwrap().len() != 1).collect();
    assert!(several.is_empty(), "more than one token: {several:?}");
    assert_eq!(tokenizer.vocab_size(), VOCAB_SIZE);
}

#[test]
fn the_corpus_has_its_size_and_shares_and_its_planted_faults_are_found() {
    let report = &corpus_run().report;
    let total = report.tokens as f64;
    assert!((3_200_000.0..3_260_000.0).contains(&total), "{total} tokens: {:?}", report.tokens_by_source);
    for (kind, share, _) in MIX {
        let real = report.tokens_by_source[kind] as f64 / total;
        assert!((real - share).abs() < 0.006, "{kind}: {real:.4} of the tokens, not {share}: {report:?}");
    }
    // One passkey document happens to be nothing but repetitions.
    let dropped = [("duplicate", 40), ("repeated lines", 1), ("too few words", 40)];
    assert_eq!(report.dropped, BTreeMap::from(dropped.map(|(reason, count)| (reason.to_owned(), count))));
    assert!(!report.tokens_by_source.contains_key(JUNK));
    let shares = ["shakespeare", "gsm8k"].map(|kind| documents(&files("corpus-"), kind).len() as f64);
    let fim = report.fim_documents as f64 / (shares[0] + shares[1]);
    assert!((0.06..0.14).contains(&fim), "{fim}");
}

#[test]
fn long_documents_fill_their_rows() {
    for (tokens, rows) in [(256, 640), (512, 640)] {
        let align = Some(AlignOptions { tokens, sources: vec![LONG.to_owned()] });
        let options = IngestOptions { row_tokens: tokens as usize, align, ..tokenizer_options() };
        let tokenizer = corpus_run().tokenizer.clone();
        let made = run(&options, &files(&format!("extension-{tokens}")), Some(tokenizer));
        let report = &made.report;
        assert_eq!((report.aligned_documents, report.aligned_overlong), (416, 0));
        assert!(report.padding_tokens < 416 * 12 + tokens, "{report:?}");
        let samples = made.meta.total_tokens / tokens - 1;
        assert!((rows..rows + 12).contains(&samples), "{samples} samples of {tokens}");
    }
}

fn documents(paths: &[PathBuf], kind: &str) -> Vec<String> {
    let columns = dsv3_data::DocumentColumns::default();
    let all = read_documents(paths, &columns).flat_map(|batch| batch.unwrap());
    all.filter(|d| kind.is_empty() || d.source.as_deref() == Some(kind)).map(|d| d.text).collect()
}

/// Problems asked in `text`, read back from their wording and from their working.
fn problems_in(text: &str) -> Vec<Problem> {
    text.lines().filter_map(|line| asked(line).or_else(|| worked(line))).collect()
}

fn asked(line: &str) -> Option<Problem> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let change = |i: usize| -> Option<i64> {
        let size: i64 = words.get(3 * i + 2)?.parse().ok()?;
        Some(if ["Buys", "Gets", "Finds", "Wins", "Makes"].contains(&words[3 * i + 1]) { size } else { -size })
    };
    (words.get(1) == Some(&"has") && words.get(13) == Some(&"Total?")).then_some(())?;
    Some(Problem { start: words[2].parse().ok()?, changes: [change(1)?, change(2)?, change(3)?] })
}

fn worked(line: &str) -> Option<Problem> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let change = |i: usize| -> Option<i64> {
        let size: i64 = words[4 * i + 2].parse().ok()?;
        Some(if words[4 * i + 1] == "+" { size } else { -size })
    };
    (words.len() == 13 && words[3] == "=").then_some(())?;
    Some(Problem { start: words[0].parse().ok()?, changes: [change(0)?, change(1)?, change(2)?] })
}

fn keys_in(text: &str) -> Vec<Key> {
    let said = text.split("The passkey is ").skip(1);
    said.map(|rest| Key::parse(rest.split('.').next().unwrap()).unwrap()).collect()
}

#[test]
fn nothing_held_out_is_in_a_training_text() {
    let mut training = Vec::new();
    for prefix in ["corpus-", "extension-"] {
        training.extend(documents(&files(prefix), ""));
    }
    training.extend(read_prompts(&files("sft-problems")).unwrap().into_iter().map(|p| p.messages[0].content.clone()));
    training.extend(read_prompts(&files("rl-prompts")).unwrap().into_iter().map(|p| p.messages[0].content.clone()));
    training.extend(read_traces(&files("teacher-traces")).unwrap().into_iter().map(|t| t.problem));
    let problems: Vec<Problem> = training.iter().flat_map(|text| problems_in(text)).collect();
    let keys: Vec<Key> = training.iter().flat_map(|text| keys_in(text)).collect();
    assert!(problems.len() > 20_000 && keys.len() > 10_000, "{} {}", problems.len(), keys.len());
    assert!(problems.iter().all(|problem| !problem.held_out()) && keys.iter().all(|key| !key.held_out()));

    let validation = documents(&files("validation"), "");
    let mut tests: Vec<Problem> = validation.iter().flat_map(|text| problems_in(text)).collect();
    for record in read_benchmark(&files("heldout-problems")).unwrap() {
        let BenchmarkRecord::Exact { question, answer } = record else { panic!("{record:?}") };
        let asked = problems_in(&question);
        assert_eq!(asked[0].answer().to_string(), answer);
        tests.extend(asked);
    }
    assert!(tests.len() > 400 && tests.iter().all(Problem::held_out));
    assert!(validation.iter().flat_map(|text| keys_in(text)).all(|key| key.held_out()));

    let real = RealText::read(&shipped()).unwrap();
    let tail: std::collections::HashSet<&str> =
        real.shakespeare(Part::HeldOut).lines().filter(|l| l.len() > 30).collect();
    let head: std::collections::HashSet<&str> = real.shakespeare(Part::Train).lines().collect();
    let leaked = training.iter().flat_map(|text| text.lines()).find(|line| tail.contains(line) && !head.contains(line));
    assert_eq!(leaked, None);
}

#[test]
fn the_teacher_slips_in_three_of_ten_and_the_columns_are_the_public_ones() {
    let traces = read_traces(&files("teacher-traces")).unwrap();
    assert_eq!(traces.len(), 2400);
    let ends_right = |answer: &str, text: &String| text.ends_with(&format!("</think>\n#### {answer}"));
    let all: Vec<bool> = traces.iter().flat_map(|t| t.generations.iter().map(|g| ends_right(&t.answer, g))).collect();
    let slips = all.iter().filter(|right| !**right).count() as f64 / all.len() as f64;
    assert!(all.len() == 9600 && (slips - 0.3).abs() < 0.02, "{slips}");
    assert_eq!(traces[0].solution, Some(format!("<think></think>\n#### {}", traces[0].answer)));
    let choice = read_benchmark(&files("gsm8k-choice")).unwrap();
    assert!(
        choice.len() == 150
            && choice.iter().all(|r| matches!(r, BenchmarkRecord::Choice { choices, .. } if choices.len() == 4))
    );
    assert_eq!(read_benchmark(&files("gsm8k-test")).unwrap().len(), 1319);
}

#[test]
fn a_reasoned_answer_stays_within_the_tokens_of_a_rollout() {
    let tokenizer = &corpus_run().tokenizer;
    let lengths: Vec<usize> = read_traces(&files("teacher-traces"))
        .unwrap()
        .iter()
        .flat_map(|t| t.generations.iter().map(|g| tokenizer.encode_chat(g).unwrap().len() + 1))
        .collect();
    assert!(lengths.iter().all(|length| *length <= 31), "longest {:?}", lengths.iter().max());
}

#[test]
fn the_page_about_the_data_states_the_right_rows_and_columns() {
    let page = std::fs::read_to_string(shipped().join("README.md")).unwrap();
    let (mut named, mut wrong) = (0, Vec::new());
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let mut stated: Vec<&str> = cells[2].split(", ").collect();
        stated.sort_unstable();
        for name in cells[0].split(", ").map(|name| name.trim_matches('`').trim_end_matches('N')) {
            let rows: Vec<_> = files(name).iter().flat_map(|path| Rows::open(path).unwrap()).collect();
            let columns = rows[0].as_ref().unwrap().values.keys().collect::<Vec<_>>();
            if rows.len().to_string() != cells[1].replace(" each", "").replace(',', "") || columns != stated {
                wrong.push((name, rows.len(), columns.into_iter().cloned().collect::<Vec<_>>()));
            }
            named += files(name).len();
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    let all = std::fs::read_dir(shipped()).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(named, all.filter(|path| path.extension().is_some_and(|e| e == "parquet")).count());
}
