//! Tensors, the tape, and every operation a DeepSeek-V3 block needs: one op is one file.
//!
//! An op file holds, in this order: the equation, the shape rule, a plain reference, the fast CPU path, `forward`
//! (inference and training both call it), `on_tape` with its two-part backward pass, test cases and tolerance.
//!
//! **Numerics rule.** An output of a matrix product is one chain of fused multiply-adds in k order, in fixed K blocks
//! that are added in order, whatever the row count, thread count or instruction set. Reductions over rows use fixed
//! chunks. So the same inputs give the same bits on any number of threads, alone or in a batch.

pub mod elementwise;
mod gemm;
mod tape;
mod tensor;
mod weight;

pub use tape::{Back, Grads, Job, Param, ParamId, Tape, Var, VarId, WeightGrads};
pub use tensor::{CpuBuf, DType, Device, Spans, Tensor};
pub use weight::{Precision, Weight};
