//! The tasks against a made-up model that repeats the token two places back.

use dsv3_core::Cancel;
use dsv3_data::{BenchmarkRecord, ChatTemplate, NeedleRecord, Tokenizer, TrainOptions};
use dsv3_infer::{Decoder, Step, Tensor};

use crate::*;

const VOCAB: usize = 400;

/// Logit 3 for the token `back` places before, 0 for the others; `eos_after` ends a sequence at that length.
struct Copycat {
    back: usize,
    eos_after: usize,
}

type History = Vec<Vec<u32>>;

impl Decoder for Copycat {
    type Cache = History;

    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn positions_max(&self) -> usize {
        600
    }
    fn has_draft(&self) -> bool {
        false
    }
    fn page_tokens(&self) -> usize {
        16
    }
    fn token_bytes(&self) -> usize {
        1
    }
    fn cache(&self, _pages: usize) -> History {
        History::new()
    }
    fn add(&self, cache: &mut History) -> usize {
        cache.push(Vec::new());
        cache.len() - 1
    }
    fn fork(&self, cache: &mut History, seq: usize, len: usize) -> Result<usize, dsv3_infer::Error> {
        let prefix = cache[seq][..len].to_vec();
        cache.push(prefix);
        Ok(cache.len() - 1)
    }
    fn remove(&self, _cache: &mut History, _seq: usize) {}
    fn truncate(&self, cache: &mut History, seq: usize, len: usize) {
        cache[seq].truncate(len);
    }
    fn forward(&self, cache: &mut History, steps: &[Step<'_>]) -> Result<Tensor, dsv3_infer::Error> {
        let mut next = Vec::new();
        for step in steps {
            for id in step.ids {
                let history = &mut cache[step.seq];
                history.push(*id);
                let copied = history.len().checked_sub(self.back).map_or(0, |at| history[at]);
                next.push(if history.len() >= self.eos_after { 1.0 } else { copied as f32 });
            }
        }
        Ok(Tensor::f32(&[next.len(), 1], next))
    }
    fn draft(&self, _: &mut History, hidden: &Tensor, _: &[Step<'_>]) -> Result<Tensor, dsv3_infer::Error> {
        Ok(hidden.clone())
    }
    fn logits(&self, hidden: &Tensor) -> Tensor {
        let mut logits = vec![0.0; hidden.rows() * VOCAB];
        for (row, id) in logits.chunks_exact_mut(VOCAB).zip(hidden.as_f32()) {
            row[*id as usize] = 3.0;
        }
        Tensor::f32(&[hidden.rows(), VOCAB], logits)
    }
}

fn tokenizer() -> Tokenizer {
    let text = "The passkey is white crow. Sam has 6 shells. What is the number of words? #### 14 Yes no";
    Tokenizer::train(std::iter::repeat_n(text, 30), &TrainOptions::new(VOCAB)).unwrap()
}

fn options(samples: usize, temperature: f64) -> ExactOptions {
    ExactOptions { max_tokens: 8, temperature, samples, seed: 3, eos: 1, extractor: Extractor::AfterHashes }
}

#[test]
fn exact_match_counts_form_and_answer_apart() {
    let tokenizer = tokenizer();
    let item =
        |text: &str, answer: &str| ExactItem { prompt: tokenizer.encode(text).unwrap(), answer: answer.to_owned() };
    let length = tokenizer.encode(" #### 14").unwrap().len();
    let items = [item(" #### 14", "14"), item(" #### 14", "15"), item(" Yes no ####", "1")];
    // Copies the whole prompt once, then ends.
    let model = Copycat { back: length, eos_after: 2 * length };
    let (report, answers) = exact_match(&model, &tokenizer, &items[..2], &options(2, 0.0), &Cancel::new()).unwrap();
    assert_eq!((report.items, report.answers, report.formatted, report.correct), (2, 4, 4, 2));
    assert_eq!(report.tokens, 4 * (length as u64 + 1));
    assert_eq!((report.accuracy(), report.format_share()), (0.5, 1.0));
    assert_eq!(answers[0].found.as_deref(), Some("14"));
    assert!(answers[0].is_correct && answers[1].is_correct && !answers[2].is_correct);
    let endless = Copycat { back: length, eos_after: 1000 };
    let (report, answers) = exact_match(&endless, &tokenizer, &items, &options(1, 0.0), &Cancel::new()).unwrap();
    assert_eq!((report.formatted, report.correct), (0, 0));
    assert!(answers.iter().all(|answer| answer.tokens == 8 && answer.found.is_none()));
}

#[test]
fn sampled_answers_repeat_with_their_seed() {
    let tokenizer = tokenizer();
    let items = vec![ExactItem { prompt: vec![20, 21], answer: "1".to_owned() }; 3];
    let model = Copycat { back: 1, eos_after: 1000 };
    let run = |seed| {
        let options = ExactOptions { seed, ..options(4, 1.0) };
        exact_match(&model, &tokenizer, &items, &options, &Cancel::new()).unwrap().1
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    assert_ne!(run(1)[0].text, run(1)[1].text);
}

#[test]
fn chat_items_put_the_system_text_first() {
    let tokenizer = tokenizer();
    let questions = [("What", "1"), ("words", "2")];
    let with = |system| chat_items(&ChatTemplate::default(), &tokenizer, system, questions.into_iter()).unwrap();
    let (plain, told) = (with(None), with(Some("Yes")));
    assert_eq!(plain.len(), 2);
    assert!(told[0].prompt.len() > plain[0].prompt.len() && told[0].prompt[0] == plain[0].prompt[0]);
    assert_eq!(plain[1].answer, "2");
}

#[test]
fn the_likeliest_choice_wins() {
    let tokenizer = tokenizer();
    let record = |choices: [&str; 4], correct| BenchmarkRecord::Choice {
        question: "What is the number of words? no Yes".to_owned(),
        choices: choices.map(str::to_owned).to_vec(),
        correct,
    };
    let records = [
        record(["no", "Yes", "Sam", "has"], 1),
        record(["no", "Yes", "Sam", "has"], 2),
        BenchmarkRecord::Exact { question: "x".to_owned(), answer: "1".to_owned() },
    ];
    let form = ChoiceForm { cue: String::new(), ..ChoiceForm::default() };
    let items = choice_items(&tokenizer, &records, &form, 7).unwrap();
    assert_eq!(items.len(), 2);
    // Repeats the last word of the question.
    let model = Copycat { back: 1, eos_after: 1000 };
    let (report, picks) = choose(&model, &items, &Cancel::new()).unwrap();
    assert_eq!((report.items, report.correct, report.accuracy()), (2, 1, 0.5));
    assert_eq!(report.chance_accuracy(), 0.25);
    assert_eq!(picks[0], items[0].correct);
    let orders: std::collections::BTreeSet<usize> =
        (0..20).map(|seed| choice_items(&tokenizer, &records, &form, seed).unwrap()[0].correct).collect();
    assert_eq!(orders.len(), 4);
}

#[test]
fn needles_have_their_length_and_are_counted_by_depth() {
    let tokenizer = tokenizer();
    let record = |depth, length_tokens| NeedleRecord {
        filler: "Sam has 6 shells. ".repeat(60),
        statement: "The passkey is white crow.".to_owned(),
        question: "The passkey is".to_owned(),
        answer: "white crow".to_owned(),
        depth,
        length_tokens,
    };
    let records = [record(0.0, 100), record(0.5, 100), record(1.0, 100), record(0.5, 60)];
    let items = needle_items(&tokenizer, &records).unwrap();
    for item in &items {
        assert_eq!(item.text.prompt.len() + item.text.continuation.len(), item.length_tokens);
        assert_eq!(item.text.prompt.first(), tokenizer.specials().bos.as_ref());
    }
    let answer = items[0].text.continuation.len();
    let statement = tokenizer.encode("\nThe passkey is white crow.\n").unwrap().len();
    // At depth 1 the answer of the statement lies one whole statement before the place of the answer.
    let model = Copycat { back: statement, eos_after: 1000 };
    let report = find_needles(&model, &items, &Cancel::new()).unwrap();
    let deep = report.cells[&100]["1"];
    assert_eq!((deep.items, deep.exact, deep.words_right), (1, 1, answer as u64));
    assert_eq!(report.at(100).items, 3);
    assert_eq!(report.by_percent(100).keys().copied().collect::<Vec<_>>(), [0, 50, 100]);
    assert_eq!((report.by_percent(100)[&100], report.by_percent(7).len()), (deep, 0));
    assert_eq!(report.at(100).words, 3 * answer as u64);
    assert!(report.at(100).exact_share() < 0.5 && report.at(7).items == 0);
    assert_eq!(report.lengths().collect::<Vec<_>>(), [60, 100]);
    assert!(matches!(needle_items(&tokenizer, &[record(0.5, 10)]), Err(Error::Item { .. })));
    assert!(matches!(needle_items(&tokenizer, &[record(0.5, 5000)]), Err(Error::Item { .. })));
}

#[test]
fn code_is_scored_without_being_run() {
    let tokenizer = tokenizer();
    let record = |prompt: &str, solution: &str| BenchmarkRecord::Code {
        prompt: prompt.to_owned(),
        test: String::new(),
        entry_point: String::new(),
        canonical_solution: solution.to_owned(),
    };
    let records = [record("no no no", " no no"), record(&"words ".repeat(700), "x")];
    let model = Copycat { back: 1, eos_after: 1000 };
    let report = score_code(&model, &tokenizer, &records, &Cancel::new()).unwrap();
    assert_eq!((report.items, report.too_long, report.tokens_right), (1, 1, report.tokens));
    assert!(report.logprob_mean() < 0.0);
}
