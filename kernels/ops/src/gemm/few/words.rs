//! A panel's block of two inputs as vectors of pairs: dwords with the BF16 value of k in the upper half and that of k + 1 in
//! the lower one, the 32 outputs in order.
//!
//! BF16 elements lie so. FP8 codes are looked up, all 64 of a block at once: the lower and the upper bytes of their BF16
//! values, which are then interleaved. AVX-512 VBMI has tables of 128 bytes, one entry for each magnitude. AVX2 has tables of
//! 16, so a magnitude is cut into its upper three bits, the group, and its lower four. Within the groups 1 to 6 of both
//! encodings a byte is an entry for the group xor one for the lower bits; group 0, with the subnormal numbers, and
//! group 7, with what is not finite, correct that by an entry of their own.
//!
//! SAFETY, for the whole file: functions are called from ones that are compiled for their features.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::super::PANEL;
use super::super::kernel::{Lanes, Ymm, Zmm};
use crate::fp8::Encoding;

/// Words as lanes.
pub(super) trait Wide: Lanes {
    /// f32 of the upper halves.
    unsafe fn upper(self) -> Self;
    /// f32 of the lower halves.
    unsafe fn lower(self) -> Self;
}

impl Wide for Zmm {
    #[inline(always)]
    unsafe fn upper(self) -> Self {
        // SAFETY: see the file.
        unsafe {
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            Self(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(self.0), mask)))
        }
    }

    #[inline(always)]
    unsafe fn lower(self) -> Self {
        // SAFETY: see the file.
        unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(self.0)))) }
    }
}

impl Wide for Ymm {
    #[inline(always)]
    unsafe fn upper(self) -> Self {
        // SAFETY: see the file.
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            Self(_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(self.0), mask)))
        }
    }

    #[inline(always)]
    unsafe fn lower(self) -> Self {
        // SAFETY: see the file.
        unsafe { Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(self.0)))) }
    }
}

/// Blocks of a panel, each as N vectors.
pub(super) trait Words<L, const N: usize>: Copy {
    /// Bytes of a block.
    const BYTES: usize;

    /// Where the blocks begin.
    fn start(self) -> *const u8;

    /// The block at `at`, which must be one of the panel's.
    unsafe fn read(self, at: *const u8) -> [L; N];
}

/// BF16 elements.
#[derive(Clone, Copy)]
pub(super) struct Stored(pub(super) *const u8);

impl<L: Lanes, const N: usize> Words<L, N> for Stored {
    const BYTES: usize = 4 * PANEL;

    #[inline(always)]
    fn start(self) -> *const u8 {
        self.0
    }

    #[inline(always)]
    unsafe fn read(self, at: *const u8) -> [L; N] {
        // SAFETY: see the file; a block has the bytes of N vectors.
        unsafe {
            let mut words = [L::zero(); N];
            for i in 0..N {
                words[i] = L::load(at.cast::<f32>().add(i * L::COUNT));
            }
            words
        }
    }
}

/// FP8 codes, by tables of 128 entries.
#[derive(Clone, Copy)]
pub(super) struct WideCodes {
    codes: *const u8,
    /// Of the lower and the upper byte.
    tables: [[__m512i; 2]; 2],
}

impl WideCodes {
    #[inline(always)]
    pub(super) unsafe fn new(codes: *const u8, encoding: Encoding) -> Self {
        // SAFETY: see the file; a table has two vectors.
        unsafe {
            let load = |bytes: &[u8; 128], at: usize| _mm512_loadu_si512(bytes.as_ptr().add(at).cast());
            let [lower, upper] = &Tables::of(encoding).whole;
            Self { codes, tables: [[load(lower, 0), load(lower, 64)], [load(upper, 0), load(upper, 64)]] }
        }
    }
}

impl Words<Zmm, 2> for WideCodes {
    const BYTES: usize = 2 * PANEL;

    #[inline(always)]
    fn start(self) -> *const u8 {
        self.codes
    }

    #[inline(always)]
    unsafe fn read(self, at: *const u8) -> [Zmm; 2] {
        let [low, high] = self.tables;
        // SAFETY: see the file; a block has the bytes of a vector.
        unsafe {
            let codes = _mm512_loadu_si512(at.cast());
            let lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
            let upper = _mm512_permutex2var_epi8(high[0], codes, high[1]);
            // upper | (codes & sign)
            let upper = _mm512_ternarylogic_epi32::<0xf8>(upper, codes, _mm512_set1_epi8(i8::MIN));
            let words = [_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)];
            [Zmm(_mm512_castsi512_ps(words[0])), Zmm(_mm512_castsi512_ps(words[1]))]
        }
    }
}

/// FP8 codes, by tables of 16 entries.
#[derive(Clone, Copy)]
pub(super) struct NarrowCodes {
    codes: *const u8,
    /// Of the group, for the upper byte; that of the lower one is 0.
    group: __m256i,
    /// Of the lower bits, for the lower and the upper byte.
    rest: [__m256i; 2],
    /// Corrections in group 0.
    first: [__m256i; 2],
    /// Corrections in group 7.
    last: [__m256i; 2],
}

impl NarrowCodes {
    #[inline(always)]
    pub(super) unsafe fn new(codes: *const u8, encoding: Encoding) -> Self {
        // SAFETY: see the file; a table has the bytes of half a vector.
        unsafe {
            let load = |bytes: &[u8; 16]| _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
            let Tables { group, rest, first, last, .. } = Tables::of(encoding);
            Self {
                codes,
                group: load(group),
                rest: [load(&rest[0]), load(&rest[1])],
                first: [load(&first[0]), load(&first[1])],
                last: [load(&last[0]), load(&last[1])],
            }
        }
    }

    /// Lower and upper bytes of 32 values.
    #[inline(always)]
    unsafe fn bytes(self, codes: __m256i) -> [__m256i; 2] {
        // SAFETY: see the file.
        unsafe {
            let rest = _mm256_and_si256(codes, _mm256_set1_epi8(15));
            let group = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), _mm256_set1_epi8(7));
            // A look-up with the highest bit set gives 0.
            let first = _mm256_or_si256(rest, _mm256_cmpgt_epi8(group, _mm256_setzero_si256()));
            let last = _mm256_or_si256(rest, _mm256_cmpgt_epi8(_mm256_set1_epi8(7), group));
            let byte = |of: usize| {
                let plain = _mm256_shuffle_epi8(self.rest[of], rest);
                let edges = _mm256_xor_si256(
                    _mm256_shuffle_epi8(self.first[of], first),
                    _mm256_shuffle_epi8(self.last[of], last),
                );
                _mm256_xor_si256(plain, edges)
            };
            let sign = _mm256_and_si256(codes, _mm256_set1_epi8(i8::MIN));
            let upper = _mm256_xor_si256(_mm256_shuffle_epi8(self.group, group), sign);
            [byte(0), _mm256_xor_si256(upper, byte(1))]
        }
    }
}

impl Words<Ymm, 4> for NarrowCodes {
    const BYTES: usize = 2 * PANEL;

    #[inline(always)]
    fn start(self) -> *const u8 {
        self.codes
    }

    #[inline(always)]
    unsafe fn read(self, at: *const u8) -> [Ymm; 4] {
        // SAFETY: see the file; a block has the bytes of two vectors.
        unsafe {
            let [l0, u0] = self.bytes(_mm256_loadu_si256(at.cast()));
            let [l1, u1] = self.bytes(_mm256_loadu_si256(at.add(PANEL).cast()));
            [
                Ymm(_mm256_castsi256_ps(_mm256_unpacklo_epi8(l0, u0))),
                Ymm(_mm256_castsi256_ps(_mm256_unpacklo_epi8(l1, u1))),
                Ymm(_mm256_castsi256_ps(_mm256_unpackhi_epi8(l0, u0))),
                Ymm(_mm256_castsi256_ps(_mm256_unpackhi_epi8(l1, u1))),
            ]
        }
    }
}

/// Bytes of the BF16 values of an encoding's magnitudes, lower and upper; and the same in pieces, as the file's head says.
struct Tables {
    whole: [[u8; 128]; 2],
    group: [u8; 16],
    rest: [[u8; 16]; 2],
    first: [[u8; 16]; 2],
    last: [[u8; 16]; 2],
}

impl Tables {
    fn of(encoding: Encoding) -> &'static Self {
        static TABLES: OnceLock<[Tables; 2]> = OnceLock::new();
        let [e4m3, e5m2] = TABLES.get_or_init(|| [Self::new(Encoding::E4m3), Self::new(Encoding::E5m2)]);
        match encoding {
            Encoding::E4m3 => e4m3,
            Encoding::E5m2 => e5m2,
        }
    }

    fn new(encoding: Encoding) -> Self {
        let bytes = |code: usize| ((encoding.decode(code as u8).to_bits() >> 16) as u16).to_le_bytes();
        let whole = [0, 1].map(|byte: usize| std::array::from_fn(|code| bytes(code)[byte]));
        let at = |byte: usize, group: usize, rest: usize| bytes(16 * group + rest)[byte];
        let rest = [0, 1].map(|byte| std::array::from_fn(|i| at(byte, 1, i) ^ at(byte, 1, 0)));
        let group = std::array::from_fn(|i| if i < 8 { at(1, i, 0) } else { 0 });
        let edge = |of: usize| {
            let groups = [0, group[of]];
            [0, 1].map(|byte| std::array::from_fn(|i| at(byte, of, i) ^ groups[byte] ^ rest[byte][i]))
        };
        Self { whole, group, rest, first: edge(0), last: edge(7) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_of_a_table_make_the_whole() {
        for encoding in [Encoding::E4m3, Encoding::E5m2] {
            let tables = Tables::new(encoding);
            for (code, byte) in (0..128).flat_map(|code| [(code, 0), (code, 1)]) {
                let (group, rest) = (code / 16, code % 16);
                let edge = match group {
                    0 => tables.first[byte][rest],
                    7 => tables.last[byte][rest],
                    _ => 0,
                };
                let of_group = if byte == 1 { tables.group[group] } else { 0 };
                assert_eq!(of_group ^ tables.rest[byte][rest] ^ edge, tables.whole[byte][code], "{encoding:?} {code}");
            }
        }
    }
}
