//! Times the optimiser at the sizes of `demo`, `S` and `M`, in GB/s of the bytes it cannot avoid: a gradient, a master and two
//! BF16 moments are read, the master and the moments written. Encoding the weights anew comes on top in BF16 and FP8.
//!
//! `cargo bench -p dsv3-train --bench adamw`, with the options of `kernels/ops/benches/ops/main.rs`.

#[allow(dead_code, reason = "the benches of ops use the rest")]
#[path = "../../../kernels/ops/benches/ops/harness.rs"]
mod harness;

use std::hint::black_box;
use std::time::Instant;

use dsv3_model::Model;
use dsv3_ops::testing::values;
use dsv3_ops::{Fp8Format, Fp8Scales, Precision, WeightGrads};
use dsv3_train::{AdamW, AdamWConfig, gradient_norm};
use harness::{Amount::Bytes, Bench};

fn main() {
    let mut bench = Bench::new();
    let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
    for name in ["demo", "S", "M"] {
        for (op, precision, encoded_bytes) in
            [("adamw f32", Precision::F32, 0.0), ("adamw bf16", Precision::Bf16, 2.0), ("adamw fp8", fp8, 1.0)]
        {
            optimiser(&mut bench, name, op, precision, encoded_bytes);
        }
    }
    bench.finish();
}

fn optimiser(bench: &mut Bench, name: &str, op: &str, precision: Precision, encoded_bytes: f64) {
    let config = dsv3_estimate::named(name).expect("a configuration").without_mtp().config;
    let parameters = dsv3_model::count::counts(&config).total as f64;
    let shape = format!("{name}: {parameters} parameters");
    if !bench.wants(op, &shape, &["norm", "update"]) {
        return;
    }
    let mut model = Model::init(&config, precision, 1).expect("a valid configuration");
    let mut optimiser = AdamW::new(AdamWConfig::default(), &model);
    let mut grads = WeightGrads::default();
    for (info, param) in model.infos().iter().zip(model.params()) {
        grads.add(param.id, values(&info.shape, u64::from(param.id)));
    }
    bench.time(op, &shape, "norm", Bytes(4.0 * parameters), || {
        black_box(gradient_norm(&model, &grads));
    });
    // Gradient 4, master 4 + 4, two moments 2 + 2 each.
    let bytes = (20.0 + encoded_bytes) * parameters;
    bench.time_parts(op, &shape, [("update", Bytes(bytes))], || {
        let start = Instant::now();
        optimiser.step(&mut model, &mut grads, 1.0, 1e-6).expect("a model with masters");
        [start.elapsed().as_secs_f64()]
    });
}
