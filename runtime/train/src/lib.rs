//! Training: optimiser, schedules, losses, expert balance, guard, checkpoints, and the loop that joins them.
//!
//! [`run_training`] drives any [`Work`] over a [`Trainer`]: supervised steps ([`Supervised`]) for pretraining, context
//! extension and SFT, rollouts and policy updates for reinforcement learning. A [`Trainer`] is a model, an [`AdamW`] and
//! a [`TrainerState`]; its snapshot holds all three, so a killed run goes on bit for bit.

pub mod adamw;
mod checkpoint;
mod error;
mod figures;
pub mod grpo;
mod guard;
mod host;
pub mod loss;
mod plan;
pub mod router_bias;
mod run;
pub mod schedule;
mod shards;
mod supervised;
mod trainer;

pub use adamw::{AdamW, AdamWConfig, Moments, gradient_norm};
pub use checkpoint::{MASTERS, MOMENTS, Snapshot};
pub use error::{Error, Result};
pub use figures::{Figure, Figures};
pub use guard::{GuardAction, GuardConfig, GuardRecord, GuardState, next_positions};
pub use host::{CheckpointStore, TrainHost};
pub use loss::{Losses, MicroBatch};
pub use plan::{ScheduleAt, Schedules};
pub use run::{CheckpointEvery, RunOptions, StepReport, Work, run_training, stored_phase};
pub use supervised::{Probe, Request, Source, StepData, Supervised, WindowSource, micro_batches, step_metrics};
pub use trainer::{Rates, StepMetrics, Trainer, TrainerConfig, TrainerState, Update};
