//! The training form: packing isolates sequences, threads and recomputation change no bit, masks and options hold.

use dsv3_ops::{Fp8Format, Fp8Scales, Precision, WeightGrads};

use super::*;
use crate::ModelConfig;
use crate::config::tests::small;

const FP8: Precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };

fn rows() -> Vec<Vec<u32>> {
    [34, 2, 1, 20].iter().map(|len| (0..*len).map(|i| ((i * i * 3 + len * 7) % 50) as u32).collect()).collect()
}

/// Log-probabilities of every depth, and every gradient of a loss that touches all outputs.
fn step(model: &Model, batch: &Batch, options: TrainOptions) -> (Vec<f32>, Vec<Vec<f32>>) {
    let mut tape = Tape::new();
    let out = model.forward_train(&mut tape, batch, options).unwrap();
    let fill = |var: &Var, value: f32| {
        let values = (0..var.value.numel()).map(|i| value * (1.0 + (i % 3) as f32)).collect();
        (var.id(), Tensor::f32(var.value.shape(), values))
    };
    let mut seeds = vec![fill(&out.logp, -0.1)];
    seeds.extend(out.mtp.iter().map(|mtp| fill(&mtp.logp, -0.05)));
    seeds.extend(out.balance.iter().map(|(_, loss)| fill(loss, 0.3)));
    let mut logp = out.logp.value.clone().into_f32();
    logp.extend(out.mtp.iter().flat_map(|mtp| mtp.logp.value.as_f32().to_vec()));
    let mut grads = WeightGrads::default();
    tape.backward(seeds, &mut grads);
    let named = model.infos().iter().map(|info| grads.get(info.id).map_or(Vec::new(), |g| g.as_f32().to_vec()));
    (logp, named.collect())
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    let model = Model::init(&ModelConfig { num_nextn_predict_layers: 2, ..small() }, FP8, 2).unwrap();
    let options = TrainOptions { entropy: true, ..TrainOptions::default() };
    let run = |batch: &Batch| model.forward_train(&mut Tape::inference(), batch, options).unwrap();
    let rows = rows();
    let packed = run(&Batch::from_rows(&rows));
    let mut alone = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for row in rows.iter().filter(|row| row.len() > 1) {
        let out = run(&Batch::from_rows([row]));
        alone[0].extend_from_slice(out.logp.value.as_f32());
        alone[1].extend_from_slice(out.entropy.as_ref().unwrap().as_f32());
        for mtp in &out.mtp {
            alone[1 + mtp.depth].extend_from_slice(mtp.logp.value.as_f32());
        }
    }
    assert_eq!(packed.logp.value.as_f32(), alone[0]);
    assert_eq!(packed.entropy.unwrap().as_f32(), alone[1]);
    assert_eq!(packed.mtp.len(), 2);
    for mtp in &packed.mtp {
        assert_eq!(mtp.logp.value.as_f32(), alone[1 + mtp.depth]);
        assert_eq!(mtp.rows.len(), mtp.targets.len());
    }
    let layers: Vec<usize> = packed.loads.iter().map(|(layer, _)| *layer).collect();
    assert_eq!(layers, model.config.moe_layers());
    assert_eq!(layers, model.bias_infos().iter().map(|bias| bias.layer).collect::<Vec<_>>());
    assert!(packed.loads.iter().all(|(_, loads)| loads.iter().sum::<u64>() % 2 == 0));
}

#[test]
fn threads_and_recomputation_change_no_bit() {
    let batch =
        Batch::from_rows((0..6).map(|row| (0..90).map(|i| ((i * 13 + row * 5) % 50) as u32).collect::<Vec<_>>()));
    for precision in [Precision::F32, FP8] {
        let run = |threads: usize, recompute: bool| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let model = Model::init(&small(), precision, 8).unwrap();
                step(&model, &batch, TrainOptions { recompute, ..TrainOptions::default() })
            })
        };
        let one = run(1, false);
        assert!(one.1.iter().all(|grad| grad.iter().any(|g| *g != 0.0)), "every parameter has a gradient");
        assert!(run(3, false) == one && run(2, true) == one, "{precision:?}");
    }
}

#[test]
fn masked_targets_have_no_loss() {
    let model = Model::init(&small(), Precision::F32, 2).unwrap();
    let tokens = [3_u32, 1, 4, 1, 5, 9];
    let wanted = [true, false, false, true, false, true];
    let batch = Batch::from_masked_rows([(&tokens[..], &wanted[..])]);
    let none = Batch::NO_TARGET;
    assert_eq!(*batch.targets, [none, none, 1, none, 9]);
    assert_eq!((batch.tokens(), batch.target_count()), (5, 2));
    let out = model.forward_train(&mut Tape::inference(), &batch, TrainOptions::default()).unwrap();
    let zero: Vec<bool> = out.logp.value.as_f32().iter().map(|logp| *logp == 0.0).collect();
    assert_eq!(zero, [true, true, false, true, false]);
    assert_eq!(*out.mtp[0].targets, [none, 1, none, 9]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = Model::init(&small(), Precision::F32, 2).unwrap();
    let run =
        |rows: &[Vec<u32>]| model.forward_train(&mut Tape::new(), &Batch::from_rows(rows), TrainOptions::default());
    assert!(run(&[vec![1, 50]]).is_err());
    assert!(run(&[vec![50, 1]]).is_err());
    assert!(run(&[vec![1; 98]]).is_err());
    assert!(run(&[vec![1; 97], vec![7]]).is_ok());
    assert!(run(&[]).is_err());
    assert!(run(&[vec![1, 2], vec![7]]).is_ok());
    assert!(Model::init(&ModelConfig { n_group: 3, ..small() }, Precision::F32, 0).is_err());
}

#[test]
fn weights_depend_on_seed_and_name_only() {
    let plain = Model::init(&small(), Precision::F32, 4).unwrap();
    let deeper = Model::init(&ModelConfig { num_nextn_predict_layers: 3, ..small() }, Precision::F32, 4).unwrap();
    for info in plain.infos() {
        let same = deeper.infos().iter().find(|other| other.name == info.name).unwrap();
        let master = |model: &Model, id: u32| model.params()[id as usize].master.clone().unwrap().into_f32();
        assert!(master(&plain, info.id) == master(&deeper, same.id), "{}", info.name);
    }
    let other = Model::init(&small(), Precision::F32, 5).unwrap();
    assert!(plain.params()[0].master.as_ref().unwrap().as_f32() != other.params()[0].master.as_ref().unwrap().as_f32());
    let mut longer = plain.clone();
    longer.set_rope(Some(crate::RopeScaling::yarn(4.0, 96)), 384).unwrap();
    assert!(longer.set_rope(Some(crate::RopeScaling::yarn(2.0, 96)), 384).is_err());
    assert_eq!(longer.config.max_position_embeddings, 384);
}
