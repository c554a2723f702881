//! The host of user code: WASM components of package `dsv3:hooks@0.1.0` (see `schemas/hooks/hooks.wit`).
//!
//! A hook is loaded once, compiled (or taken from the on-disk cache of compiled code), and then called with batches. Every
//! batch runs on a fresh instance that is configured first, so no state leaks between batches and results do not depend
//! on threads. The linker is empty: a component that imports anything is refused by name.
//!
//! **Invariant.** A guest can end its batch, never the host: traps, endless loops, endless allocation, deep recursion and
//! malformed answers all come back as a [`HookError`] that names hook, batch and item.

mod cache;
mod call;
mod error;
mod flat;
mod host;
mod limits;

pub use call::{FilterOutcome, Hook, Reward, RewardItem, RewardOutcome, Verdict};
pub use error::{Cause, HookError};
pub use host::{Host, World};
pub use limits::{Limits, OnError};
