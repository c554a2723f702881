//! The test of the tests: a wrong value planted in a copy of a folder must make each check fail, and an empty set must.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::records::{self, Check, Folder};
use super::{fp8, init, oracle};

/// Overwrites one value of the first record that starts with `prefix`: the largest in magnitude.
fn plant(path: &Path, prefix: &str) -> String {
    let mut bytes = std::fs::read(path).expect("the copy is there");
    let tensors = SafeTensors::deserialize(&bytes).expect("the copy is whole");
    let mut names: Vec<&str> = tensors.names();
    names.sort_unstable();
    let name = names.into_iter().find(|name| name.starts_with(prefix)).expect("the record is there").to_owned();
    let view = tensors.tensor(&name).expect("the record is there");
    let size = view.dtype().bitsize() / 8;
    let magnitude = |data: &[u8]| match view.dtype() {
        Dtype::F32 => f64::from(f32::from_le_bytes(data.try_into().expect("four bytes"))).abs(),
        Dtype::F64 => f64::from_le_bytes(data.try_into().expect("eight bytes")).abs(),
        Dtype::I64 => i64::from_le_bytes(data.try_into().expect("eight bytes")).abs() as f64,
        _ => 0.0,
    };
    // The last of equals: a token at the end, not one of the prompt.
    let mut values = view.data().chunks(size).map(magnitude).enumerate();
    let (at, value) = match view.dtype() {
        Dtype::I64 => values.next_back().expect("a record has values"),
        _ => values.max_by(|a, b| a.1.total_cmp(&b.1)).expect("a record has values"),
    };
    let wrong = match view.dtype() {
        Dtype::F32 => (value as f32 * 1.5 + 0.1).to_le_bytes().to_vec(),
        Dtype::F64 => (value * 1.5 + 0.1).to_le_bytes().to_vec(),
        Dtype::I64 => (value as i64 ^ 1).to_le_bytes().to_vec(),
        _ => vec![view.data()[at] ^ 1],
    };
    let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize + at * size;
    bytes[start..start + size].copy_from_slice(&wrong);
    std::fs::write(path, bytes).expect("the copy is writable");
    name
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("the folder is there").flatten() {
        if entry.path().is_file() {
            std::fs::write(to.join(entry.file_name()), std::fs::read(entry.path()).expect("readable"))
                .expect("written");
        }
    }
}

/// Every check of `checks` must fail on every wrong value it is responsible for.
pub(crate) fn assert_planted_values_are_found(checks: &[Check]) {
    let set = records::set();
    for (index, check) in checks.iter().enumerate() {
        for prefix in check.records {
            let has = |path: &std::path::PathBuf| Folder::open(path, check.file).has(prefix);
            let Some(path) = records::folders_with(&set, check.file).into_iter().find(has) else { continue };
            let copied = tempfile::tempdir().expect("a temporary folder");
            copy(&path, copied.path());
            let name = plant(&copied.path().join(check.file), prefix);
            let faults = (check.run)(&Folder::open(copied.path(), check.file));
            assert!(!faults.is_empty(), "check {index}: a wrong value in {name} of {} goes unnoticed", path.display());
        }
    }
}

#[test]
fn wrong_oracle_values_are_found() {
    assert_planted_values_are_found(oracle::CHECKS);
}

#[test]
fn wrong_training_values_are_found() {
    assert_planted_values_are_found(init::CHECKS);
}

#[test]
fn wrong_fp8_values_are_found() {
    assert_planted_values_are_found(fp8::CHECKS);
}

#[test]
fn an_empty_set_is_refused() {
    let empty = tempfile::tempdir().expect("a temporary folder");
    let refused = std::panic::catch_unwind(|| records::verify(empty.path(), oracle::CHECKS));
    assert!(refused.is_err(), "an empty set passes");
}
