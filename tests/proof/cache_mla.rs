//! The latent cache is as small as the report says, measured. Report §2.1.1, `reference/deepseek-v3.md` §2.

use dsv3_model::{LatentCache, LatentType, Model, ModelConfig, PAGE_TOKENS, SeqStep};
use dsv3_ops::Precision;

use super::models::{config, rows};

#[test]
fn a_token_takes_rank_and_rope_elements_a_layer() {
    let many_heads = ModelConfig { num_attention_heads: 8, v_head_dim: 32, ..config() };
    for (config, layers) in
        [(config(), 4), (many_heads, 4), (ModelConfig { num_nextn_predict_layers: 0, ..config() }, 3)]
    {
        let model = Model::init(&config, Precision::F32, 1).expect("a model");
        for (kind, size) in [(LatentType::F32, 4), (LatentType::Bf16, 2)] {
            let cache = LatentCache::new(&model, 5, kind);
            let per_token = (16 + 4) * layers * size;
            // What is allocated, and what is reported.
            assert_eq!(cache.bytes(), 5 * PAGE_TOKENS * per_token);
            assert_eq!(LatentCache::token_bytes(&model, kind), per_token);
        }
    }
}

#[test]
fn a_sequence_takes_the_pages_of_its_tokens_and_allocates_nothing() {
    let model = Model::init(&config(), Precision::F32, 1).expect("a model");
    let mut cache = LatentCache::new(&model, 4, LatentType::Bf16);
    let (bytes, ids) = (cache.bytes(), rows(1, 1, 70, 50).concat());
    let seq = cache.start();
    for (range, free) in [(0..1, 3), (1..32, 3), (32..33, 2), (33..70, 1)] {
        model.forward_cached(&mut cache, &[SeqStep { seq, ids: &ids[range] }]).expect("it fits");
        assert_eq!((cache.free_pages(), cache.bytes()), (free, bytes));
    }
    cache.release(seq);
    assert_eq!(cache.free_pages(), 4);
}
