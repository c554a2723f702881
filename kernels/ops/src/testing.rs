//! Checks that an op's tests share: gradients against central differences, and the two ways of running backward.

use crate::{Param, Precision, Tape, Tensor, Var, Weight, WeightGrads};

/// Elements of one tensor whose derivative is measured; more are sampled evenly.
const ELEMENTS_MAX: usize = 48;
/// Step of the difference quotient, a power of two.
const STEP: f32 = 1.0 / 64.0;

/// Deterministic values in (-1, 1), different for each `seed`.
pub fn values(shape: &[usize], seed: u64) -> Tensor {
    let len = shape.iter().product::<usize>();
    Tensor::f32(shape, (0..len as u64).map(|i| uniform(seed, i)).collect())
}

fn uniform(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index.wrapping_mul(0xbf58_476d_1ce4_e5b9));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    // The half keeps the value away from 0, where some ops have a kink.
    ((z >> 41) as f32 + 0.5) / (1u64 << 22) as f32 - 1.0
}

/// An F32 parameter.
pub fn param(id: u32, master: &Tensor) -> Param {
    Param { id, master: Some(master.clone()), compute: Weight::encode(master, &Precision::F32) }
}

/// Checks the gradients of `f` with respect to every input and parameter: those of `Tape::backward` against fourth-order
/// central differences of Σ y·r, r fixed pseudo-random, and those of `backward_inputs` with `run_deferred` against
/// `backward`, bit for bit. The largest error must be below `tolerance` times the largest derivative of the tensor.
///
/// # Panics
/// When a check fails.
pub fn check_gradients(
    name: &str,
    inputs: Vec<Tensor>,
    params: Vec<Tensor>,
    f: impl Fn(&mut Tape, &[Var], &[Param]) -> Var,
    tolerance: f32,
) {
    let whole = gradients(&inputs, &params, &f, |tape, seed, weights| tape.backward(seed, weights));
    let halves = gradients(&inputs, &params, &f, |tape, seed, weights| {
        let grads = tape.backward_inputs(seed);
        while tape.run_deferred(1, weights) > 0 {}
        grads
    });
    for (i, (a, b)) in whole.iter().zip(&halves).enumerate() {
        let bits = |t: &Tensor| t.as_f32().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(a), bits(b), "{name}: the split backward pass differs for tensor {i}");
    }
    let loss = |inputs: &[Tensor], params: &[Tensor]| {
        let mut tape = Tape::inference();
        let y = run(&mut tape, inputs, params, &f).0.value;
        let cotangent = values(y.shape(), 77);
        y.as_f32().iter().zip(cotangent.as_f32()).map(|(y, r)| f64::from(*y) * f64::from(*r)).sum::<f64>()
    };
    for (i, grad) in whole.iter().enumerate() {
        let of_input = i < inputs.len();
        let tensor = if of_input { &inputs[i] } else { &params[i - inputs.len()] };
        let at = |element: usize, delta: f32| {
            let mut moved = tensor.clone();
            moved.as_f32_mut()[element] += delta;
            if of_input {
                let mut inputs = inputs.clone();
                inputs[i] = moved;
                loss(&inputs, &params)
            } else {
                let mut params = params.clone();
                params[i - inputs.len()] = moved;
                loss(&inputs, &params)
            }
        };
        let stride = tensor.numel().div_ceil(ELEMENTS_MAX).max(1);
        let mut pairs = Vec::new();
        for element in (0..tensor.numel()).step_by(stride) {
            let near = at(element, STEP) - at(element, -STEP);
            let far = at(element, 2.0 * STEP) - at(element, -2.0 * STEP);
            let measured = (8.0 * near - far) / (12.0 * f64::from(STEP));
            pairs.push((element, f64::from(grad.as_f32()[element]), measured));
        }
        let largest = pairs.iter().fold(1e-2, |acc: f64, (_, a, b)| acc.max(a.abs()).max(b.abs()));
        for (element, computed, measured) in pairs {
            let error = (computed - measured).abs() / largest;
            let what = if of_input { "input" } else { "parameter" };
            assert!(
                error <= f64::from(tolerance),
                "{name}: gradient of {what} tensor {i}, element {element}: computed {computed}, measured {measured}"
            );
        }
    }
}

type Seeds = Vec<(crate::VarId, Tensor)>;

fn run(
    tape: &mut Tape,
    inputs: &[Tensor],
    params: &[Tensor],
    f: &impl Fn(&mut Tape, &[Var], &[Param]) -> Var,
) -> (Var, Vec<Var>) {
    let vars: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
    let params: Vec<Param> = params.iter().enumerate().map(|(i, p)| param(i as u32, p)).collect();
    (f(tape, &vars, &params), vars)
}

/// Gradients of inputs, then parameters; zeros where nothing flowed.
fn gradients(
    inputs: &[Tensor],
    params: &[Tensor],
    f: &impl Fn(&mut Tape, &[Var], &[Param]) -> Var,
    backward: impl Fn(&mut Tape, Seeds, &mut WeightGrads) -> crate::Grads,
) -> Vec<Tensor> {
    let mut tape = Tape::new();
    let (y, vars) = run(&mut tape, inputs, params, f);
    let cotangent = values(y.value.shape(), 77);
    let mut weights = WeightGrads::default();
    let mut grads = backward(&mut tape, vec![(y.id(), cotangent)], &mut weights);
    let of_inputs = vars.iter().map(|x| grads.take(x.id()).unwrap_or_else(|| Tensor::zeros(x.value.shape())));
    let mut all: Vec<Tensor> = of_inputs.collect();
    for (i, p) in params.iter().enumerate() {
        all.push(weights.get(i as u32).cloned().unwrap_or_else(|| Tensor::zeros(p.shape())));
    }
    all
}
