//! The stages of a model's life. One stage is one thin file here and one line in [`ALL`]; what a stage does lies below,
//! in `runtime/`, where it can be tested without a pipeline.

mod context_extension;
mod distill;
mod evaluate;
mod export;
mod ingest;
mod pretrain;
mod rl;
mod serve;
mod sft;
mod shared;

use dsv3_stage::StageEntry;

/// Every stage the pipeline knows, in the order of a model's life.
pub const ALL: &[StageEntry] = &[
    StageEntry::of::<ingest::Ingest>(),
    StageEntry::of::<pretrain::Pretrain>(),
    StageEntry::of::<context_extension::ContextExtension>(),
    StageEntry::of::<distill::Distill>(),
    StageEntry::of::<sft::Sft>(),
    StageEntry::of::<rl::Rl>(),
    StageEntry::of::<evaluate::Evaluate>(),
    StageEntry::of::<export::Export>(),
    StageEntry::of::<serve::Serve>(),
];

#[cfg(test)]
mod tests;
