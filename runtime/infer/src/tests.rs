//! The scheduler, drafting and the engine against a small made-up model whose next-token distribution is a function of
//! the last two tokens and the position, kept in a cache that checks every entry.

use std::sync::{Arc, Mutex};

use dsv3_core::{Cancel, mix64};
use dsv3_ops::Tensor;

use crate::*;

const VOCAB: usize = 12;

/// `noise`: how far the drafting head is from the truth.
struct Toy {
    draft_noise: f32,
    has_draft: bool,
    rows: Mutex<usize>,
}

#[derive(Default)]
struct ToyCache {
    main: Vec<Option<Vec<u32>>>,
    head: Vec<Vec<u32>>,
}

fn toy(draft_noise: f32) -> Toy {
    Toy { draft_noise, has_draft: true, rows: Mutex::new(0) }
}

/// Hidden state of a position: the hash of the two last tokens and the position, exact in three F32 values.
fn hidden(history: &[u32]) -> [f32; 3] {
    let n = history.len();
    [history[n - 1] as f32, if n > 1 { history[n - 2] as f32 } else { -1.0 }, n as f32]
}

fn logit(last: f32, before: f32, n: f32, id: usize) -> f32 {
    let bits = mix64((last as i64 as u64) << 40 ^ ((before as i64 as u64) & 0xFFFF) << 20 ^ n as u64);
    (mix64(bits ^ id as u64) % 1000) as f32 / 250.0
}

impl Decoder for Toy {
    type Cache = ToyCache;

    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn positions_max(&self) -> usize {
        200
    }
    fn has_draft(&self) -> bool {
        self.has_draft
    }
    fn page_tokens(&self) -> usize {
        8
    }
    fn token_bytes(&self) -> usize {
        1
    }
    fn cache(&self, _pages: usize) -> ToyCache {
        ToyCache::default()
    }
    fn add(&self, cache: &mut ToyCache) -> usize {
        cache.main.push(Some(Vec::new()));
        cache.head.push(Vec::new());
        cache.main.len() - 1
    }
    fn fork(&self, cache: &mut ToyCache, seq: usize, len: usize) -> Result<usize, Error> {
        let copy = cache.main[seq].as_ref().unwrap()[..len].to_vec();
        let new = self.add(cache);
        cache.main[new] = Some(copy);
        Ok(new)
    }
    fn remove(&self, cache: &mut ToyCache, seq: usize) {
        assert!(cache.main[seq].take().is_some());
    }
    fn truncate(&self, cache: &mut ToyCache, seq: usize, len: usize) {
        let ids = cache.main[seq].as_mut().unwrap();
        assert!(len < ids.len() && cache.head[seq].len() <= len);
        ids.truncate(len);
    }
    fn forward(&self, cache: &mut ToyCache, steps: &[Step<'_>]) -> Result<Tensor, Error> {
        let mut out = Vec::new();
        for step in steps {
            assert!(!step.ids.is_empty());
            for id in step.ids {
                let history = cache.main[step.seq].as_mut().unwrap();
                history.push(*id);
                out.extend(hidden(history));
            }
        }
        *self.rows.lock().unwrap() += out.len() / 3;
        Ok(Tensor::f32(&[out.len() / 3, 3], out))
    }
    fn draft(&self, cache: &mut ToyCache, hidden: &Tensor, steps: &[Step<'_>]) -> Result<Tensor, Error> {
        let mut out = Vec::new();
        let mut rows = hidden.as_f32().chunks_exact(3);
        for step in steps {
            for id in step.ids {
                let row = rows.next().unwrap();
                let head = &mut cache.head[step.seq];
                head.push(*id);
                assert_eq!(head.len() as f32, row[2], "the head's cache must cover every position");
                out.extend([*id as f32, row[0], row[2] + 1.0 + self.draft_noise]);
            }
        }
        assert!(rows.next().is_none());
        Ok(Tensor::f32(&[out.len() / 3, 3], out))
    }
    fn logits(&self, hidden: &Tensor) -> Tensor {
        let rows = hidden.as_f32().chunks_exact(3);
        let values = rows.flat_map(|row| (0..VOCAB).map(move |id| logit(row[0], row[1], row[2], id))).collect();
        Tensor::f32(&[hidden.rows(), VOCAB], values)
    }
}

fn request(index: usize, temperature: f64, speculate: bool) -> Request {
    let ids = (0..1 + index * 7 % 23).map(|i| ((i * 5 + index / 2) % VOCAB) as u32).collect();
    let sampling = Sampling { temperature, top_p: if index.is_multiple_of(3) { 0.8 } else { 1.0 }, seed: index as u64 };
    Request { speculate, ..Request::greedy(ids, 1 + index % 20, vec![3]).sampled(sampling) }
}

fn plain(request: &Request) -> Vec<u32> {
    let mut tokens = request.ids.clone();
    for _ in 0..request.max_tokens {
        let state = hidden(&tokens);
        let row: Vec<f32> = (0..VOCAB).map(|id| logit(state[0], state[1], state[2], id)).collect();
        tokens.push(sampling::sample(&row, &request.sampling, tokens.len()).unwrap());
        if request.stop_ids.contains(&tokens[tokens.len() - 1]) {
            break;
        }
    }
    tokens.split_off(request.ids.len())
}

#[test]
fn any_batch_says_what_one_sequence_alone_says() {
    for temperature in [0.0, 1.0] {
        for (noise, speculate) in [(0.0, false), (0.0, true), (1.0, true)] {
            let requests: Vec<Request> = (0..40).map(|i| request(i, temperature, speculate)).collect();
            for (batch_max, prefill_tokens) in [(1, 1), (7, 5), (64, 1000)] {
                let options = GenerateOptions { batch_max, prefill_tokens };
                let got = generate(&toy(noise), requests.clone(), options, &Cancel::new()).unwrap();
                for (request, got) in requests.iter().zip(got) {
                    assert_eq!(got.ids, plain(request));
                    assert_eq!(got.ids.len(), got.logprobs.len());
                    let stopped = got.ids.last().is_some_and(|id| *id == 3);
                    assert_eq!(got.finish, if stopped { Finish::Stop } else { Finish::Length });
                }
            }
        }
    }
}

#[test]
fn a_true_head_is_always_accepted_and_saves_steps() {
    let run = |noise, speculate| {
        let model = toy(noise);
        let mut scheduler = Scheduler::new(&model, Options::default());
        let request = Request { stop_ids: vec![], max_tokens: 40, ..request(5, 1.0, speculate) };
        scheduler.submit(0, request).unwrap();
        while !scheduler.is_idle() {
            scheduler.step(&mut |_, _| true).unwrap();
        }
        scheduler.counters()
    };
    let (plain, exact, wrong) = (run(0.0, false), run(0.0, true), run(1.0, true));
    assert_eq!(exact.acceptance(), Some(1.0));
    assert_eq!((plain.steps, exact.steps), (40, 21));
    assert!(wrong.acceptance().unwrap() < 0.7 && wrong.generated_tokens == 40, "{wrong:?}");
}

#[test]
fn equal_prompts_are_read_once() {
    let model = toy(0.0);
    let mut requests: Vec<Request> = (0..8).map(|_| request(6, 1.0, false)).collect();
    for (seed, request) in requests.iter_mut().enumerate() {
        (request.sampling.seed, request.stop_ids, request.max_tokens) = (seed as u64, vec![], 2);
    }
    let got = generate(&model, requests.clone(), GenerateOptions::default(), &Cancel::new()).unwrap();
    assert_eq!(*model.rows.lock().unwrap(), requests[0].ids.len() + 8);
    for (request, got) in requests.iter().zip(got) {
        assert_eq!(got.ids, plain(request));
    }
}

#[test]
fn scores_are_the_log_probabilities_of_the_rows_before() {
    let item = Continuation { prompt: vec![1, 2], continuation: vec![5, 9, 0] };
    let got = score(&toy(0.0), std::slice::from_ref(&item), &Cancel::new()).unwrap().remove(0);
    let mut history = item.prompt.clone();
    for (place, id) in item.continuation.iter().enumerate() {
        let state = hidden(&history);
        let row: Vec<f32> = (0..VOCAB).map(|id| logit(state[0], state[1], state[2], id)).collect();
        let want = f64::from(row[*id as usize]) - sampling::log_sum_exp(&row);
        assert_eq!(got.logprobs[place], want as f32);
        assert_eq!(Some(got.greedy[place]), sampling::argmax(&row));
        history.push(*id);
    }
    let empty = Continuation { prompt: vec![], continuation: vec![1] };
    assert!(matches!(score(&toy(0.0), &[empty], &Cancel::new()), Err(Error::Invalid { .. })));
}

#[test]
fn echo_starts_with_a_token_without_a_probability() {
    for max_tokens in [0, 3] {
        for prompt in [vec![4], vec![4, 5, 6, 7, 8]] {
            let model = toy(0.0);
            let mut scheduler = Scheduler::new(&model, Options { prefill_tokens: 2, ..Options::default() });
            let request = Request { echo_from: Some(0), ..Request::greedy(prompt.clone(), max_tokens, vec![]) };
            scheduler.submit(0, request).unwrap();
            let (mut echoed, mut new) = (Vec::new(), 0);
            while !scheduler.is_idle() {
                scheduler
                    .step(&mut |_, update| {
                        match update {
                            Update::Prompt(tokens) => echoed.extend(tokens),
                            Update::Tokens(tokens) => new += tokens.len(),
                            Update::Finished(finish) => assert_eq!(finish, Finish::Length),
                        }
                        true
                    })
                    .unwrap();
            }
            assert_eq!(echoed.iter().map(|token| token.id).collect::<Vec<_>>(), prompt);
            assert!(echoed.iter().enumerate().all(|(i, token)| token.logprob.is_some() == (i > 0)));
            assert_eq!(new, max_tokens);
        }
    }
}

#[test]
fn impossible_requests_are_refused() {
    let model = toy(0.0);
    let mut scheduler = Scheduler::new(&model, Options { waiting_max: 1, ..Options::default() });
    let bad = [
        Request::greedy(vec![], 1, vec![]),
        Request::greedy(vec![VOCAB as u32], 1, vec![]),
        Request::greedy(vec![1; 150], 51, vec![]),
        Request::greedy(vec![1], usize::MAX, vec![]),
        Request::greedy(vec![1], 1, vec![]).sampled(Sampling { temperature: f64::NAN, ..Sampling::default() }),
        Request::greedy(vec![1], 1, vec![]).sampled(Sampling { top_p: 1.5, ..Sampling::default() }),
    ];
    for request in bad {
        assert!(matches!(scheduler.submit(0, request), Err(Error::Invalid { .. })));
    }
    scheduler.submit(0, Request::greedy(vec![1], 1, vec![])).unwrap();
    assert!(matches!(scheduler.submit(1, Request::greedy(vec![1], 1, vec![])), Err(Error::Busy { waiting: 1 })));
}

#[test]
fn the_cache_bounds_who_runs() {
    let model = toy(0.0);
    let mut scheduler = Scheduler::new(&model, Options { cache_tokens: 32, ..Options::default() });
    for id in 0..9 {
        scheduler.submit(id, Request::greedy(vec![1, id as u32], 10, vec![])).unwrap();
    }
    let mut ended = Vec::new();
    while !scheduler.is_idle() {
        scheduler
            .step(&mut |id, update| {
                if matches!(update, Update::Finished(_)) {
                    ended.push(id);
                }
                true
            })
            .unwrap();
        assert!(scheduler.counters().running <= 2);
    }
    assert_eq!(ended, (0..9).collect::<Vec<_>>());
}

#[test]
fn cancelling_a_leader_leaves_its_followers_running() {
    let model = toy(0.0);
    let mut scheduler = Scheduler::new(&model, Options { prefill_tokens: 2, ..Options::default() });
    for id in 0..3 {
        scheduler.submit(id, Request::greedy(vec![1, 2, 3, 4, 5], 4, vec![])).unwrap();
    }
    let mut ended = Vec::new();
    let mut sink = |id, update| {
        if let Update::Finished(finish) = update {
            ended.push((id, finish));
        }
        true
    };
    scheduler.step(&mut sink).unwrap();
    scheduler.cancel(0, &mut sink);
    scheduler.cancel(0, &mut sink);
    scheduler.cancel(2, &mut sink);
    while !scheduler.is_idle() {
        scheduler.step(&mut sink).unwrap();
    }
    assert_eq!(ended, [(0, Finish::Cancelled), (2, Finish::Cancelled), (1, Finish::Length)]);
}

#[test]
fn the_engine_answers_all_and_stops() {
    let engine = Engine::start(Arc::new(toy(0.0)), Options::default()).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    let requests: Vec<Request> = (0..30).map(|i| request(i, 1.0, true)).collect();
    for (index, request) in requests.iter().enumerate() {
        let send = send.clone();
        let sink: Sink = Box::new(move |update| send.send((index, update)).is_ok());
        engine.submit(request.clone(), sink).unwrap();
    }
    let mut texts = vec![Vec::new(); requests.len()];
    let mut open = requests.len();
    while open > 0 {
        match receive.recv().unwrap() {
            (index, Update::Tokens(tokens)) => texts[index].extend(tokens.into_iter().map(|token| token.id)),
            (_, Update::Finished(_)) => open -= 1,
            (_, Update::Prompt(_)) => unreachable!("nobody asked for it"),
        }
    }
    for (request, text) in requests.iter().zip(texts) {
        assert_eq!(text, plain(request));
    }
    assert!(matches!(
        engine.submit(Request::greedy(vec![], 1, vec![]), Box::new(|_| true)),
        Err(Error::Invalid { .. })
    ));
    let deaf = Request::greedy(vec![1], 150, vec![]);
    engine.submit(deaf, Box::new(|_| false)).unwrap();
    engine.stop(std::time::Duration::from_secs(5));
    let late = engine.submit(Request::greedy(vec![1], 1, vec![]), Box::new(|_| true));
    assert!(matches!(late, Err(Error::Stopped)));
}

mod model {
    //! The same promises with a real model of random weights, in every precision.

    use dsv3_model::{Model, ModelConfig};
    use dsv3_ops::{Fp8Format, Fp8Scales, Precision};

    use super::*;

    fn random(precision: Precision) -> Model {
        let json = r#"{
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
            "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 24,
            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
            "max_position_embeddings": 128, "num_nextn_predict_layers": 1, "initializer_range": 0.2
        }"#;
        let config: ModelConfig = serde_json::from_str(json).unwrap();
        Model::init(&config, precision, 11).unwrap()
    }

    fn requests(speculate: bool) -> Vec<Request> {
        let one = |index: usize| {
            let ids = (0..1 + index * 13 % 70).map(|i| (i as u32 * 7 + index as u32 % 5) % 64).collect();
            let temperature = if index.is_multiple_of(2) { 0.0 } else { 1.0 };
            let sampling = Sampling { temperature, top_p: 0.9, seed: index as u64 };
            Request { speculate, ..Request::greedy(ids, 1 + index % 9, vec![5]).sampled(sampling) }
        };
        (0..24).chain(3..9).map(one).collect()
    }

    #[test]
    fn bits_do_not_depend_on_batch_chunks_or_drafting() {
        let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
        for precision in [Precision::F32, Precision::Bf16, fp8] {
            let model = random(precision);
            let run = |speculate, batch_max, prefill_tokens| {
                let options = GenerateOptions { batch_max, prefill_tokens };
                generate(&model, requests(speculate), options, &Cancel::new()).unwrap()
            };
            let alone = run(false, 1, 1000);
            for (speculate, batch_max, prefill_tokens) in
                [(false, 100, 1000), (false, 7, 5), (true, 1, 9), (true, 100, 64)]
            {
                let got = run(speculate, batch_max, prefill_tokens);
                assert_eq!(got, alone, "{precision:?} speculate {speculate} batch {batch_max} chunk {prefill_tokens}");
            }
        }
    }

    #[test]
    fn scores_agree_with_what_generation_reported() {
        let model = random(Precision::F32);
        let requests = requests(false);
        let completions = generate(&model, requests.clone(), GenerateOptions::default(), &Cancel::new()).unwrap();
        let item = |(request, completion): (&Request, &Completion)| Continuation {
            prompt: request.ids.clone(),
            continuation: completion.ids.clone(),
        };
        let items: Vec<Continuation> = requests.iter().zip(&completions).map(item).collect();
        let scores = score(&model, &items, &Cancel::new()).unwrap();
        for (index, (score, completion)) in scores.iter().zip(&completions).enumerate() {
            let alone = super::score(&model, &items[index..=index], &Cancel::new()).unwrap();
            assert_eq!(&alone[0], score, "a score must not depend on its company");
            assert_eq!(score.logprobs.len(), completion.logprobs.len());
            for (one, other) in score.logprobs.iter().zip(&completion.logprobs) {
                assert!((one - other).abs() < 1e-4, "{one} {other}");
            }
            if requests[index].sampling.temperature == 0.0 {
                assert_eq!(score.greedy, completion.ids);
            }
        }
    }
}
