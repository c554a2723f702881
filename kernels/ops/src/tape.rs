//! Reverse-mode differentiation with a two-part backward pass.
//!
//! A [`Tape`] records one [`Back`] per op. [`Tape::backward_inputs`] walks them in reverse and computes gradients of
//! activations only; what a weight gradient needs is kept in a [`Job`], queued in tape order. [`Tape::run_deferred`]
//! runs jobs first in, first out. [`Tape::backward`] does both, job by job. Either way each weight gradient is the same
//! FP32 sum in the same order, so the bits are equal: a zero-bubble pipeline schedule may choose when to run them.
//!
//! Invariant: the tape holds no activations itself; only model code (through [`Var`]) and each op's saved state do.

use std::collections::VecDeque;

use crate::{Tensor, Weight};

/// Identity of a value on one tape.
pub type VarId = u32;

/// Identity of a parameter within one model; indexes [`WeightGrads`].
pub type ParamId = u32;

/// A value that gradients can flow to.
#[derive(Clone, Debug)]
pub struct Var {
    id: VarId,
    /// The value.
    pub value: Tensor,
}

impl Var {
    /// Identity on its tape.
    pub fn id(&self) -> VarId {
        self.id
    }

    /// The same value under another shape; gradients are kept flat, so no op is recorded.
    pub fn reshape(&self, shape: &[usize]) -> Var {
        Var { id: self.id, value: self.value.reshape(shape) }
    }
}

/// A trainable parameter: the FP32 master the optimiser updates and the encoding products read.
#[derive(Clone, Debug)]
pub struct Param {
    /// Index of its gradient.
    pub id: ParamId,
    /// FP32 master; absent in a model loaded for inference only.
    pub master: Option<Tensor>,
    /// What forward and backward products read; re-encoded once per optimiser step.
    pub compute: Weight,
}

/// Gradients of activations during one backward pass, FP32, by [`VarId`].
#[derive(Default)]
pub struct Grads {
    slots: Vec<Option<Tensor>>,
}

impl Grads {
    /// Removes the gradient that has arrived at `id`, or `None` when nothing flowed there.
    pub fn take(&mut self, id: VarId) -> Option<Tensor> {
        self.slots.get_mut(id as usize).and_then(Option::take)
    }

    /// Adds `grad` to what has arrived at `id`.
    ///
    /// # Panics
    /// When two gradients of one variable differ in size.
    pub fn add(&mut self, id: VarId, grad: Tensor) {
        let index = id as usize;
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        match &mut self.slots[index] {
            Some(sum) => crate::elementwise::add_assign(sum.as_f32_mut(), grad.as_f32()),
            empty => *empty = Some(grad),
        }
    }
}

/// FP32 weight gradients, by [`ParamId`]; they outlive the tape and add up over micro-batches.
///
/// Buffers are kept from one step to the next. Clearing one only marks it: what comes first then replaces its contents, so
/// nothing is zeroed and then added to.
#[derive(Default, Clone)]
pub struct WeightGrads {
    slots: Vec<Option<Slot>>,
}

#[derive(Clone)]
struct Slot {
    sum: Tensor,
    /// Whether anything flowed here since the gradients were cleared; otherwise the contents mean nothing.
    arrived: bool,
}

impl WeightGrads {
    /// The gradient of `id`, if anything flowed there.
    pub fn get(&self, id: ParamId) -> Option<&Tensor> {
        self.slots.get(id as usize).and_then(Option::as_ref).filter(|slot| slot.arrived).map(|slot| &slot.sum)
    }

    fn entry(&mut self, id: ParamId) -> &mut Option<Slot> {
        let index = id as usize;
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        &mut self.slots[index]
    }

    /// The buffer to add into; zeros when nothing flowed there yet.
    pub fn slot(&mut self, id: ParamId, shape: &[usize]) -> &mut [f32] {
        let (sum, arrived) = self.slot_or_new(id, shape);
        if !arrived {
            crate::vector::fill(sum, 0.0);
        }
        sum
    }

    /// The buffer, and whether it holds a sum to add to; if not, the caller writes every element.
    pub(crate) fn slot_or_new(&mut self, id: ParamId, shape: &[usize]) -> (&mut [f32], bool) {
        let slot = self.entry(id).get_or_insert_with(|| {
            let data = crate::memory::buffer(shape.iter().product());
            Slot { sum: Tensor::f32(shape, data), arrived: false }
        });
        let arrived = std::mem::replace(&mut slot.arrived, true);
        (slot.sum.as_f32_mut(), arrived)
    }

    /// Adds `grad` to parameter `id`.
    pub fn add(&mut self, id: ParamId, grad: Tensor) {
        match self.entry(id) {
            Some(slot) if slot.arrived => crate::elementwise::add_assign(slot.sum.as_f32_mut(), grad.as_f32()),
            entry => *entry = Some(Slot { sum: grad, arrived: true }),
        }
    }

    /// Forgets every gradient and keeps the buffers.
    pub fn clear(&mut self) {
        for slot in self.slots.iter_mut().flatten() {
            slot.arrived = false;
        }
    }

    /// All gradients that exist, by parameter.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (ParamId, &mut Tensor)> {
        let slots = self.slots.iter_mut().enumerate();
        slots.filter_map(|(i, slot)| Some((i as ParamId, &mut slot.as_mut().filter(|slot| slot.arrived)?.sum)))
    }
}

/// The weight half of an op's backward pass; owns what it needs.
pub struct Job(Box<dyn FnOnce(&mut WeightGrads) + Send>);

impl Job {
    /// Wraps the work.
    pub fn new(work: impl FnOnce(&mut WeightGrads) + Send + 'static) -> Self {
        Self(Box::new(work))
    }
}

/// One op's backward pass.
pub trait Back: Send {
    /// Takes the gradients of the op's outputs, adds those of its inputs, and returns the weight half, if any.
    /// An op whose outputs received no gradient returns `None` and adds nothing.
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job>;

    /// Bytes a linear layer keeps of its input for the weight gradient; 0 for every other op.
    #[doc(hidden)]
    fn saved_input_bytes(&self) -> usize {
        0
    }

    /// Bytes SwiGLU keeps of its two inputs; 0 for every other op.
    #[doc(hidden)]
    fn saved_swiglu_bytes(&self) -> usize {
        0
    }
}

/// What was run, so that it can be run backwards.
pub struct Tape {
    recording: bool,
    next_id: VarId,
    steps: Vec<Box<dyn Back>>,
    deferred: VecDeque<Job>,
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

impl Tape {
    /// A recording tape.
    pub fn new() -> Self {
        Self { recording: true, next_id: 0, steps: Vec::new(), deferred: VecDeque::new() }
    }

    /// A tape that records nothing: the same model code, for inference and validation.
    pub fn inference() -> Self {
        Self { recording: false, ..Self::new() }
    }

    /// Bytes that the linear layers recorded so far keep of their inputs; an input that two layers share counts once.
    #[doc(hidden)]
    pub fn saved_input_bytes(&self) -> usize {
        self.steps.iter().map(|step| step.saved_input_bytes()).sum()
    }

    /// Bytes that the SwiGLUs recorded so far keep of their inputs. A linear layer that computes such an output again
    /// keeps none of its own.
    #[doc(hidden)]
    pub fn saved_swiglu_bytes(&self) -> usize {
        self.steps.iter().map(|step| step.saved_swiglu_bytes()).sum()
    }

    /// Whether ops should save anything for a backward pass.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Makes a value no op produced.
    pub fn leaf(&mut self, value: Tensor) -> Var {
        let id = self.next_id;
        self.next_id += 1;
        Var { id, value }
    }

    /// Records an op with one output. `back` is called with the output's id, and only when recording.
    pub fn push(&mut self, value: Tensor, back: impl FnOnce(VarId) -> Box<dyn Back>) -> Var {
        let out = self.leaf(value);
        if self.recording {
            self.steps.push(back(out.id));
        }
        out
    }

    /// Records the backward pass of an op whose outputs were made with [`Tape::leaf`].
    pub fn record(&mut self, back: impl FnOnce() -> Box<dyn Back>) {
        if self.recording {
            self.steps.push(back());
        }
    }

    /// Runs the whole backward pass from `seeds`, the gradients of the loss with respect to some variables.
    /// Returns the gradients of those variables that nothing consumed (the leaves).
    pub fn backward(&mut self, seeds: Vec<(VarId, Tensor)>, weights: &mut WeightGrads) -> Grads {
        let grads = self.walk(seeds, |_, job| job.0(weights));
        self.run_deferred(usize::MAX, weights);
        grads
    }

    /// Runs the activation half only and queues the weight half.
    pub fn backward_inputs(&mut self, seeds: Vec<(VarId, Tensor)>) -> Grads {
        self.walk(seeds, |deferred, job| deferred.push_back(job))
    }

    /// Runs up to `count` queued weight jobs, oldest first; returns how many are left.
    pub fn run_deferred(&mut self, count: usize, weights: &mut WeightGrads) -> usize {
        for _ in 0..count.min(self.deferred.len()) {
            if let Some(job) = self.deferred.pop_front() {
                job.0(weights);
            }
        }
        self.deferred.len()
    }

    fn walk(&mut self, seeds: Vec<(VarId, Tensor)>, mut on_job: impl FnMut(&mut VecDeque<Job>, Job)) -> Grads {
        let mut grads = Grads::default();
        for (id, grad) in seeds {
            grads.add(id, grad);
        }
        while let Some(step) = self.steps.pop() {
            if let Some(job) = step.inputs(&mut grads) {
                on_job(&mut self.deferred, job);
            }
        }
        grads
    }

    /// Runs `block` without recording and, in the backward pass, runs it again from its input.
    /// Saves the input instead of everything inside (activation recomputation).
    pub fn recompute(&mut self, x: &Var, block: impl Fn(&mut Tape, &Var) -> Var + Send + 'static) -> Var {
        if !self.recording {
            return block(self, x);
        }
        let mut quiet = Tape::inference();
        let input = quiet.leaf(x.value.clone());
        let value = block(&mut quiet, &input).value;
        let input = x.clone();
        self.push(value, |output| Box::new(Replay { input, output, block: Box::new(block) }))
    }
}

struct Replay<F> {
    input: Var,
    output: VarId,
    block: Box<F>,
}

impl<F: Fn(&mut Tape, &Var) -> Var + Send> Back for Replay<F> {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.output)?;
        let mut tape = Tape::new();
        let input = tape.leaf(self.input.value.clone());
        let output = (self.block)(&mut tape, &input);
        let mut inner = tape.backward_inputs(vec![(output.id, dy)]);
        if let Some(dx) = inner.take(input.id) {
            grads.add(self.input.id, dx);
        }
        let mut jobs = std::mem::take(&mut tape.deferred);
        (!jobs.is_empty()).then(|| {
            Job::new(move |weights| {
                while let Some(job) = jobs.pop_front() {
                    job.0(weights);
                }
            })
        })
    }
}
