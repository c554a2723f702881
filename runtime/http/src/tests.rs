//! The whole API over real connections, against a made-up model whose next token is the last one plus one, cyclically.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use dsv3_core::Cancel;
use dsv3_data::{ChatTemplate, Tokenizer, TrainOptions};
use dsv3_infer::{Decoder, Engine, Error, Options, Step, Tensor};
use serde_json::{Value, json};

use crate::{AppState, ModelText, Reply, Served, SmokeOptions, client, smoke};

const VOCAB: usize = 280;

/// Says i + 1 after i, with logit 2 against zeros; `step` slows every step down.
struct Counting {
    step: Duration,
}

impl Decoder for Counting {
    type Cache = ();

    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn positions_max(&self) -> usize {
        100
    }
    fn has_draft(&self) -> bool {
        true
    }
    fn page_tokens(&self) -> usize {
        16
    }
    fn token_bytes(&self) -> usize {
        1
    }
    fn cache(&self, _pages: usize) {}
    fn add(&self, (): &mut ()) -> usize {
        0
    }
    fn fork(&self, (): &mut (), _seq: usize, _len: usize) -> Result<usize, Error> {
        Ok(0)
    }
    fn remove(&self, (): &mut (), _seq: usize) {}
    fn truncate(&self, (): &mut (), _seq: usize, _len: usize) {}
    fn forward(&self, (): &mut (), steps: &[Step<'_>]) -> Result<Tensor, Error> {
        std::thread::sleep(self.step);
        let ids: Vec<f32> = steps.iter().flat_map(|step| step.ids).map(|id| *id as f32).collect();
        Ok(Tensor::f32(&[ids.len(), 1], ids))
    }
    fn draft(&self, (): &mut (), _hidden: &Tensor, steps: &[Step<'_>]) -> Result<Tensor, Error> {
        let ids: Vec<f32> = steps.iter().flat_map(|step| step.ids).map(|id| *id as f32).collect();
        Ok(Tensor::f32(&[ids.len(), 1], ids))
    }
    fn logits(&self, hidden: &Tensor) -> Tensor {
        let mut logits = vec![0.0; hidden.rows() * VOCAB];
        for (row, id) in logits.chunks_exact_mut(VOCAB).zip(hidden.as_f32()) {
            row[(*id as usize + 1) % VOCAB] = 2.0;
        }
        Tensor::f32(&[hidden.rows(), VOCAB], logits)
    }
}

fn state(step_ms: u64) -> AppState {
    let tokenizer = Tokenizer::train(["a b c"].iter(), &TrainOptions::new(VOCAB)).unwrap();
    let text = ModelText { tokenizer, template: Some(ChatTemplate::default()), eos_ids: vec![1], adds_bos: false };
    let served = Served {
        model_id: "counting".to_owned(),
        aliases: vec![],
        text,
        context_tokens: 100,
        vocab_size: VOCAB,
        speculate: true,
    };
    let model = Arc::new(Counting { step: Duration::from_millis(step_ms) });
    AppState::new(served, Engine::start(model, Options::default()).unwrap())
}

/// Runs `test` against a live server.
fn with_server(step_ms: u64, test: impl FnOnce(SocketAddr, &AppState)) {
    let state = state(step_ms);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let server = runtime.spawn(crate::serve(listener, state.clone(), stop.clone().cancelled_owned()));
    test(address, &state);
    stop.cancel();
    runtime.block_on(server).unwrap().unwrap();
}

fn post(address: SocketAddr, path: &str, body: &Value) -> Reply {
    client::request(address, "POST", path, body.to_string().as_bytes(), Duration::from_secs(20)).unwrap()
}

fn complete(address: SocketAddr, body: Value) -> Value {
    let reply = post(address, "/v1/completions", &body);
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json().unwrap()
}

#[test]
fn completions_echo_and_log_probabilities() {
    with_server(0, |address, _| {
        let body = json!({
            "model": "counting", "prompt": [40, 41, 42], "max_tokens": 3, "temperature": 0, "echo": true,
            "logprobs": 2, "some_unknown_field": {"x": 1}
        });
        let value = complete(address, body);
        let choice = &value["choices"][0];
        let logprobs = &choice["logprobs"];
        assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), 6);
        assert_eq!(logprobs["token_logprobs"][0], Value::Null);
        assert_eq!(logprobs["top_logprobs"][0], Value::Null);
        let sure = 2.0 - (2f64.exp() + (VOCAB - 1) as f64).ln();
        for i in 1..6 {
            assert!((logprobs["token_logprobs"][i].as_f64().unwrap() - sure).abs() < 1e-6);
            assert_eq!(logprobs["top_logprobs"][i].as_object().unwrap().len(), 2);
        }
        let texts: Vec<&str> = logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!(choice["text"].as_str().unwrap(), texts.concat());
        assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4, 5]));
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(value["usage"], json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}));
        let scored = complete(address, json!({"prompt": [40, 41], "max_tokens": 0, "echo": true, "logprobs": 0}));
        assert_eq!(scored["choices"][0]["logprobs"]["tokens"], json!([texts[0], texts[1]]));
        assert_eq!(scored["choices"][0]["logprobs"]["top_logprobs"], Value::Null);
        let nothing = complete(address, json!({"prompt": [40], "max_tokens": 0}));
        assert_eq!(nothing["choices"][0]["text"], "");
    });
}

#[test]
fn prompts_come_in_four_forms_and_choices_in_order() {
    with_server(0, |address, _| {
        for prompt in [json!("ab"), json!(["ab"]), json!([75, 76]), json!([[75, 76]])] {
            let value = complete(address, json!({"prompt": prompt, "max_tokens": 1, "temperature": 0}));
            assert_eq!(value["choices"].as_array().unwrap().len(), 1, "{prompt}");
        }
        let value =
            complete(address, json!({"prompt": [[50], [60]], "n": 2, "max_tokens": 1, "temperature": 0, "echo": true}));
        let texts: Vec<&Value> = value["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
        assert_eq!(texts.len(), 4);
        assert!(texts[0] == texts[1] && texts[2] == texts[3] && texts[0] != texts[2]);
    });
}

#[test]
fn end_tokens_and_stop_strings_end_a_text() {
    with_server(0, |address, state| {
        let ask = |extra: Value| {
            let mut body = json!({"prompt": [VOCAB - 2], "max_tokens": 6, "temperature": 0});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            complete(address, body)["choices"][0].clone()
        };
        let ended = ask(json!({"logprobs": 0}));
        // VOCAB - 1, then 0 (bos), then 1 (eos), which does not show.
        assert_eq!(
            (&ended["finish_reason"], ended["logprobs"]["tokens"].as_array().unwrap().len()),
            (&json!("stop"), 2)
        );
        let ignored = ask(json!({"ignore_eos": true, "logprobs": 0}));
        assert_eq!(ignored["logprobs"]["tokens"].as_array().unwrap().len(), 6);
        assert_eq!(ignored["finish_reason"], "length");
        let tokenizer = &state.served.text.tokenizer;
        let stop = tokenizer.decode(&[44]);
        let body = json!({"prompt": [40], "max_tokens": 9, "temperature": 0, "stop": [stop], "logprobs": 1});
        let value = complete(address, body);
        assert_eq!(value["choices"][0]["text"], tokenizer.decode(&[41, 42, 43]));
        assert_eq!(value["choices"][0]["finish_reason"], "stop");
        assert_eq!(value["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 3);
    });
}

#[test]
fn seeds_repeat_and_streams_say_the_same() {
    with_server(0, |address, _| {
        let body =
            |stream: bool| json!({"prompt": [40, 41], "max_tokens": 20, "seed": 5, "stream": stream, "logprobs": 1});
        let first = complete(address, body(false));
        assert_eq!(first["choices"], complete(address, body(false))["choices"]);
        let reply = post(address, "/v1/completions", &body(true));
        let (mut text, mut tokens, mut reason, mut done) = (String::new(), Vec::new(), Value::Null, false);
        for data in reply.text().lines().filter_map(|line| line.strip_prefix("data: ").map(str::to_owned)) {
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let value: Value = serde_json::from_str(&data).unwrap();
            let choice = &value["choices"][0];
            text.push_str(choice["text"].as_str().unwrap());
            tokens.extend(choice["logprobs"]["tokens"].as_array().unwrap().clone());
            if !choice["finish_reason"].is_null() {
                reason = choice["finish_reason"].clone();
            }
        }
        assert!(done && reason == first["choices"][0]["finish_reason"]);
        assert_eq!(text, first["choices"][0]["text"].as_str().unwrap());
        assert_eq!(Value::Array(tokens), first["choices"][0]["logprobs"]["tokens"]);
    });
}

#[test]
fn chat_answers_and_streams() {
    with_server(0, |address, _| {
        let body = |stream: bool| {
            json!({
                "model": "counting", "temperature": 0, "max_tokens": 4, "stream": stream, "logprobs": true,
                "top_logprobs": 1, "stream_options": {"include_usage": true},
                "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
            })
        };
        let reply = post(address, "/v1/chat/completions", &body(false));
        assert_eq!(reply.status, 200, "{}", reply.text());
        let value = reply.json().unwrap();
        let message = &value["choices"][0]["message"];
        // After the assistant's mark (4) come <think>, </think> and two control tokens that do not show.
        assert_eq!((&message["role"], &message["content"]), (&json!("assistant"), &json!("<think></think>")));
        assert_eq!(value["choices"][0]["logprobs"]["content"][0]["token"], "<think>");
        let text = post(address, "/v1/chat/completions", &body(true)).text();
        assert!(text.contains("chat.completion.chunk") && text.trim_end().ends_with("data: [DONE]"));
        assert!(text.contains("\"usage\":{\"completion_tokens\":4"), "{text}");
    });
}

#[test]
fn bad_requests_get_the_error_shape() {
    let cases = [
        (json!({"prompt": "a", "temperature": -1}), 400, "temperature"),
        (json!({"prompt": "a", "temperature": "hot"}), 400, "temperature"),
        (json!({"prompt": "a", "top_p": 1.5}), 400, "top_p"),
        (json!({"prompt": "a", "max_tokens": -1}), 400, "max_tokens"),
        (json!({"prompt": "a", "max_tokens": 1.5}), 400, "max_tokens"),
        (json!({"prompt": "a", "logprobs": true}), 400, "logprobs"),
        (json!({"prompt": "a", "stop": [1]}), 400, "stop"),
        (json!({"prompt": "a", "stream": "yes"}), 400, "stream"),
        (json!({"prompt": "a", "n": 0}), 400, "n"),
        (json!({"prompt": {"a": 1}}), 400, "prompt"),
        (json!({"prompt": []}), 400, "prompt"),
        (json!({"prompt": [[]]}), 400, "prompt"),
        (json!({"prompt": [1, "a"]}), 400, "prompt"),
        (json!({"prompt": ["a", 1]}), 400, "prompt"),
        (json!({"prompt": [1, -1]}), 400, "prompt"),
        (json!({"prompt": [VOCAB]}), 400, "prompt"),
        (json!({"prompt": ""}), 400, "prompt"),
        (json!({}), 400, "prompt"),
        (json!({"prompt": vec![1; 101]}), 400, "prompt"),
        (json!({"prompt": "a", "max_tokens": 100}), 400, "prompt"),
        (json!({"prompt": "a", "model": "gpt-4"}), 404, "model"),
        (json!({"prompt": "a", "model": 3}), 400, "model"),
    ];
    with_server(0, |address, _| {
        for (body, status, param) in cases {
            let reply = post(address, "/v1/completions", &body);
            let error = reply.json().unwrap()["error"].clone();
            assert_eq!((reply.status, error["param"].as_str()), (status, Some(param)), "{body} {error}");
            assert_eq!(error["type"], "invalid_request_error");
            assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()) && error["code"].is_string());
        }
        for messages in [json!(null), json!([]), json!([3]), json!([{"role": "user"}]), json!([{"content": "x"}])] {
            let reply = post(address, "/v1/chat/completions", &json!({"messages": messages}));
            assert_eq!((reply.status, reply.json().unwrap()["error"]["param"].clone()), (400, json!("messages")));
        }
        let raw = |method, path, body: &[u8]| {
            let reply = client::request(address, method, path, body, Duration::from_secs(20)).unwrap();
            (reply.status, reply.json().unwrap()["error"]["message"].is_string())
        };
        assert_eq!(raw("POST", "/v1/completions", b"{\"prompt\""), (400, true));
        assert_eq!(raw("POST", "/v1/completions", &[0xff; 99]), (400, true));
        assert_eq!(raw("POST", "/v1/completions", &vec![b' '; 5 << 20]), (413, true));
        assert_eq!(raw("GET", "/v1/completions", b""), (405, true));
        assert_eq!(raw("GET", "/nothing", b""), (404, true));
        assert_eq!(raw("GET", "/v1/models/other", b""), (404, true));
    });
}

#[test]
fn models_health_and_metrics() {
    with_server(0, |address, _| {
        let get = |path| client::request(address, "GET", path, b"", Duration::from_secs(20)).unwrap();
        assert_eq!(get("/health").status, 200);
        assert_eq!(get("/v1/models").json().unwrap()["data"][0]["id"], "counting");
        assert_eq!(get("/v1/models/counting").status, 200);
        complete(address, json!({"prompt": [40], "max_tokens": 8, "temperature": 0}));
        // The engine counts a step after its tokens have left.
        let counted = || {
            std::thread::sleep(Duration::from_millis(5));
            get("/metrics").text()
        };
        let metrics =
            std::iter::repeat_with(counted).take(1000).find(|text| text.contains("dsv3_generated_tokens_total 8\n"));
        let metrics = metrics.expect("all steps are counted");
        assert!(metrics.contains("dsv3_requests_total 1\n"), "{metrics}");
        assert!(metrics.contains("dsv3_cache_tokens 32768\n"), "{metrics}");
    });
}

#[test]
fn a_stopping_server_cuts_what_takes_too_long() {
    let started = std::time::Instant::now();
    let mut asked = None;
    with_server(100, |address, state| {
        let body = json!({"prompt": [40], "max_tokens": 90, "ignore_eos": true});
        asked = Some(std::thread::spawn(move || post(address, "/v1/completions", &body)));
        while state.engine().counters().running == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    let reply = asked.unwrap().join().unwrap();
    assert_eq!((reply.status, reply.json().unwrap()["error"]["code"].clone()), (503, json!("stopping")));
}

#[test]
fn smoke_measures_and_leaves_no_server() {
    let mut heard = None;
    let options = SmokeOptions {
        address: "127.0.0.1:0".parse().unwrap(),
        prompts: vec!["a".to_owned(), "b".to_owned()],
        max_tokens: 12,
        timeout: Duration::from_secs(20),
        stay: false,
    };
    let report = smoke(&state(0), &options, &Cancel::new(), |address| heard = Some(address)).unwrap();
    assert_eq!((report.completion_tokens, report.answers.len()), (24, 2));
    assert_eq!(report.draft_acceptance, Some(1.0));
    assert!(report.tokens_per_second > 0.0 && heard == Some(report.address));
    assert!(client::request(report.address, "GET", "/health", b"", Duration::from_secs(1)).is_err());
}
