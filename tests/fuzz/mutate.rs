//! Seeded changes of an input: what a fuzzer without feedback does.

use dsv3_core::Rng;

/// Pieces that parsers stumble over.
const PIECES: [&[u8]; 26] = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e308",
    b"-0.0",
    b"18446744073709551615",
    b"9223372036854775808",
    b"1e400",
    b"NaN",
    b"\"\"",
    b"{}",
    b"[]",
    b"{",
    b"[",
    b"\"",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"&a [*a]",
    b"<<: *a",
    b"\t",
    b"...",
    b"---\n",
    b"${params.x}",
];

/// One to four changes of `bytes`; `other` lends its end or a part.
pub(crate) fn mutate(mut bytes: Vec<u8>, other: &[u8], rng: &mut Rng) -> Vec<u8> {
    for _ in 0..=rng.below(4) {
        let at = rng.below(bytes.len() as u64 + 1) as usize;
        let most = 1 << rng.below(8);
        let length = (1 + rng.below(most) as usize).min(bytes.len() - at);
        match rng.below(10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            1 if at < bytes.len() => bytes[at] = rng.below(256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let copy = bytes[at..at + length].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                let piece = PIECES[rng.below(PIECES.len() as u64) as usize];
                bytes.splice(at..at, piece.iter().copied());
            }
            6 => {
                let from = rng.below(other.len() as u64 + 1) as usize;
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            7 => {
                let from = rng.below(other.len() as u64 + 1) as usize;
                let to = (from + length).min(other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            8 => number(&mut bytes, at, rng),
            _ => word(&mut bytes, at, rng),
        }
    }
    bytes
}

/// Gives the first number at or behind `at` another value.
fn number(bytes: &mut Vec<u8>, at: usize, rng: &mut Rng) {
    const VALUES: [&str; 10] = [
        "0",
        "1",
        "-1",
        "2147483648",
        "4294967296",
        "9223372036854775807",
        "18446744073709551616",
        "1e9",
        "0.5",
        "1e999",
    ];
    let Some(from) = bytes[at..].iter().position(u8::is_ascii_digit).map(|offset| at + offset) else { return };
    let to = bytes[from..].iter().position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |offset| from + offset);
    let value = VALUES[rng.below(VALUES.len() as u64) as usize];
    bytes.splice(from..to, value.bytes());
}

/// Replaces what stands between two quotes, or the eight bytes at `at`, which in binary files are a length.
fn word(bytes: &mut Vec<u8>, at: usize, rng: &mut Rng) {
    let quote =
        |from: usize, bytes: &[u8]| bytes[from..].iter().position(|byte| *byte == b'"').map(|found| from + found);
    if rng.below(2) == 0 {
        let to = (at + 8).min(bytes.len());
        let value = [0, 1, 8, u64::MAX, u64::MAX >> 1, bytes.len() as u64][rng.below(6) as usize];
        bytes.splice(at..to, value.to_le_bytes());
    } else if let Some(open) = quote(at, bytes)
        && let Some(close) = quote(open + 1, bytes)
    {
        let piece = PIECES[rng.below(PIECES.len() as u64) as usize];
        bytes.splice(open + 1..close, piece.iter().copied());
    }
}
