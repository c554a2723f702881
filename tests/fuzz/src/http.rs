//! Bodies of requests, handed to the router without a socket; behind it a model of a few hundred numbers.

use std::sync::{Arc, OnceLock};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::Request,
};
use dsv3_data::{ChatTemplate, Tokenizer, TrainOptions};
use dsv3_http::{AppState, ModelText, Served, router};
use dsv3_infer::{Engine, Options};
use dsv3_model::{Model, ModelConfig};
use dsv3_ops::Precision;
use tower::ServiceExt;

use super::{CONFIG, block_on};

const VOCAB: usize = 270;

fn served() -> &'static Router {
    static ROUTER: OnceLock<Router> = OnceLock::new();
    ROUTER.get_or_init(|| {
        let config = ModelConfig::from_json(CONFIG.replace("\"vocab_size\": 12", "\"vocab_size\": 270").as_bytes());
        let mut model = Model::init(&config.expect("a configuration"), Precision::F32, 1).expect("a model");
        model.freeze();
        let tokenizer = Tokenizer::train(["a b c"].iter(), &TrainOptions::new(VOCAB)).expect("a tokenizer");
        let text = ModelText { tokenizer, template: Some(ChatTemplate::default()), eos_ids: vec![1], adds_bos: false };
        let served = Served {
            model_id: "toy".to_owned(),
            aliases: Vec::new(),
            text,
            context_tokens: model.config.max_position_embeddings,
            vocab_size: VOCAB,
            speculate: true,
        };
        let options = Options { cache_tokens: 4096, ..Options::default() };
        router(AppState::new(served, Engine::start(Arc::new(model), options).expect("an engine")))
    })
}

/// Sends the bytes behind the first as the body of a request to the address that the first one chooses.
pub fn http(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    let path = if kind % 2 == 0 { "/v1/completions" } else { "/v1/chat/completions" };
    let request = Request::post(path).header("content-type", "application/json").body(Body::from(body.to_vec()));
    let request = request.expect("a request");
    block_on(async {
        let response = served().clone().oneshot(request).await.expect("the router always answers");
        let status = response.status();
        let answer = to_bytes(response.into_body(), 64 << 20).await.expect("an answer of a bounded length");
        assert!(status.as_u16() != 500, "{}", String::from_utf8_lossy(&answer));
        if status.is_client_error() {
            let error: serde_json::Value = serde_json::from_slice(&answer).expect("errors are JSON");
            assert!(error["error"]["message"].is_string(), "{error}");
        }
    });
}
