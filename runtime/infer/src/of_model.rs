//! [`dsv3_model::Model`] as a [`Decoder`]; its cache holds latents of [`Model::latents`].

use std::collections::BTreeMap;

use dsv3_model::{Batch, LatentCache, Model, MtpStep, PAGE_TOKENS, SeqId, SeqStep, TrainOptions};
use dsv3_ops::{Spans, Tape, Tensor};

use crate::{Decoder, Error, Step};

/// The latent cache with the scheduler's names of its sequences.
#[derive(Debug)]
pub struct ModelCache {
    latents: LatentCache,
    names: BTreeMap<usize, SeqId>,
    next: usize,
}

impl ModelCache {
    fn insert(&mut self, seq: SeqId) -> usize {
        self.next += 1;
        self.names.insert(self.next, seq);
        self.next
    }

    fn seq(&self, name: usize) -> Result<SeqId, Error> {
        let unknown = || dsv3_model::Error::Cache { what: format!("no sequence {name}") };
        self.names.get(&name).copied().ok_or_else(|| Error::Model(unknown()))
    }
}

impl Decoder for Model {
    type Cache = ModelCache;

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn positions_max(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn has_draft(&self) -> bool {
        self.config.num_nextn_predict_layers > 0
    }

    fn page_tokens(&self) -> usize {
        PAGE_TOKENS
    }

    fn token_bytes(&self) -> usize {
        LatentCache::token_bytes(self, self.latents())
    }

    fn experts_read(&self, cache: &ModelCache) -> u64 {
        cache.latents.experts_read()
    }

    fn cache(&self, pages: usize) -> ModelCache {
        ModelCache { latents: LatentCache::new(self, pages, self.latents()), names: BTreeMap::new(), next: 0 }
    }

    fn add(&self, cache: &mut ModelCache) -> usize {
        let seq = cache.latents.start();
        cache.insert(seq)
    }

    fn fork(&self, cache: &mut ModelCache, seq: usize, len: usize) -> Result<usize, Error> {
        let seq = cache.seq(seq)?;
        let fork = cache.latents.fork(seq, len).map_err(Error::Model)?;
        Ok(cache.insert(fork))
    }

    fn remove(&self, cache: &mut ModelCache, seq: usize) {
        if let Some(seq) = cache.names.remove(&seq) {
            cache.latents.release(seq);
        }
    }

    fn truncate(&self, cache: &mut ModelCache, seq: usize, len: usize) {
        if let Some(seq) = cache.names.get(&seq) {
            cache.latents.truncate(*seq, len);
        }
    }

    fn forward(&self, cache: &mut ModelCache, steps: &[Step<'_>]) -> Result<Tensor, Error> {
        let mut rows = Vec::with_capacity(steps.len());
        for step in steps {
            rows.push(SeqStep { seq: cache.seq(step.seq)?, ids: step.ids });
        }
        self.forward_cached(&mut cache.latents, &rows).map_err(Error::Model)
    }

    fn draft(&self, cache: &mut ModelCache, hidden: &Tensor, steps: &[Step<'_>]) -> Result<Tensor, Error> {
        let (d, mut rest) = (hidden.cols(), hidden.as_f32());
        let mut rows = Vec::with_capacity(steps.len());
        for step in steps {
            let (own, after) = rest.split_at(step.ids.len() * d);
            rest = after;
            rows.push(MtpStep { seq: cache.seq(step.seq)?, hidden: own, ids: step.ids });
        }
        self.forward_mtp_cached(&mut cache.latents, 0, &rows).map_err(Error::Model)
    }

    /// The training form: attention over expanded keys, which for whole texts is less work than over latents.
    fn read(&self, texts: &[&[u32]]) -> Result<Tensor, Error> {
        let ids = texts.concat();
        let targets = vec![Batch::NO_TARGET; ids.len()].into();
        let spans = Spans::from_lens(texts.iter().map(|text| text.len()).filter(|len| *len > 0));
        let options = TrainOptions { mtp: false, balance: false, ..TrainOptions::default() };
        let batch = Batch { ids, spans, targets };
        let out = self.forward_train(&mut Tape::inference(), &batch, options).map_err(Error::Model)?;
        Ok(out.hidden.value)
    }

    fn logits(&self, hidden: &Tensor) -> Tensor {
        Model::logits(self, hidden)
    }
}
