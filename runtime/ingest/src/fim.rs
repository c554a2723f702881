//! Fill in the middle, form PSM: `begin prefix hole suffix end middle`, so that the model learns to write the middle from
//! both sides. Applied to whole documents before packing (DeepSeek-V3 report 4.1, rate 0.1).

use dsv3_core::Rng;
use dsv3_data::Specials;

/// The three marks of FIM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FimTokens {
    /// Before the prefix.
    pub begin: u32,
    /// Between prefix and suffix.
    pub hole: u32,
    /// Before the middle.
    pub end: u32,
}

impl FimTokens {
    /// The marks of a tokenizer, if it has all three.
    pub fn of(specials: &Specials) -> Option<Self> {
        Some(Self { begin: specials.fim_begin?, hole: specials.fim_hole?, end: specials.fim_end? })
    }
}

/// Shorter documents have no useful middle.
const DOCUMENT_TOKENS_MIN: usize = 8;

/// Rearranges a document around a middle drawn from `rng`; returns `None` when it is too short.
pub fn fim_psm(ids: &[u32], marks: FimTokens, rng: &mut Rng) -> Option<Vec<u32>> {
    if ids.len() < DOCUMENT_TOKENS_MIN {
        return None;
    }
    // Two distinct cuts in 1..len, so that prefix, middle and suffix all hold a token.
    let first = 1 + rng.below(ids.len() as u64 - 1);
    let mut second = 1 + rng.below(ids.len() as u64 - 2);
    second += u64::from(second >= first);
    let (a, b) = (first.min(second) as usize, first.max(second) as usize);
    let mut out = Vec::with_capacity(ids.len() + 3);
    out.push(marks.begin);
    out.extend_from_slice(&ids[..a]);
    out.push(marks.hole);
    out.extend_from_slice(&ids[b..]);
    out.push(marks.end);
    out.extend_from_slice(&ids[a..b]);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_put_together_are_the_document() {
        let marks = FimTokens { begin: 100, hole: 101, end: 102 };
        let ids: Vec<u32> = (0..20).collect();
        let mut rng = Rng::new(3);
        for _ in 0..200 {
            let out = fim_psm(&ids, marks, &mut rng).unwrap();
            let at = |mark| out.iter().position(|id| *id == mark).unwrap();
            let (hole, end) = (at(101), at(102));
            let (prefix, suffix, middle) = (&out[1..hole], &out[hole + 1..end], &out[end + 1..]);
            assert!(out[0] == 100 && !prefix.is_empty() && !suffix.is_empty() && !middle.is_empty());
            assert_eq!([prefix, middle, suffix].concat(), ids);
        }
        assert!(fim_psm(&ids[..7], marks, &mut rng).is_none());
    }
}
