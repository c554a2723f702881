//! A context extended by YaRN is used: what stands far beyond the old length reaches the logits of the last token, at the
//! place where it stands, and what may not reach them does not. Report §4.3, `reference/deepseek-v3.md` §7.
//!
//! How much a trained model recalls, by length and depth, before and after: `tests/results/extension.md`.

use dsv3_model::{Batch, LatentCache, LatentType, Model, ModelConfig, RopeScaling, SeqStep, TrainOptions};
use dsv3_ops::{Precision, Spans, Tape};

use super::models::{FP8, bits, config, forward, rows};

/// Positions before extension and after.
const OLD: usize = 24;
const NEW: usize = OLD * 8;
/// Where the needle stands: seven old lengths before the last token.
const NEEDLE: usize = 20;

fn extended(config: &ModelConfig, precision: Precision) -> Model {
    let config = ModelConfig { max_position_embeddings: OLD, ..config.clone() };
    let mut model = Model::init(&config, precision, 5).expect("a model");
    model.set_rope(Some(RopeScaling::yarn(8.0, OLD)), NEW).expect("YaRN fits");
    model
}

fn text() -> Vec<u32> {
    rows(3, 1, NEW, 50).concat()
}

fn with(mut ids: Vec<u32>, at: usize) -> Vec<u32> {
    ids[at] = (ids[at] + 7) % 50;
    ids
}

/// Logits of row `row` when `ids` is cut into sequences of the given lengths, by the training path.
fn logits(model: &Model, ids: &[u32], lens: &[usize], row: usize) -> Vec<f32> {
    let targets = vec![Batch::NO_TARGET; ids.len()].into();
    let batch = Batch { ids: ids.to_vec(), spans: Spans::from_lens(lens.iter().copied()), targets };
    let hidden = forward(model, &batch, TrainOptions { mtp: false, ..TrainOptions::default() }).hidden.value;
    let vocab = model.config.vocab_size;
    model.logits(&hidden).as_f32()[row * vocab..(row + 1) * vocab].to_vec()
}

/// Logits of the last token by the serving path: over the latent cache, in two chunks.
fn served(model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut cache = LatentCache::for_tokens(model, 1, ids.len(), LatentType::F32);
    let seq = cache.start();
    let (first, rest) = ids.split_at(100);
    model.forward_cached(&mut cache, &[SeqStep { seq, ids: first }]).expect("it fits");
    let hidden = model.forward_cached(&mut cache, &[SeqStep { seq, ids: rest }]).expect("it fits");
    let vocab = model.config.vocab_size;
    let all = model.logits(&hidden);
    all.as_f32()[all.numel() - vocab..].to_vec()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_needle_beyond_the_old_length_changes_the_logits_of_the_answer() {
    let last = NEW - 1;
    let (ids, other) = (text(), with(text(), NEEDLE));
    for precision in [Precision::F32, Precision::Bf16, FP8] {
        let model = extended(&config(), precision);
        let (before, after) = (logits(&model, &ids, &[NEW], last), logits(&model, &other, &[NEW], last));
        let (here, there) = (served(&model, &ids), served(&model, &other));
        let (change, served_change) = (distance(&before, &after), distance(&here, &there));
        println!(
            "{precision:?}: the needle moves a logit by {change:.1e}, served {served_change:.1e}; \
             the two paths differ by {:.1e}",
            distance(&before, &here)
        );
        assert!(change > 1e-3 && served_change > 1e-3, "{precision:?}: {change} {served_change}");

        // A window of the old length, as a mask: what stands before it changes no bit.
        let window = |ids: &[u32]| logits(&model, ids, &[NEW - OLD, OLD], last);
        assert_eq!(bits(&window(&ids)), bits(&window(&other)));
        assert!(distance(&window(&ids), &before) > 1e-3, "the window hides something that counts");
        // A token behind the question reaches it by neither path, at any position of the new length.
        for question in [OLD, NEW / 2, last - 1] {
            let behind = with(ids.clone(), question + 1);
            let at = |ids: &[u32]| bits(&logits(&model, ids, &[NEW], question));
            assert_eq!(at(&ids), at(&behind), "{precision:?} {question}");
        }
    }
}

/// One layer adds up what it sees, so without positions the order of two needles could not matter.
#[test]
fn positions_beyond_the_old_length_are_told_apart() {
    let one_layer = ModelConfig { num_hidden_layers: 1, num_nextn_predict_layers: 0, ..config() };
    let model = extended(&one_layer, Precision::F32);
    let last = NEW - 1;
    for (a, b) in [(NEEDLE, NEEDLE + 1), (NEEDLE, NEW / 2), (NEW - 3 * OLD, NEW - 2 * OLD)] {
        let mut ids = text();
        (ids[a], ids[b]) = (11, 37);
        let before = logits(&model, &ids, &[NEW], last);
        ids.swap(a, b);
        let change = distance(&before, &logits(&model, &ids, &[NEW], last));
        println!("needles at {a} and {b} exchanged: {change:.1e}");
        assert!(change > 1e-4, "{a} {b}: {change}");
    }
}

#[test]
fn positions_beyond_the_declared_ones_are_refused() {
    let mut model = extended(&config(), Precision::F32);
    let ids = rows(4, 1, NEW + 1, 50).concat();
    let refuses = |model: &Model, len: usize| {
        let targets = vec![Batch::NO_TARGET; len].into();
        let batch = Batch { ids: ids[..len].to_vec(), spans: Spans::from_lens([len]), targets };
        let trained = model.forward_train(&mut Tape::inference(), &batch, TrainOptions::default());
        let mut cache = LatentCache::for_tokens(model, 1, len, LatentType::F32);
        let seq = cache.start();
        let served = model.forward_cached(&mut cache, &[SeqStep { seq, ids: &ids[..len] }]);
        assert_eq!(trained.is_err(), served.is_err());
        trained.err().map(|error| error.to_string())
    };
    assert_eq!(refuses(&model, NEW), None);
    let message = refuses(&model, NEW + 1).expect("refused");
    assert!(message.contains(&NEW.to_string()) && message.contains(&(NEW + 1).to_string()), "{message}");
    // The same model with its old position table.
    model.set_rope(None, OLD).expect("it fits");
    assert_eq!(refuses(&model, OLD), None);
    assert!(refuses(&model, OLD + 1).is_some());
}
