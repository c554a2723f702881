//! `train.safetensors`, records `fp8.*`: conversion tables, codes and scales bit for bit, and the three products of a
//! linear layer within 1e-6 relative in norm.
//!
//! A case is `fp8.CASE.{x,w,dy}` with results `fp8.CASE.RECIPE.*`; cases and recipes are read from the names. Where one
//! row or column of a result dwarfs the others, it is compared apart, or the others would not be seen.

use std::collections::BTreeSet;
use std::sync::Arc;

use dsv3_ops::fp8::Encoding;
use dsv3_ops::{Fp8, Fp8Format, Fp8Scales, Param, Precision, Tape, Tensor, Weight, WeightGrads, linear};

use super::records::{self, Check, Faults, Folder, Record};

const FILE: &str = "train.safetensors";
const PRODUCT_LIMIT: f64 = 1e-6;

pub(crate) const CHECKS: &[Check] = &[
    Check { file: FILE, records: &["fp8.table."], run: tables },
    Check { file: FILE, records: &["fp8."], run: codes },
    Check { file: FILE, records: &["fp8."], run: products },
];

#[test]
fn every_bf16_pattern_has_its_code() {
    records::verify(&records::set(), &CHECKS[..1]);
}

#[test]
fn codes_and_scales_are_bit_exact() {
    records::verify(&records::set(), &CHECKS[1..2]);
}

#[test]
fn products_agree() {
    records::verify(&records::set(), &CHECKS[2..]);
}

fn tables(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    for (format, record) in folder.under("fp8.table.") {
        let encoding = match format {
            "e4m3" => Encoding::E4m3,
            "e5m2" => Encoding::E5m2,
            other => {
                faults.push(format!("fp8.table.{other}: unknown format"));
                continue;
            }
        };
        for (bits, want) in record.bytes().into_iter().enumerate() {
            let value = f32::from_bits((bits as u32) << 16);
            let code = encoding.encode(value);
            let right = if value.is_nan() {
                encoding.decode(want).is_nan() && encoding.decode(code).is_nan()
            } else {
                code == want
            };
            if !right {
                faults.push(format!(
                    "fp8.table.{format}: {value} ({bits:#06x}) gives {code:#04x} instead of {want:#04x}"
                ));
            }
        }
    }
    faults
}

/// One case under one recipe.
struct Case<'a> {
    folder: &'a Folder,
    /// `fp8.CASE`.
    name: String,
    recipe: String,
    format: Fp8Format,
    scales: Fp8Scales,
}

impl Case<'_> {
    fn input(&self, operand: &str) -> Tensor {
        self.folder.get(&format!("{}.{operand}", self.name)).tensor()
    }

    fn result(&self, what: &str) -> Option<&Record> {
        self.folder.records.get(&format!("{}.{}.{what}", self.name, self.recipe))
    }
}

/// Every case and recipe of the file; an unknown recipe is a fault.
fn cases<'a>(folder: &'a Folder, faults: &mut Faults) -> Vec<Case<'a>> {
    let results: BTreeSet<(String, String)> = folder
        .under("fp8.")
        .filter_map(|(name, _)| {
            let (case, rest) = name.split_once('.')?;
            let (recipe, _) = rest.split_once('.')?;
            Some((case.to_owned(), recipe.to_owned()))
        })
        .collect();
    let mut cases = Vec::new();
    for (case, recipe) in results {
        let (format, scales) = match recipe.as_str() {
            "e4m3" => (Fp8Format::E4m3, Fp8Scales::F32),
            "hybrid" => (Fp8Format::Hybrid, Fp8Scales::F32),
            "ue8m0" => (Fp8Format::E4m3, Fp8Scales::Ue8m0),
            other => {
                faults.push(format!("fp8.{case}.{other}: unknown recipe"));
                continue;
            }
        };
        cases.push(Case { folder, name: format!("fp8.{case}"), recipe, format, scales });
    }
    cases
}

fn codes(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    for case in cases(folder, &mut faults) {
        let (x, w, dy) = (case.input("x"), case.input("w"), case.input("dy"));
        let (forward, backward) = (case.format.forward(), case.format.backward());
        let offsets: Arc<[usize]> = [0, x.rows()].into();
        let x_codes = Fp8::quantize_rows(&x, forward, case.scales);
        let again = x_codes.dequantize();
        let quantised = [
            ("xt", Fp8::quantize_columns(&again, &offsets, forward, case.scales)),
            ("x", x_codes),
            ("w", Fp8::quantize_blocks(&w, forward, case.scales)),
            ("dy", Fp8::quantize_rows(&dy, backward, case.scales)),
            ("dyt", Fp8::quantize_columns(&dy, &offsets, backward, case.scales)),
        ];
        for (operand, got) in quantised {
            let name = format!("{}.{}.{operand}", case.name, case.recipe);
            if let Some(want) = case.result(&format!("{operand}.codes")) {
                records::equal(&mut faults, &format!("{name}.codes"), got.codes.as_u8(), &want.bytes());
            }
            if let Some(want) = case.result(&format!("{operand}.scales")) {
                records::equal(&mut faults, &format!("{name}.scales"), got.scales.as_f32(), &want.f32s());
            }
        }
    }
    faults
}

/// y = x·wᵀ and, from dy, dx and dw.
fn products_of(x: &Tensor, w: &Tensor, dy: &Tensor, precision: Precision) -> [Tensor; 3] {
    let param = Param { id: 0, master: None, compute: Weight::encode(w, &precision) };
    let mut tape = Tape::new();
    let x = tape.leaf(x.clone());
    let y = linear::on_tape(&mut tape, &x, &param);
    let mut grads = WeightGrads::default();
    let dx = tape.backward(vec![(y.id(), dy.clone())], &mut grads).take(x.id()).expect("x is a leaf");
    let dw = grads.get(0).expect("w is a parameter").clone();
    [y.value, dx, dw]
}

fn products(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    for case in cases(folder, &mut faults) {
        let (x, w, dy) = (case.input("x"), case.input("w"), case.input("dy"));
        let precision = Precision::Fp8 { format: case.format, scales: case.scales };
        for (what, got) in ["y", "dx", "dw"].iter().zip(products_of(&x, &w, &dy, precision)) {
            if let Some(want) = case.result(what) {
                compare_parts(&mut faults, &format!("{}.{}.{what}", case.name, case.recipe), &got, want);
            }
        }
        let plain = products_of(&x, &w, &dy, Precision::F32);
        for (what, got) in ["y", "dx", "dw"].iter().zip(plain) {
            let name = format!("{}.{what}_unquantised", case.name);
            if let Some(want) = folder.records.get(&name) {
                compare_parts(&mut faults, &name, &got, want);
            }
        }
    }
    faults
}

/// Rows or columns this much larger than the median one are compared apart.
const DWARFING: f64 = 30.0;

fn compare_parts(faults: &mut Faults, name: &str, got: &Tensor, want: &Record) {
    let cols = want.shape[1];
    let square = |indices: &mut dyn Iterator<Item = usize>| indices.map(|i| want.values[i].powi(2)).sum::<f64>();
    let rows = want.values.len() / cols;
    let row_norms: Vec<f64> = (0..rows).map(|r| square(&mut (r * cols..(r + 1) * cols)).sqrt()).collect();
    let col_norms: Vec<f64> = (0..cols).map(|c| square(&mut (0..rows).map(|r| r * cols + c)).sqrt()).collect();
    let large = |norms: &[f64]| -> Vec<bool> {
        let mut sorted = norms.to_vec();
        sorted.sort_by(f64::total_cmp);
        norms.iter().map(|norm| *norm > DWARFING * sorted[sorted.len() / 2]).collect()
    };
    let (large_rows, large_cols) = (large(&row_norms), large(&col_norms));
    for (part, row_is_large, col_is_large) in
        [("", false, false), (" (large rows)", true, false), (" (large columns)", false, true), (" (both)", true, true)]
    {
        let chosen = |i: &usize| large_rows[i / cols] == row_is_large && large_cols[i % cols] == col_is_large;
        let indices: Vec<usize> = (0..want.values.len()).filter(chosen).collect();
        let got: Vec<f32> = indices.iter().map(|i| got.as_f32()[*i]).collect();
        let want: Vec<f64> = indices.iter().map(|i| want.values[*i]).collect();
        records::near(faults, &format!("{name}{part}"), &got, &want, PRODUCT_LIMIT);
    }
}
