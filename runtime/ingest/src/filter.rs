//! What may judge a document: a hook, or code of an embedding program.

use dsv3_hooks::{FilterOutcome, Hook, HookError};

/// Judges documents in batches. Batches and their numbers are the same for the same input, whatever thread calls.
pub trait DocumentFilter: Sync {
    /// One verdict per text, in order.
    ///
    /// # Errors
    /// Whatever stops the run: a trap, an exceeded limit, a malformed answer.
    fn filter(&self, batch: u64, texts: &[&str]) -> Result<FilterOutcome, HookError>;
}

impl DocumentFilter for Hook {
    fn filter(&self, batch: u64, texts: &[&str]) -> Result<FilterOutcome, HookError> {
        Hook::filter(self, batch, texts)
    }
}
