//! A pipeline under crashes: each stage is run undisturbed, then once for each store operation with a fault at it, and
//! gone on with until it is finished.
//!
//! ```text
//! before(k): the store in which every stage before k is finished; after(k) = before(k) + an undisturbed run of k
//! point    : stage k, an operation of that run by name, a fault
//! trial    : copy before(k); run k with the fault; run or resume k with fresh handles until done; compare with after(k)
//! ```
//!
//! Each attempt is what a process is: its own store handle, engine, lease and run; what the crashed one still does reaches
//! nothing. A third of the crashed trials crash again, at an operation that the seed draws, in the attempt that goes on, so
//! that fences and take-overs are met too.
//!
//! Invariant: a trial is a function of plan, seed and point; [`ChaosPoint`] reads back from its text.

mod driver;
mod matrix;
mod point;
mod shrink;

use std::path::PathBuf;

use dsv3_store::faults::Fault;

pub use matrix::{ChaosReport, ChaosRow};
pub use point::{ChaosPoint, ChaosTrial, TrialEnd};
pub use shrink::Head;

/// What a chaos run does.
#[derive(Clone, Debug)]
pub struct ChaosOptions {
    /// Draws the sample of points and the further crashes of a trial.
    pub seed: u64,
    /// Points tried at most; all when absent.
    pub points_max: Option<usize>,
    /// Stages whose operations are disturbed; all when empty.
    pub stages: Vec<String>,
    /// Faults to try; each at every operation that can meet it.
    pub faults: Vec<Fault>,
    /// One point alone.
    pub only: Option<ChaosPoint>,
    /// Folder below which stores are made on disk; in memory when absent.
    pub folder: Option<PathBuf>,
    /// Trials at the same time.
    pub jobs: usize,
    /// Compute threads told to stages.
    pub threads: Option<usize>,
}

impl ChaosOptions {
    /// Crashes at every operation, in memory, one trial at a time.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            points_max: None,
            stages: Vec::new(),
            faults: Fault::CRASHES.to_vec(),
            only: None,
            folder: None,
            jobs: 1,
            threads: None,
        }
    }
}
