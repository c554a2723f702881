//! Record files of an outside implementation, sets of folders that hold them, and the comparisons checks are made of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dsv3_model::{LoadPrecision, Model};
use dsv3_ops::{Tensor, WeightGrads};
use safetensors::{Dtype, SafeTensors};

/// What a check found wrong; empty when all is right.
pub(crate) type Faults = Vec<String>;

/// One kind of comparison, applied to every folder that has its record file.
pub(crate) struct Check {
    /// File the records are in.
    pub(crate) file: &'static str,
    /// Starts of the names of the records it compares with; a folder without any is passed over. A wrong value planted
    /// under each must make the check fail.
    pub(crate) records: &'static [&'static str],
    /// Compares.
    pub(crate) run: fn(&Folder) -> Faults,
}

/// A checkpoint folder and one of its record files.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    pub(crate) records: BTreeMap<String, Record>,
}

/// One tensor of a record file.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) shape: Vec<usize>,
    /// Every number, wide enough for all types (records hold token ids and counts, far below 2^53).
    pub(crate) values: Vec<f64>,
}

impl Record {
    pub(crate) fn f32s(&self) -> Vec<f32> {
        self.values.iter().map(|v| *v as f32).collect()
    }

    pub(crate) fn u32s(&self) -> Vec<u32> {
        self.values.iter().map(|v| *v as u32).collect()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.values.iter().map(|v| *v as u8).collect()
    }

    pub(crate) fn tensor(&self) -> Tensor {
        Tensor::f32(&self.shape, self.f32s())
    }

    /// The rows of a matrix of token ids.
    pub(crate) fn rows(&self) -> Vec<Vec<u32>> {
        let width = self.shape.last().copied().unwrap_or(1).max(1);
        self.u32s().chunks(width).map(<[u32]>::to_vec).collect()
    }

    pub(crate) fn scalar(&self) -> f64 {
        assert_eq!(self.values.len(), 1, "a scalar record has shape [1]");
        self.values[0]
    }
}

impl Folder {
    pub(crate) fn open(path: &Path, file: &str) -> Self {
        let bytes = std::fs::read(path.join(file)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let records = tensors.iter().map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
                Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
                Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
                other => panic!("{}: record {name} has type {other:?}", path.display()),
            };
            (name.to_owned(), Record { shape: view.shape().to_vec(), values })
        });
        Self { path: path.to_owned(), records: records.collect() }
    }

    /// The checkpoint, trainable.
    pub(crate) fn model(&self) -> Model {
        let loaded = dsv3_model::load(&self.path, LoadPrecision::Own, true);
        loaded.unwrap_or_else(|error| panic!("{}: {error}", self.path.display())).model
    }

    pub(crate) fn get(&self, name: &str) -> &Record {
        self.records.get(name).unwrap_or_else(|| panic!("{}: no record {name}", self.path.display()))
    }

    pub(crate) fn scalar(&self, name: &str) -> f64 {
        self.get(name).scalar()
    }

    /// Records whose names start with `prefix`, by the rest of the name.
    pub(crate) fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Record)> + 'a {
        let from_prefix = self.records.range(prefix.to_owned()..);
        from_prefix.map_while(move |(name, record)| Some((name.strip_prefix(prefix)?, record)))
    }

    pub(crate) fn has(&self, prefix: &str) -> bool {
        self.under(prefix).next().is_some()
    }
}

/// The set to walk: `$DSV3_ORACLES`, or the folders this repository ships.
pub(crate) fn set() -> PathBuf {
    match std::env::var_os("DSV3_ORACLES") {
        Some(set) => set.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles"),
    }
}

/// Every folder at or below `set` that has a file called `file`, in order of name.
pub(crate) fn folders_with(set: &Path, file: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if set.join(file).is_file() {
        found.push(set.to_owned());
    }
    let mut below: Vec<PathBuf> =
        std::fs::read_dir(set).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    below.sort();
    found.extend(below.iter().filter(|path| path.is_dir()).flat_map(|path| folders_with(path, file)));
    found
}

/// Names of the files that hold records.
pub(crate) const RECORD_FILES: [&str; 2] = ["oracle.safetensors", "train.safetensors"];

/// Applies `checks` to every folder of `set`.
///
/// # Panics
/// With every fault found, or when the set holds no record file at all.
pub(crate) fn verify(set: &Path, checks: &[Check]) {
    let is_empty = RECORD_FILES.iter().all(|file| folders_with(set, file).is_empty());
    assert!(!is_empty, "{} holds no folder with records", set.display());
    let mut faults = Vec::new();
    for check in checks {
        for path in folders_with(set, check.file) {
            let folder = Folder::open(&path, check.file);
            if check.records.iter().any(|prefix| folder.has(prefix)) {
                faults.extend((check.run)(&folder).into_iter().map(|fault| format!("{}: {fault}", path.display())));
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

/// Largest absolute difference at most `limit`.
pub(crate) fn close(faults: &mut Faults, name: &str, got: &[f32], want: &Record, limit: f64) {
    if got.len() != want.values.len() {
        return faults.push(format!("{name}: {} values, the record has {:?}", got.len(), want.shape));
    }
    let worst = got.iter().zip(&want.values).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, not_smaller);
    if exceeds(worst, limit) {
        faults.push(format!("{name}: off by {worst:.3e}, allowed {limit:.1e}"));
    }
}

/// Above the limit, or not a number.
fn exceeds(value: f64, limit: f64) -> bool {
    value.is_nan() || value > limit
}

/// The larger one; NaN wins.
fn not_smaller(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

/// |got − want| / |want| in the L2 norm at most `limit`; where want is zero, got must be.
pub(crate) fn near(faults: &mut Faults, name: &str, got: &[f32], want: &[f64], limit: f64) {
    if got.len() != want.len() {
        return faults.push(format!("{name}: {} values, the record has {}", got.len(), want.len()));
    }
    let distance = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    if exceeds(distance, limit * norm) {
        faults.push(format!("{name}: off by {:.3e} of its norm {norm:.3e}, allowed {limit:.1e}", distance / norm));
    }
}

/// A number within `limit` of the record, relative.
pub(crate) fn same(faults: &mut Faults, name: &str, got: f64, want: f64, limit: f64) {
    if exceeds((got - want).abs(), limit * want.abs()) {
        faults.push(format!("{name}: {got} instead of {want}"));
    }
}

/// Equal values, one by one.
pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(faults: &mut Faults, name: &str, got: &[T], want: &[T]) {
    if got.len() != want.len() {
        return faults.push(format!("{name}: {} values, the record has {}", got.len(), want.len()));
    }
    if let Some(i) = (0..got.len()).find(|i| got[*i] != want[*i]) {
        let count = got.iter().zip(want).filter(|(g, w)| g != w).count();
        faults.push(format!("{name}: {count} values differ, the first at {i}: {:?} instead of {:?}", got[i], want[i]));
    }
}

/// Gradients by published tensor name; zero where nothing flowed.
pub(crate) fn gradients(model: &Model, grads: &WeightGrads) -> BTreeMap<String, Vec<f32>> {
    let mut named = BTreeMap::new();
    for info in model.infos() {
        let len = info.tensor_shape().iter().product::<usize>();
        let all = grads.get(info.id).map_or_else(|| vec![0.0; info.numel()], |grad| grad.as_f32().to_vec());
        named.extend(info.tensor_names().into_iter().zip(all.chunks(len).map(<[f32]>::to_vec)));
    }
    named
}

/// Every gradient recorded under `prefix`, relative in norm.
pub(crate) fn compare_gradients(
    faults: &mut Faults,
    folder: &Folder,
    prefix: &str,
    named: &BTreeMap<String, Vec<f32>>,
    limit: f64,
) {
    for (name, record) in folder.under(prefix) {
        match named.get(name) {
            Some(grad) => near(faults, &format!("{prefix}{name}"), grad, &record.values, limit),
            None => faults.push(format!("{prefix}{name}: the model has no such parameter")),
        }
    }
}
