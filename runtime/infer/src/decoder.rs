//! What the scheduler needs of a model: rows through the network over a paged cache, and the drafting head.
//!
//! **Invariant:** a row's bits depend on its own sequence only: not on the other rows of the call, not on how a prompt
//! was cut into calls, not on whether a draft row stood behind it.

use dsv3_ops::Tensor;

use crate::Error;

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The sequence, as [`Decoder::add`] named it.
    pub seq: usize,
    /// Tokens to append to its cache.
    pub ids: &'a [u32],
}

/// A model with its cache of latents.
pub trait Decoder: Send + Sync {
    /// Keys and values of all live sequences.
    type Cache: Send;

    /// Number of token ids.
    fn vocab_size(&self) -> usize;

    /// Longest sequence the positions allow.
    fn positions_max(&self) -> usize;

    /// Whether there is a multi-token prediction head to draft with.
    fn has_draft(&self) -> bool;

    /// Tokens per cache page.
    fn page_tokens(&self) -> usize;

    /// Bytes of cache per token.
    fn token_bytes(&self) -> usize;

    /// Routed experts that had any row, summed over layers and calls of [`Decoder::forward`] on `cache`; 0 without experts.
    fn experts_read(&self, _cache: &Self::Cache) -> u64 {
        0
    }

    /// An empty cache of `pages` pages.
    fn cache(&self, pages: usize) -> Self::Cache;

    /// Starts an empty sequence.
    fn add(&self, cache: &mut Self::Cache) -> usize;

    /// Starts a sequence that shares the first `len` tokens of `seq`.
    ///
    /// # Errors
    /// [`Error::Model`] when the pages do not suffice.
    fn fork(&self, cache: &mut Self::Cache, seq: usize, len: usize) -> Result<usize, Error>;

    /// Ends a sequence and frees its pages.
    fn remove(&self, cache: &mut Self::Cache, seq: usize);

    /// Forgets all but the first `len` tokens.
    fn truncate(&self, cache: &mut Self::Cache, seq: usize, len: usize);

    /// Appends tokens and returns their final hidden states `[rows, d]`, rows in the order of the steps.
    ///
    /// # Errors
    /// [`Error::Model`] when a step does not fit the model or the cache.
    fn forward(&self, cache: &mut Self::Cache, steps: &[Step<'_>]) -> Result<Tensor, Error>;

    /// Appends to the drafting head's cache: for each row the main model's hidden state at a position and the id that
    /// follows it. Returns `[rows, d]`, ready for [`Decoder::logits`], about the id after that.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    fn draft(&self, cache: &mut Self::Cache, hidden: &Tensor, steps: &[Step<'_>]) -> Result<Tensor, Error>;

    /// Reads whole texts that nothing will follow; returns their final hidden states `[rows, d]`, text by text. May be
    /// faster than [`Decoder::forward`] and differ from it by rounding.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    fn read(&self, texts: &[&[u32]]) -> Result<Tensor, Error> {
        let pages = texts.iter().map(|text| text.len().div_ceil(self.page_tokens())).sum();
        let mut cache = self.cache(pages);
        let texts: Vec<&[u32]> = texts.iter().copied().filter(|text| !text.is_empty()).collect();
        let steps: Vec<Step<'_>> = texts.iter().map(|ids| Step { seq: self.add(&mut cache), ids }).collect();
        self.forward(&mut cache, &steps)
    }

    /// `[rows, d]` to `[rows, vocab_size]`, F32.
    fn logits(&self, hidden: &Tensor) -> Tensor;
}
