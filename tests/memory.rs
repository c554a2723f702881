//! How much memory a server takes: at most 1.1 times the files of its FP8 weights, the latent cache it reports, and a fixed
//! part, at the highest point from its start on, loading included.
//!
//! The fixed part is what a server of a model of no size takes after the same requests: code, threads, tokenizer, buffers.
//! CI looks at some 50 MB of weights; `DSV3_MEMORY_MIB=300` makes the folder larger and `DSV3_BINARY` names another build
//! (`tests/README.md` has the figures of a release build). Linux only: the numbers are those of `/proc/PID/status`.

use std::path::{Path, PathBuf};

use dsv3_model::{Model, ModelConfig, SaveFormat};
use dsv3_ops::Fp8Scales;
use serde_json::json;

use crate::proof::models::FP8;
use crate::serve::Server;

/// The fixed part that `tests/README.md` states.
const FIXED_BYTES_MAX: u64 = 80 << 20;
const MIB: u64 = 1 << 20;

/// Sizes of a random model with a prediction module.
fn config(hidden: usize, experts: usize, vocab: usize) -> ModelConfig {
    let text = json!({
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "moe_intermediate_size": hidden,
        "num_hidden_layers": 4, "first_k_dense_replace": 1, "num_attention_heads": 8, "q_lora_rank": 192,
        "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "n_routed_experts": experts, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.5, "max_position_embeddings": 1024, "num_nextn_predict_layers": 1,
    });
    ModelConfig::from_json(text.to_string().as_bytes()).expect("a configuration")
}

/// Writes it as a folder in FP8; bytes of its weight files.
fn write(config: &ModelConfig, folder: &Path) -> u64 {
    let model = Model::init(config, FP8, 5).expect("a model");
    let mut weights = 0;
    dsv3_model::save(&model, SaveFormat::Fp8(Fp8Scales::F32), 64 * MIB, &mut |name, bytes| {
        weights += if name.ends_with(".safetensors") { bytes.len() as u64 } else { 0 };
        std::fs::write(folder.join(name), bytes)
    })
    .expect("written");
    // A tokenizer of 320 words; the requests are ids.
    let words = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/hf-tiny");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(words.join(file), folder.join(file)).expect("copied");
    }
    weights
}

/// What a server of one folder was seen to take, in bytes.
#[derive(Debug)]
struct Seen {
    /// Highest resident memory while it loaded.
    load_peak: u64,
    /// Resident memory when it was ready.
    loaded: u64,
    /// After prompts and answers.
    served: u64,
    /// Highest of all.
    peak: u64,
    /// The cache as reported by `/metrics`.
    cache: u64,
}

fn resident(server: &Server, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("a field of the kernel");
    line.trim_matches([':', ' ', '\t', 'k', 'B']).parse::<u64>().expect("a number") * 1024
}

fn watch(folder: &Path, vocab: usize) -> Seen {
    let binary = std::env::var_os("DSV3_BINARY").map(PathBuf::from);
    let server = Server::of(binary.as_deref(), folder, &["--cache-mib", "16"]);
    let (load_peak, loaded) = (resident(&server, "VmHWM"), resident(&server, "VmRSS"));
    for round in 0..3 {
        let prompt =
            |row: usize, len: usize| -> Vec<usize> { (0..len).map(|i| (i * 31 + row * 7 + round) % vocab).collect() };
        let prompts: Vec<Vec<usize>> =
            [900, 333, 64, 7].iter().enumerate().map(|(row, len)| prompt(row, *len)).collect();
        let body = json!({"prompt": prompts, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "logprobs": 1, "echo": round == 1});
        server.complete(&body);
    }
    let metrics = server.get("/metrics");
    let cache = metrics.lines().find_map(|line| line.strip_prefix("dsv3_cache_bytes ")).expect("it is reported");
    Seen {
        load_peak,
        loaded,
        served: resident(&server, "VmRSS"),
        peak: resident(&server, "VmHWM"),
        cache: cache.parse().expect("a number"),
    }
}

#[test]
fn a_server_takes_the_memory_of_its_weights_its_cache_and_a_fixed_part() {
    if !cfg!(target_os = "linux") {
        return;
    }
    let wanted = std::env::var("DSV3_MEMORY_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(24_u64);
    // Three matrices of 512 x 512 an expert, in four layers with experts (one of them the prediction module).
    let experts = (wanted * MIB / (4 * 3 * 512 * 512)).max(4) as usize;
    let (small, large) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    write(&config(64, 4, 320), small.path());
    let weights = write(&config(512, experts, 4096), large.path());
    let fixed = watch(small.path(), 320);
    let seen = watch(large.path(), 4096);
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    println!("weight files {:.1} MiB, latent cache {:.1} MiB", mib(weights), mib(seen.cache));
    for (name, seen) in [("fixed part", &fixed), ("server", &seen)] {
        let Seen { load_peak, loaded, served, peak, .. } = *seen;
        println!(
            "{name}: {:.1} MiB at most while loading, {:.1} loaded, {:.1} after requests, {:.1} at most",
            mib(load_peak),
            mib(loaded),
            mib(served),
            mib(peak)
        );
    }
    assert!(fixed.peak <= FIXED_BYTES_MAX, "the fixed part is {:.1} MiB", mib(fixed.peak));
    let bound = weights + weights / 10 + seen.cache + FIXED_BYTES_MAX;
    println!("bound 1.1 x files + cache + fixed part: {:.1} MiB", mib(bound));
    assert!(seen.peak <= bound, "{:.1} MiB exceed {:.1}", mib(seen.peak), mib(bound));
}
