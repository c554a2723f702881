//! Right operands that are packed once and multiplied many times.
//!
//! Layout: `[⌈n / 32⌉][k][32]`, zero past column n: what the micro-kernel reads, so no product packs them again.

use std::ops::Range;

use crate::Tensor;
use crate::gemm::{Mat, PANEL, Right};
use crate::isa::Isa;
use crate::vector::scratch;

/// A packed `[k, n]` matrix. Products may use its first rows only.
#[derive(Debug)]
pub(crate) struct Panels {
    k: usize,
    n: usize,
    data: Tensor,
}

impl Panels {
    /// Packs `source` `[k, n]`.
    pub(crate) fn new(source: Mat<'_>, k: usize, n: usize) -> Self {
        let mut data = scratch(n.div_ceil(PANEL) * k * PANEL);
        if k > 0 {
            for (panel, out) in data.as_f32_mut().chunks_exact_mut(k * PANEL).enumerate() {
                source.pack(Isa::best(), 0..k, panel * PANEL..n.min((panel + 1) * PANEL), out);
            }
        }
        Self { k, n, data }
    }
}

impl Right for Panels {
    fn holds(&self, k: usize, n: usize) -> bool {
        k <= self.k && n <= self.n
    }

    fn in_place(&self, ks: Range<usize>, cols: Range<usize>, _once: bool) -> Option<(&[f32], usize)> {
        let panel = cols.start / PANEL * self.k;
        Some((&self.data.as_f32()[(panel + ks.start) * PANEL..(panel + ks.end) * PANEL], PANEL))
    }

    fn pack(&self, _isa: Isa, ks: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        if let Some((data, _)) = self.in_place(ks, cols, false) {
            out.copy_from_slice(data);
        }
    }
}
