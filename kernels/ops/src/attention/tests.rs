//! The fast path against plain loops, gradients, and independence of threads and of neighbours.

use super::*;
use crate::testing::{check_gradients, values};

const HEADS: usize = 3;
const DN: usize = 5;
const DR: usize = 4;
const DV: usize = 6;

fn inputs(tokens: usize) -> [Tensor; 3] {
    [values(&[tokens, HEADS, DN + DR], 1), values(&[tokens, HEADS, DN + DV], 2), values(&[tokens, DR], 3)]
}

/// The equation in f64, one query at a time.
fn reference([q, kv, k_rope]: &[Tensor; 3], spans: &Spans, scale: f64) -> Vec<f64> {
    let (q, kv, r) = (q.as_f32(), kv.as_f32(), k_rope.as_f32());
    let mut out = vec![0.0; spans.tokens() * HEADS * DV];
    for range in spans.iter() {
        for (i, head) in range.clone().flat_map(|i| (0..HEADS).map(move |head| (i, head))) {
            let q = &q[(i * HEADS + head) * (DN + DR)..][..DN + DR];
            let kv = |j: usize| &kv[(j * HEADS + head) * (DN + DV)..][..DN + DV];
            let weight = |j: usize| {
                let key = kv(j)[..DN].iter().chain(&r[j * DR..][..DR]);
                (scale * q.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()).exp()
            };
            let total: f64 = (range.start..=i).map(weight).sum();
            for j in range.start..=i {
                for (out, v) in out[(i * HEADS + head) * DV..][..DV].iter_mut().zip(&kv(j)[DN..]) {
                    *out += weight(j) / total * f64::from(*v);
                }
            }
        }
    }
    out
}

#[test]
fn follows_the_reference() {
    let spans = Spans::from_lens([1, 70, 0, 5, 130, 64]);
    let x = inputs(spans.tokens());
    let got = forward(&x[0], &x[1], &x[2], &spans, 0.7);
    assert_eq!(got.shape(), [spans.tokens(), HEADS * DV]);
    for (got, want) in got.as_f32().iter().zip(reference(&x, &spans, 0.7)) {
        assert!((f64::from(*got) - want).abs() < 2e-6, "{got} is not {want}");
    }
}

#[test]
fn gradients() {
    let spans = Arc::new(Spans::from_lens([1, 4, 3]));
    let run = |t: &mut Tape, x: &[Var], _: &[crate::Param]| on_tape(t, &x[0], &x[1], &x[2], &spans, 0.7);
    check_gradients("attention", inputs(8).to_vec(), vec![], run, 2e-3);
    let spans = Arc::new(Spans::from_lens([66, 2]));
    let run = |t: &mut Tape, x: &[Var], _: &[crate::Param]| on_tape(t, &x[0], &x[1], &x[2], &spans, 0.7);
    check_gradients("attention over two tiles", inputs(68).to_vec(), vec![], run, 2e-3);
}

fn outputs_and_gradients(x: &[Tensor], spans: &Spans) -> Vec<Vec<f32>> {
    let mut tape = Tape::new();
    let vars: Vec<Var> = x.iter().map(|x| tape.leaf(x.clone())).collect();
    let out = on_tape(&mut tape, &vars[0], &vars[1], &vars[2], &Arc::new(spans.clone()), 0.3);
    let seed = vec![(out.id(), out.value.clone())];
    let mut grads = tape.backward(seed, &mut crate::WeightGrads::default());
    let grads = vars.iter().map(|v| grads.take(v.id()).expect("a gradient").into_f32());
    std::iter::once(out.value.clone().into_f32()).chain(grads).collect()
}

#[test]
fn threads_do_not_change_bits() {
    let spans = Spans::from_lens([100, 33]);
    let x = inputs(spans.tokens());
    let with_threads = |count| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().expect("a thread pool");
        pool.install(|| outputs_and_gradients(&x, &spans))
    };
    assert_eq!(with_threads(1), with_threads(3));
}

#[test]
fn neighbours_do_not_change_bits() {
    let spans = Spans::from_lens([40, 75]);
    let x = inputs(115);
    let alone: Vec<Tensor> = x
        .iter()
        .map(|x| {
            let per_token = x.numel() / 115;
            let mut shape = x.shape().to_vec();
            shape[0] = 75;
            Tensor::f32(&shape, x.as_f32()[40 * per_token..].to_vec())
        })
        .collect();
    let (batch, alone) = (outputs_and_gradients(&x, &spans), outputs_and_gradients(&alone, &Spans::uniform(1, 75)));
    for (batch, alone) in batch.iter().zip(&alone) {
        assert_eq!(&batch[batch.len() - alone.len()..], &alone[..]);
    }
}
