//! After pretraining: supervised fine-tuning data, distillation with rejection sampling, rewards, GRPO.
//!
//! [`ChatSource`] and [`Rl`] plug into `dsv3_train::run_training`; [`distill`](distill::distill) makes chat data.

pub mod distill;
mod error;
pub mod reward;
mod rl;
pub mod rollout;
pub mod sft;

pub use distill::{DistillConfig, DistillReport, Distilled, Mix, Sample, Teacher};
pub use error::{Error, Result};
pub use reward::{Rewards, Rule, Scored, Scorer};
pub use rl::{Control, Rl, RlConfig};
pub use rollout::Prompt;
pub use sft::{ChatSource, Examples};
