//! Decoding against the training form, and the promise that batches, chunks, forks and threads change no bit.

use dsv3_ops::{Fp8Format, Fp8Scales, Precision};

use super::*;
use crate::config::tests::small;
use crate::{Batch, LatentType, ModelConfig, RopeScaling, TrainOptions};

const FP8: Precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };

fn model(precision: Precision) -> Model {
    let mut model = Model::init(&small(), precision, 3).unwrap();
    for (i, bias) in model.biases_mut().iter_mut().flatten().enumerate() {
        *bias = ((i * 7 % 5) as f32 - 2.0) * 0.01;
    }
    model
}

fn tokens(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 31 + seed * 17 + i * i) % 50) as u32).collect()
}

/// Hidden states of one sequence, fed in chunks of the given lengths.
fn chunked(model: &Model, ids: &[u32], chunks: &[usize], kind: LatentType) -> Vec<f32> {
    let mut cache = LatentCache::for_tokens(model, 1, ids.len(), kind);
    let seq = cache.start();
    let (mut out, mut at) = (Vec::new(), 0);
    for chunk in chunks {
        let step = SeqStep { seq, ids: &ids[at..at + chunk] };
        out.extend(model.forward_cached(&mut cache, &[step]).unwrap().into_f32());
        at += chunk;
    }
    assert_eq!(at, ids.len());
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn cached_states_follow_the_training_form() {
    let configs = [
        small(),
        ModelConfig { q_lora_rank: None, n_shared_experts: 2, norm_topk_prob: false, ..small() },
        ModelConfig { rope_scaling: Some(RopeScaling::yarn(3.0, 32)), n_shared_experts: 0, ..small() },
    ];
    for config in configs {
        let model = Model::init(&config, Precision::F32, 5).unwrap();
        let ids = tokens(1, 70);
        let batch = Batch::from_rows([&ids]);
        let out = model.forward_train(&mut Tape::inference(), &batch, TrainOptions::default()).unwrap();
        let cached = chunked(&model, &ids[..69], &[69], LatentType::F32);
        let worst = out.hidden.value.as_f32().iter().zip(&cached).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-4, "{worst}");
    }
}

/// Mean distances without the rounding of latents: 1e-2 in BF16, 0.2 in FP8. What is left comes from the order of
/// additions.
#[test]
fn cached_states_follow_the_training_form_in_every_precision() {
    for precision in [FP8, Precision::Bf16, Precision::F32] {
        let (mut sum, mut count) = (0.0, 0);
        for seed in 0..8 {
            let model = Model::init(&small(), precision, seed).unwrap();
            let ids = tokens(seed as usize, 70);
            let batch = Batch::from_rows([&ids]);
            let out = model.forward_train(&mut Tape::inference(), &batch, TrainOptions::default()).unwrap();
            let cached = chunked(&model, &ids[..69], &[69], LatentType::F32);
            sum += out.hidden.value.as_f32().iter().zip(&cached).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
            count += cached.len();
        }
        let mean = sum / count as f64;
        println!("{precision:?}: hidden states differ by {mean:.2e} on average");
        assert!(mean < 1e-5, "{precision:?}: {mean}");
    }
}

#[test]
fn alone_in_a_batch_and_in_chunks_are_the_same_bits() {
    for precision in [Precision::F32, Precision::Bf16, FP8] {
        for kind in [LatentType::F32, LatentType::Bf16] {
            let model = model(precision);
            let rows: Vec<Vec<u32>> = [67, 5, 40].iter().enumerate().map(|(i, len)| tokens(i, *len)).collect();
            let alone: Vec<Vec<f32>> = rows.iter().map(|ids| chunked(&model, ids, &[ids.len()], kind)).collect();
            assert_eq!(bits(&chunked(&model, &rows[0], &[1, 31, 2, 33], kind)), bits(&alone[0]));
            let mut cache = LatentCache::for_tokens(&model, 3, 96, kind);
            let seqs: Vec<SeqId> = rows.iter().map(|_| cache.start()).collect();
            let mut done = [0; 3];
            for plan in [[40, 1, 3], [7, 4, 0], [20, 0, 37]] {
                let active: Vec<usize> = (0..3).filter(|i| plan[*i] > 0).collect();
                let steps: Vec<SeqStep<'_>> = active
                    .iter()
                    .map(|i| SeqStep { seq: seqs[*i], ids: &rows[*i][done[*i]..done[*i] + plan[*i]] })
                    .collect();
                let hidden = model.forward_cached(&mut cache, &steps).unwrap().into_f32();
                let mut rest = &hidden[..];
                for i in active {
                    let (mine, others) = rest.split_at(plan[i] * 32);
                    assert_eq!(bits(mine), bits(&alone[i][done[i] * 32..][..mine.len()]), "{precision:?} {kind:?} {i}");
                    (rest, done[i]) = (others, done[i] + plan[i]);
                }
            }
        }
    }
}

#[test]
fn prediction_modules_follow_the_training_form_in_chunks() {
    let model = Model::init(&ModelConfig { num_nextn_predict_layers: 2, ..small() }, Precision::F32, 9).unwrap();
    let ids = tokens(4, 50);
    let out = model.forward_train(&mut Tape::inference(), &Batch::from_rows([&ids]), TrainOptions::default()).unwrap();
    let mut cache = LatentCache::for_tokens(&model, 1, 64, LatentType::F32);
    let seq = cache.start();
    let mut before = model.forward_cached(&mut cache, &[SeqStep { seq, ids: &ids[..49] }]).unwrap().into_f32();
    for depth in 1..=2 {
        let count = 49 - depth;
        let mut got = Vec::new();
        for (from, to) in [(0, 20), (20, 21), (21, count)] {
            let step = MtpStep { seq, hidden: &before[from * 32..to * 32], ids: &ids[from + depth..to + depth] };
            got.extend(model.forward_mtp_cached(&mut cache, depth - 1, &[step]).unwrap().into_f32());
        }
        let want = out.mtp[depth - 1].hidden.value.as_f32();
        assert_eq!(want.len(), got.len());
        let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-4, "depth {depth}: {worst}");
        assert_eq!(cache.mtp_len(seq, depth - 1), count);
        before = got;
    }
}

#[test]
fn forks_and_truncation_leave_others_alone() {
    let model = model(Precision::F32);
    let ids = tokens(2, 80);
    let alone = chunked(&model, &ids, &[80], LatentType::F32);
    let mut cache = LatentCache::new(&model, 9, LatentType::F32);
    let seq = cache.start();
    model.forward_cached(&mut cache, &[SeqStep { seq, ids: &ids[..70] }]).unwrap();
    let fork = cache.fork(seq, 65).unwrap();
    // Two full pages are shared, the third copied.
    assert_eq!((cache.total_pages(), cache.free_pages(), cache.len(fork)), (9, 5, 65));
    let other = model.forward_cached(&mut cache, &[SeqStep { seq: fork, ids: &[7, 8, 9] }]).unwrap();
    let mut changed = ids[..65].to_vec();
    changed.extend([7, 8, 9]);
    let want = chunked(&model, &changed, &[68], LatentType::F32);
    assert_eq!(bits(other.as_f32()), bits(&want[65 * 32..]));
    cache.truncate(seq, 68);
    let rest = model.forward_cached(&mut cache, &[SeqStep { seq, ids: &ids[68..] }]).unwrap();
    assert_eq!(bits(rest.as_f32()), bits(&alone[68 * 32..]));
    cache.truncate(fork, 3);
    assert_eq!(cache.free_pages(), 6, "the fork keeps one shared page");
    cache.release(seq);
    cache.release(fork);
    cache.release(fork);
    assert_eq!((cache.free_pages(), cache.is_empty()), (9, true));
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let model = model(Precision::F32);
    let mut cache = LatentCache::new(&model, 2, LatentType::Bf16);
    let (a, b) = (cache.start(), cache.start());
    let ids = tokens(0, 97);
    let mut refuse = |steps: &[SeqStep<'_>]| assert!(model.forward_cached(&mut cache, steps).is_err());
    refuse(&[SeqStep { seq: a, ids: &[] }]);
    refuse(&[SeqStep { seq: a, ids: &[50] }]);
    refuse(&[SeqStep { seq: a, ids: &ids }]);
    refuse(&[SeqStep { seq: a, ids: &ids[..33] }, SeqStep { seq: b, ids: &ids[..1] }]);
    refuse(&[SeqStep { seq: a, ids: &ids[..1] }, SeqStep { seq: a, ids: &ids[..1] }]);
    cache.release(b);
    assert!(model.forward_cached(&mut cache, &[SeqStep { seq: b, ids: &ids[..1] }]).is_err());
    assert!(cache.fork(a, 1).is_err());
    let hidden = vec![0.0; 32];
    assert!(model.forward_mtp_cached(&mut cache, 0, &[MtpStep { seq: a, hidden: &hidden, ids: &[1] }]).is_err());
    assert!(model.forward_mtp_cached(&mut cache, 1, &[]).is_err());
    assert_eq!((cache.free_pages(), cache.len(a)), (2, 0));
}

#[test]
fn changed_weights_are_seen() {
    let mut model = model(Precision::F32);
    let before = chunked(&model, &[1, 2, 3], &[3], LatentType::F32);
    let logits = model.logits(&Tensor::f32(&[3, 32], before.clone()));
    for param in model.params_mut() {
        if let Some(master) = &mut param.master {
            master.as_f32_mut().iter_mut().for_each(|v| *v *= 1.25);
        }
    }
    model.encode();
    let after = chunked(&model, &[1, 2, 3], &[3], LatentType::F32);
    assert_ne!(before, after);
    assert_ne!(logits.as_f32(), model.logits(&Tensor::f32(&[3, 32], before)).as_f32());
    model.freeze();
    assert_eq!(bits(&after), bits(&chunked(&model, &[1, 2, 3], &[3], LatentType::F32)));
}
