//! The words every other crate shares: digests, artifacts, events, error kinds, seeds, the clock. Data types only.
//!
//! Invariant: nothing here reads a file, a clock or a random source of the machine; those arrive from the caller.

mod artifact;
mod cancel;
mod canonical;
mod clock;
mod digest;
mod error;
mod event;
mod figure;
mod ids;
mod incident;
mod seed;

pub use artifact::{Artifact, ArtifactRef, FileEntry, Kind, Manifest, kinds};
pub use cancel::Cancel;
pub use canonical::{canonical_json, json_digest};
pub use clock::{Clock, SystemClock, VirtualClock};
pub use digest::{Digest, ParseDigestError};
pub use error::{Error, ErrorKind};
pub use event::{Event, Events, Level, Outcome};
pub use figure::{Bound, Figure};
pub use ids::run_id;
pub use incident::{GuardAction, GuardRecord};
pub use seed::{Rng, mix64, permute_index};
