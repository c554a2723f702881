//! What a run leaves behind, on a local disk or an object store.
//!
//! ```text
//! blobs/<digest>                        content, immutable, named by its BLAKE3 digest
//! stages/<key>/checkpoints/<seq>.json   a checkpoint, a fence or a rewind
//! stages/<key>/leases/<epoch>.json      who runs the stage; <epoch>.beat its heartbeat, <epoch>.end its release
//! stages/<key>/result.json              the finished stage
//! runs/<id>/plan.json                   the resolved plan; status/<n>.json, events/<segment>.jsonl
//! gc/leases/<epoch>.json                whose turn it is to collect; gc/clock tells the store's time
//! probe/<nonce>                         whether the store honours conditional create; deleted at once
//! ```
//!
//! Invariants: every commit is a conditional create of a whole object; nothing is renamed and nothing is chosen by
//! modification time; a reader trusts bytes only after their digest verifies. So `kill -9` at any moment loses nothing
//! that was committed, and of two writers exactly one wins.

pub mod blocking;
pub mod faults;

mod blobs;
mod buffers;
mod checkpoints;
mod connect;
mod error;
mod gc;
mod hashing;
mod host;
mod lease;
mod local;
mod object;
mod options;
mod overlay;
mod probe;
mod record;
mod result;
mod retention;
mod retry;
mod runs;
mod saver;
mod shards;
#[cfg(test)]
mod tests;
mod transfer;

pub use blobs::Sources;
pub use buffers::{Buffer, Buffers};
pub use checkpoints::{Checkpoint, CheckpointRecord, FoundCheckpoint};
pub use connect::check_options;
pub use error::{Result, StoreError};
pub use gc::{CollectOptions, Collected, Collection, Item, Removed, Retired, Roots};
pub use host::{Holder, nonce};
pub use lease::{IfHeld, Lease, LeaseOptions, LeaseSeen};
pub use object::{Create, Store};
pub use options::{ConditionalCreate, StoreOptions};
pub use probe::CreateMode;
pub use result::{OutputEntry, StageResult};
pub use retention::{Best, Retention};
pub use runs::{EventLog, RunStatus, parse_events, segment_problem};
pub use shards::{TensorEntry, TensorRole, TensorSlice, TensorType, rows_of_rank};
