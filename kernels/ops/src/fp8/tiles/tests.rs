//! Tiles against their definition, on every instruction set.

use super::*;
use crate::{
    gemm::{Form, pair},
    isa::Isa,
    testing::values,
};

const ENCODINGS: [Encoding; 2] = [Encoding::E4m3, Encoding::E5m2];
const KINDS: [Fp8Scales; 2] = [Fp8Scales::F32, Fp8Scales::Ue8m0];

/// One tile by its definition.
fn plain(tile: &[f32], encoding: Encoding, kind: Fp8Scales) -> (f32, Vec<u8>) {
    let amax = tile.iter().fold(0f32, |acc, x| acc.max(x.abs()));
    let top = encoding.top();
    if amax == 0.0 {
        return (1.0, tile.iter().map(|x| encoding.encode(*x)).collect());
    }
    match kind {
        Fp8Scales::F32 => (amax / top, tile.iter().map(|x| encoding.encode(x * (top / amax))).collect()),
        Fp8Scales::Ue8m0 => {
            let scale = f64::from(amax / top).log2().ceil().exp2() as f32;
            (scale, tile.iter().map(|x| encoding.encode(x / scale)).collect())
        }
    }
}

#[test]
fn every_instruction_set_rounds_tiles_by_the_definition() {
    for (rows, cols) in [(1, 1), (3, 300), (130, 17), (257, 40), (40, 520)] {
        let mut x = values(&[rows, cols], 9).into_f32();
        for (i, x) in x.iter_mut().enumerate() {
            // Magnitudes over many binades, and some tiles of zeros.
            *x *= if (i / 700) % 3 == 1 { 0.0 } else { 2f32.powi((i % 41) as i32 - 20) };
        }
        let offsets = [0, rows / 3, rows / 3, rows];
        let fill: Fill<'_> = &|range, out| out.copy_from_slice(&x[range]);
        for (isa, encoding, kind) in Isa::all()
            .into_iter()
            .flat_map(|isa| ENCODINGS.map(|e| (isa, e)))
            .flat_map(|(isa, e)| KINDS.map(|kind| (isa, e, kind)))
        {
            let rule = |view| Rule { encoding, scales: kind, view };
            let mut codes = vec![0; x.len()];
            let rounded = |view: View, codes: &mut [u8]| {
                let mut words = vec![0.0; rows * view.words(cols)];
                let mut scales = vec![0.0; rows * cols.div_ceil(TILE)];
                let out = Rounded { words: &mut words, codes, scales: &mut scales };
                round_rows(isa, Source::Computed(fill), rows, cols, rule(view), out);
                (words, scales)
            };
            let (out, scales) = rounded(View::Values, &mut codes);
            let tiles = x.chunks(cols).flat_map(|row| row.chunks(TILE));
            let code_tiles = codes.chunks(cols).flat_map(|row| row.chunks(TILE));
            for ((tile, codes), scale) in tiles.zip(code_tiles).zip(&scales) {
                assert_eq!((*scale, codes.to_vec()), plain(tile, encoding, kind), "{isa:?} {encoding:?} {kind:?}");
            }
            assert_eq!(rounded(View::Values, &mut []), (out, scales));
            let value = |code: Option<&u8>| code.map_or(0.0, |code| encoding.decode(*code));
            let (words, _) = rounded(View::Words(Form::F32), &mut []);
            assert_eq!(words, codes.iter().map(|code| value(Some(code))).collect::<Vec<_>>());
            let (words, _) = rounded(View::Words(Form::Pairs), &mut []);
            let pairs = codes.chunks(cols).flat_map(|row| row.chunks(2));
            let pairs: Vec<_> = pairs.map(|two| pair(value(two.first()), value(two.get(1))).to_bits()).collect();
            assert_eq!(words.iter().map(|word| word.to_bits()).collect::<Vec<_>>(), pairs);

            let rounded = |view: View, codes: &mut [u8]| {
                let word_rows = tile_rows(&offsets).map(|range| view.words(range.len())).sum::<usize>();
                let mut words = vec![0.0; word_rows * cols];
                let mut scales = vec![0.0; tile_rows(&offsets).count() * cols];
                let out = Rounded { words: &mut words, codes, scales: &mut scales };
                round_columns(isa, Source::Plain(&x), cols, &offsets, rule(view), out);
                (words, scales)
            };
            let (out, scales) = rounded(View::Values, &mut codes);
            let mut pairs = Vec::new();
            for (range, scales) in tile_rows(&offsets).zip(scales.chunks(cols)) {
                for col in 0..cols {
                    let column = |of: &[f32]| range.clone().map(|row| of[row * cols + col]).collect::<Vec<_>>();
                    let column_codes: Vec<u8> = range.clone().map(|row| codes[row * cols + col]).collect();
                    assert_eq!((scales[col], column_codes.clone()), plain(&column(&x), encoding, kind));
                    let decoded: Vec<f32> = column_codes.iter().map(|c| encoding.decode(*c) * scales[col]).collect();
                    assert_eq!(column(&out), decoded);
                }
                for row in range.clone().step_by(2) {
                    let code = |row: usize, col| value(codes[..range.end * cols].get(row * cols + col));
                    pairs.extend((0..cols).map(|col| pair(code(row, col), code(row + 1, col)).to_bits()));
                }
            }
            assert_eq!(rounded(View::Values, &mut []).0, out);
            let (words, _) = rounded(View::Words(Form::F32), &mut []);
            assert_eq!(words, codes.iter().map(|code| value(Some(code))).collect::<Vec<_>>());
            let (words, _) = rounded(View::Words(Form::Pairs), &mut []);
            assert_eq!(words.iter().map(|word| word.to_bits()).collect::<Vec<_>>(), pairs);
        }
    }
}

#[test]
fn the_tiniest_tiles_stay_finite_and_nan_stays_nan() {
    let values = |x: &[f32], encoding, scales| {
        let rule = Rule { encoding, scales, view: View::Values };
        let (mut words, mut scales) = (vec![0.0; x.len()], [0.0]);
        let out = Rounded { words: &mut words, codes: &mut [], scales: &mut scales };
        round_rows(Isa::best(), Source::Plain(x), 1, x.len(), rule, out);
        words
    };
    for tiny in [1e-38f32, f32::from_bits(1), f32::MIN_POSITIVE] {
        for (encoding, kind) in ENCODINGS.into_iter().flat_map(|e| KINDS.map(|k| (e, k))) {
            let out = values(&[tiny, 0.0, -0.0], encoding, kind);
            assert!(out.iter().all(|x| x.is_finite()), "{tiny:e} {encoding:?} {kind:?}: {out:?}");
        }
    }
    let out = values(&[f32::NAN, 1.0], Encoding::E4m3, Fp8Scales::F32);
    assert!(out[0].is_nan() && out[1] == 1.0);
}
