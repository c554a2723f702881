//! The stages of a model's life. One stage is one thin file here and one line in [`ALL`]; what a stage does lies below,
//! in `runtime/`, where it can be tested without a pipeline.

mod context_extension;
mod export;
mod ingest;
mod pretrain;
mod shared;

use dsv3_stage::StageEntry;

/// Every stage the pipeline knows, in the order of a model's life.
pub const ALL: &[StageEntry] = &[
    StageEntry::of::<ingest::Ingest>(),
    StageEntry::of::<pretrain::Pretrain>(),
    StageEntry::of::<context_extension::ContextExtension>(),
    StageEntry::of::<export::Export>(),
];
