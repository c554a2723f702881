//! Paged cache of latents: per token and layer one row `[c (rank) ; k^R (dr)]`, post-norm and rotated.
//!
//! A page is [`PAGE_TOKENS`] consecutive positions of one sequence in *every* layer, prediction modules included, so a
//! sequence has one page table. Pages are counted: [`LatentCache::fork`] shares the full pages of a prefix and copies the
//! rest. Row i of prediction module k depends on token i + k (1-based k), so a page is shared only when every token its
//! rows depend on is part of the prefix.
//!
//! **Invariant**: the rows below a sequence's length are a function of its tokens alone; nobody writes a shared page.

use std::collections::BTreeMap;

use dsv3_ops::mla_decode::Page;
use half::bf16;

use crate::{Error, Model};

/// Positions per page. Results depend on it (attention walks page by page), so it is not an option.
pub const PAGE_TOKENS: usize = 32;

/// Element type of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LatentType {
    /// 4 bytes.
    F32,
    /// 2 bytes; rows are rounded when written.
    #[default]
    Bf16,
}

/// A sequence in a cache; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(u64);

/// One layer's rows of all pages.
#[derive(Debug)]
enum Rows {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

#[derive(Clone, Debug)]
struct Sequence {
    pages: Vec<u32>,
    len: usize,
    /// Rows of each prediction module.
    mtp_lens: Vec<usize>,
}

/// The pool and the page tables of its sequences.
#[derive(Debug)]
pub struct LatentCache {
    width: usize,
    layers: Vec<Rows>,
    free: Vec<u32>,
    owners: Vec<u32>,
    sequences: BTreeMap<SeqId, Sequence>,
    modules: usize,
    next: u64,
    experts_read: u64,
}

impl LatentCache {
    /// A pool of `pages` pages for `model`.
    pub fn new(model: &Model, pages: usize, kind: LatentType) -> Self {
        let config = &model.config;
        let width = config.kv_lora_rank + config.qk_rope_head_dim;
        let modules = config.num_nextn_predict_layers;
        let len = pages * PAGE_TOKENS * width;
        let rows = |_| match kind {
            LatentType::F32 => Rows::F32(vec![0.0; len]),
            LatentType::Bf16 => Rows::Bf16(vec![bf16::ZERO; len]),
        };
        Self {
            width,
            layers: (0..config.num_hidden_layers + modules).map(rows).collect(),
            free: (0..pages as u32).rev().collect(),
            owners: vec![0; pages],
            sequences: BTreeMap::new(),
            modules,
            next: 0,
            experts_read: 0,
        }
    }

    /// A pool that holds `sequences` sequences of up to `tokens` tokens.
    pub fn for_tokens(model: &Model, sequences: usize, tokens: usize, kind: LatentType) -> Self {
        Self::new(model, sequences * tokens.div_ceil(PAGE_TOKENS), kind)
    }

    /// Bytes one token takes in all layers.
    pub fn token_bytes(model: &Model, kind: LatentType) -> usize {
        let config = &model.config;
        let size = if kind == LatentType::F32 { 4 } else { 2 };
        let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
        (config.kv_lora_rank + config.qk_rope_head_dim) * layers * size
    }

    /// Bytes of all pages in all layers, as allocated.
    pub fn bytes(&self) -> usize {
        let bytes = |rows: &Rows| match rows {
            Rows::F32(data) => size_of_val(&data[..]),
            Rows::Bf16(data) => size_of_val(&data[..]),
        };
        self.layers.iter().map(bytes).sum()
    }

    /// A new, empty sequence; takes no page yet.
    pub fn start(&mut self) -> SeqId {
        self.insert(Sequence { pages: Vec::new(), len: 0, mtp_lens: vec![0; self.modules] })
    }

    fn insert(&mut self, sequence: Sequence) -> SeqId {
        let id = SeqId(self.next);
        self.next += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// Gives back a sequence's pages. An unknown sequence is ignored.
    pub fn release(&mut self, seq: SeqId) {
        if let Some(sequence) = self.sequences.remove(&seq) {
            sequence.pages.into_iter().for_each(|page| self.drop_page(page));
        }
    }

    /// Tokens of a sequence; 0 when it is unknown.
    pub fn len(&self, seq: SeqId) -> usize {
        self.sequences.get(&seq).map_or(0, |sequence| sequence.len)
    }

    /// Whether no sequence lives.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Rows of prediction module `module` (from 0) of a sequence.
    pub fn mtp_len(&self, seq: SeqId, module: usize) -> usize {
        self.sequences.get(&seq).and_then(|sequence| sequence.mtp_lens.get(module).copied()).unwrap_or(0)
    }

    /// Routed experts that had any row, summed over layers and calls of the model on this cache: how often the weights of
    /// one expert were read.
    pub fn experts_read(&self) -> u64 {
        self.experts_read
    }

    /// Counts experts that had rows in one layer.
    pub(crate) fn count_experts(&mut self, count: usize) {
        self.experts_read += count as u64;
    }

    /// Pages nobody owns.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// All pages.
    pub fn total_pages(&self) -> usize {
        self.owners.len()
    }

    /// New pages `seq` needs to take `count` more tokens.
    pub fn pages_needed(&self, seq: SeqId, count: usize) -> usize {
        let pages = self.sequences.get(&seq).map_or(0, |sequence| sequence.pages.len());
        (self.len(seq) + count).div_ceil(PAGE_TOKENS).saturating_sub(pages)
    }

    /// Shortens `seq` to `len` tokens (no effect when it is not longer) and gives back the pages behind. Rows of
    /// prediction modules that depended on a removed token go too.
    pub fn truncate(&mut self, seq: SeqId, len: usize) {
        let Some(sequence) = self.sequences.get_mut(&seq).filter(|sequence| sequence.len > len) else { return };
        let dropped = sequence.pages.split_off(len.div_ceil(PAGE_TOKENS).min(sequence.pages.len()));
        shorten(sequence, len);
        dropped.into_iter().for_each(|page| self.drop_page(page));
    }

    /// A new sequence whose first `len` tokens are those of `seq`. To go on speculating, fork one token short of the
    /// shared prefix and feed that token again: the prediction modules need its hidden state.
    ///
    /// # Errors
    /// When `seq` is unknown or shorter, or the pool has no page for the part that must be copied.
    pub fn fork(&mut self, seq: SeqId, len: usize) -> Result<SeqId, Error> {
        let source = self.sequence(seq)?;
        if len > source.len {
            return Err(Error::Cache { what: format!("a fork at {len} of a sequence of {} tokens", source.len) });
        }
        let mut fork = source.clone();
        let shared = len.saturating_sub(self.modules) / PAGE_TOKENS;
        fork.pages.truncate(len.div_ceil(PAGE_TOKENS));
        let copied = fork.pages.split_off(shared.min(fork.pages.len()));
        if copied.len() > self.free.len() {
            let what = format!("{} pages are needed, {} are free", copied.len(), self.free.len());
            return Err(Error::Cache { what });
        }
        fork.pages.iter().for_each(|page| self.owners[*page as usize] += 1);
        for from in copied {
            let to = self.take_page()?;
            self.copy_page(from, to);
            fork.pages.push(to);
        }
        shorten(&mut fork, len);
        Ok(self.insert(fork))
    }

    fn copy_page(&mut self, from: u32, to: u32) {
        let len = PAGE_TOKENS * self.width;
        let (from, to) = (from as usize * len, to as usize * len);
        for rows in &mut self.layers {
            match rows {
                Rows::F32(data) => data.copy_within(from..from + len, to),
                Rows::Bf16(data) => data.copy_within(from..from + len, to),
            }
        }
    }

    fn take_page(&mut self) -> Result<u32, Error> {
        let page = self.free.pop().ok_or_else(|| Error::Cache { what: "no page is free".to_owned() })?;
        self.owners[page as usize] = 1;
        Ok(page)
    }

    fn drop_page(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.push(page);
        }
    }

    fn sequence(&self, seq: SeqId) -> Result<&Sequence, Error> {
        self.sequences.get(&seq).ok_or_else(|| Error::Cache { what: format!("sequence {} is unknown", seq.0) })
    }

    /// Makes room for `counts` more tokens of each sequence, or changes nothing.
    pub(crate) fn reserve(&mut self, counts: &[(SeqId, usize)]) -> Result<(), Error> {
        let mut needed = 0;
        for (i, (seq, count)) in counts.iter().enumerate() {
            self.sequence(*seq)?;
            if counts[..i].iter().any(|(other, _)| other == seq) {
                return Err(Error::Cache { what: format!("sequence {} is twice in a batch", seq.0) });
            }
            needed += self.pages_needed(*seq, *count);
        }
        if needed > self.free.len() {
            return Err(Error::Cache { what: format!("{needed} pages are needed, {} are free", self.free.len()) });
        }
        for (seq, count) in counts {
            for _ in 0..self.pages_needed(*seq, *count) {
                let page = self.take_page()?;
                self.sequences.entry(*seq).and_modify(|sequence| sequence.pages.push(page));
            }
        }
        Ok(())
    }

    /// Counts written rows of the main layers.
    pub(crate) fn advance(&mut self, seq: SeqId, count: usize) {
        self.sequences.entry(seq).and_modify(|sequence| sequence.len += count);
    }

    /// Counts written rows of one prediction module.
    pub(crate) fn advance_mtp(&mut self, seq: SeqId, module: usize, count: usize) {
        self.sequences.entry(seq).and_modify(|sequence| sequence.mtp_lens[module] += count);
    }

    /// Writes the row of one position in one layer: `c` then `k_rope`.
    pub(crate) fn write(&mut self, layer: usize, seq: SeqId, position: usize, c: &[f32], k_rope: &[f32]) {
        let page = self.sequences[&seq].pages[position / PAGE_TOKENS] as usize;
        let at = (page * PAGE_TOKENS + position % PAGE_TOKENS) * self.width;
        match &mut self.layers[layer] {
            Rows::F32(data) => {
                data[at..at + c.len()].copy_from_slice(c);
                data[at + c.len()..at + self.width].copy_from_slice(k_rope);
            }
            Rows::Bf16(data) => {
                let values = c.iter().chain(k_rope);
                data[at..at + self.width].iter_mut().zip(values).for_each(|(to, from)| *to = bf16::from_f32(*from));
            }
        }
    }

    /// A sequence's pages in one layer.
    pub(crate) fn pages(&self, layer: usize, seq: SeqId) -> Vec<Page<'_>> {
        let len = PAGE_TOKENS * self.width;
        let pages = self.sequences[&seq].pages.iter().map(|page| *page as usize * len);
        match &self.layers[layer] {
            Rows::F32(data) => pages.map(|at| Page::F32(&data[at..at + len])).collect(),
            Rows::Bf16(data) => pages.map(|at| Page::Bf16(&data[at..at + len])).collect(),
        }
    }
}

fn shorten(sequence: &mut Sequence, len: usize) {
    sequence.len = len;
    for (module, rows) in sequence.mtp_lens.iter_mut().enumerate() {
        *rows = (*rows).min(len.saturating_sub(module + 1));
    }
}
