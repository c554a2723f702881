//! Tensors, the tape, and every operation a DeepSeek-V3 block needs: one op is one file.
//!
//! An op file holds, in this order: the equation, the shape rule, a plain reference, the fast CPU path, `forward`
//! (inference and training both call it), `on_tape` with its two-part backward pass, test cases and tolerance.
//!
//! **Numerics rule.** An output of a matrix product is one chain of fused multiply-adds in k order, in fixed K blocks
//! that are added in order, whatever the row count, thread count or instruction set. Reductions over rows use fixed
//! chunks. So the same inputs give the same bits on any number of threads, alone or in a batch.

mod activation;
pub mod adamw;
pub mod attention;
mod awake;
pub mod balance_loss;
mod bfloat;
pub mod columns;
pub mod elementwise;
pub mod embedding;
pub mod fp8;
pub mod gather_rows;
mod gemm;
pub mod grouped_linear;
mod isa;
pub mod layers;
pub mod linear;
mod memory;
pub mod mla_decode;
mod panels;
pub mod permute;
pub mod rms_norm;
pub mod rope;
pub mod router;
mod scratch;
pub mod swiglu;
mod tape;
mod tensor;
#[doc(hidden)]
pub mod testing;
pub mod token_logprob;
mod vector;
mod weight;

pub use awake::with_threads_awake;
pub use fp8::{Fp8, Fp8Format, Fp8Scales};
pub use isa::{INSTRUCTION_SETS, IsaError, instruction_set, limit_instruction_set};
pub use memory::{keep_buffers, keep_freed_memory, return_freed_memory};
pub use tape::{Back, Grads, Job, Param, ParamId, Tape, Var, VarId, WeightGrads};
pub use tensor::{CpuBuf, DType, Device, Spans, Tensor};
pub use weight::{Precision, Weight};
