//! DeepSeek-V3 as a model: configuration, parameters and their published names, the training form over packed
//! sequences, the cached inference form, and Hugging Face folders on disk.
//!
//! **Invariant**: one text of the architecture. Training, validation and the golden tests run [`Model::forward_train`];
//! serving, rollouts and speculation run [`Model::forward_cached`]; both read the same parameters by the same table
//! ([`weight_names`]).

mod batch;
mod block;
mod check;
pub mod config;
mod context;
pub mod count;
mod decode;
mod error;
mod fp8_exceptions;
mod hf_config;
mod init;
mod kv_cache;
mod load;
mod mla;
mod mlp;
mod model;
mod moe;
mod mtp;
mod recompute;
mod save;
mod stored;
mod transformer;
pub mod weight_names;

pub use batch::Batch;
pub use check::Problem;
pub use config::{ModelConfig, RopeScaling};
pub use decode::{MtpStep, SeqStep};
pub use error::Error;
pub use fp8_exceptions::Fp8Exceptions;
pub use hf_config::{HfConfig, Quantization};
pub use kv_cache::{LatentCache, LatentType, PAGE_TOKENS, SeqId};
pub use load::{LoadPrecision, Loaded, check_folder, load};
pub use model::Model;
pub use mtp::MtpOut;
pub use save::{SaveFormat, save};
pub use transformer::{Observed, TrainOptions, TrainOut};
