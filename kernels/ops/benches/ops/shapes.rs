//! Sizes of `demo`, `S` and `M` (`dsv3_estimate::named`), as far as an op sees them.

/// Sizes of one block and of the batch it is trained on.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) sequences: usize,
    pub(crate) length: usize,
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) dense: usize,
    pub(crate) expert: usize,
    pub(crate) experts: usize,
    pub(crate) heads: usize,
    pub(crate) kv_rank: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) value: usize,
}

impl Shape {
    pub(crate) fn tokens(&self) -> usize {
        self.sequences * self.length
    }
}

/// Experts a token is sent to, in all of them.
pub(crate) const TOP_K: usize = 4;

pub(crate) const ALL: [Shape; 3] = [
    Shape {
        name: "demo",
        sequences: 8,
        length: 128,
        vocab: 704,
        hidden: 128,
        dense: 256,
        expert: 32,
        experts: 16,
        heads: 4,
        kv_rank: 64,
        nope: 16,
        rope: 32,
        value: 32,
    },
    Shape {
        name: "S",
        sequences: 16,
        length: 256,
        vocab: 4096,
        hidden: 256,
        dense: 704,
        expert: 128,
        experts: 16,
        heads: 8,
        kv_rank: 64,
        nope: 32,
        rope: 16,
        value: 32,
    },
    Shape {
        name: "M",
        sequences: 4,
        length: 512,
        vocab: 16_384,
        hidden: 512,
        dense: 1408,
        expert: 192,
        experts: 32,
        heads: 8,
        kv_rank: 128,
        nope: 64,
        rope: 32,
        value: 64,
    },
];
