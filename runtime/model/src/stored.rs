//! A folder of safetensors files as named tensors: memory-mapped, every length checked before a byte is read.
//!
//! File layout: u64 header length n, n bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the data.
//! Several files are joined by `model.safetensors.index.json` with `weight_map: {name: file}`.
//!
//! **Invariant**: after [`Folder::open`] every entry lies inside its file, shares no byte with another, and has as many
//! bytes as its shape and type say, so reading cannot fail or panic whatever the file holds. (A file that somebody
//! shortens while it is mapped is beyond this: the operating system then stops the process.)

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use serde::Deserialize;

use crate::Error;

/// Longest header a file may claim.
const HEADER_BYTES_MAX: u64 = 256 << 20;
/// Name of a folder's only weights file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Name of the list of a folder's several weights files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Element types this crate reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    Bf16,
    F16,
    E4m3,
    /// Known to the format, not used here.
    Other,
}

impl Stored {
    fn parse(name: &str) -> (Self, Option<usize>) {
        match name {
            "F32" => (Self::F32, Some(4)),
            "BF16" => (Self::Bf16, Some(2)),
            "F16" => (Self::F16, Some(2)),
            "F8_E4M3" => (Self::E4m3, Some(1)),
            "F64" | "I64" | "U64" => (Self::Other, Some(8)),
            "I32" | "U32" => (Self::Other, Some(4)),
            "I16" | "U16" => (Self::Other, Some(2)),
            "BOOL" | "I8" | "U8" | "F8_E5M2" | "F8_E8M0" => (Self::Other, Some(1)),
            _ => (Self::Other, None),
        }
    }
}

#[derive(Deserialize)]
struct Header {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// One tensor of a folder.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) stored: Stored,
    /// Type as the file spells it.
    pub(crate) type_name: String,
    pub(crate) shape: Vec<usize>,
    file: usize,
    begin: usize,
    end: usize,
}

/// All tensors of a folder.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    maps: Vec<Mmap>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Folder {
    /// Maps the weights files of `path` and checks their headers.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let mut folder = Self { path: path.to_owned(), maps: Vec::new(), entries: BTreeMap::new() };
        let index_path = path.join(INDEX);
        if !index_path.is_file() {
            folder.add(&path.join(SINGLE), |_| true)?;
            return Ok(folder);
        }
        let bytes = std::fs::read(&index_path).map_err(|source| Error::Read { path: index_path.clone(), source })?;
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|error| Error::File { path: index_path.clone(), what: format!("no index of weights: {error}") })?;
        let files: BTreeSet<&String> = index.weight_map.values().collect();
        for file in files {
            let is_plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
            if !is_plain {
                return Err(Error::File { path: index_path, what: format!("{file:?} is not a file of this folder") });
            }
            folder.add(&path.join(file), |name| index.weight_map.get(name) == Some(file))?;
        }
        match index.weight_map.keys().find(|name| !folder.entries.contains_key(*name)) {
            Some(name) => Err(Error::Missing { folder: folder.path, name: name.clone() }),
            None => Ok(folder),
        }
    }

    fn add(&mut self, path: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
        let map = map(path)?;
        let damaged = |what: String| Error::File { path: path.to_owned(), what };
        let (header, data_start) = header(&map).map_err(damaged)?;
        let file = self.maps.len();
        let mut places = Vec::new();
        for (name, value) in header {
            if name == "__metadata__" || !wanted(&name) {
                continue;
            }
            let fields: Header =
                serde_json::from_value(value).map_err(|error| damaged(format!("header of {name:?}: {error}")))?;
            let [from, to] = fields.data_offsets;
            let (stored, size) = Stored::parse(&fields.dtype);
            let size = size.ok_or_else(|| damaged(format!("{name:?} has the unknown type {:?}", fields.dtype)))?;
            let bytes = fields.shape.iter().try_fold(size, |product, n| product.checked_mul(*n));
            let inside = from <= to && to <= map.len() - data_start && bytes == Some(to - from);
            if !inside {
                let what = format!("{name:?} of shape {:?} does not lie inside the file", fields.shape);
                return Err(damaged(what));
            }
            let (begin, end) = (data_start + from, data_start + to);
            let type_name = fields.dtype;
            if from < to {
                places.push((begin, end, name.clone()));
            }
            self.entries.insert(name, Entry { stored, type_name, shape: fields.shape, file, begin, end });
        }
        places.sort_unstable();
        if let Some(pair) = places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(damaged(format!("{:?} and {:?} share bytes", pair[0].2, pair[1].2)));
        }
        self.maps.push(map);
        Ok(())
    }

    /// The tensor called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// The tensor called `name`, which must have `shape`.
    pub(crate) fn expect(&self, name: &str, shape: &[usize]) -> Result<&Entry, Error> {
        let missing = || Error::Missing { folder: self.path.clone(), name: name.to_owned() };
        let entry = self.find(name).ok_or_else(missing)?;
        if entry.shape != shape {
            let (found, wanted) = (entry.shape.clone(), shape.to_vec());
            return Err(Error::Shape { name: name.to_owned(), found, wanted });
        }
        Ok(entry)
    }

    /// Whether any tensor's name starts with `prefix`.
    pub(crate) fn has_prefix(&self, prefix: &str) -> bool {
        self.entries.range(prefix.to_owned()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
    }

    /// The bytes of a tensor.
    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.maps[entry.file][entry.begin..entry.end]
    }

    /// Appends the values of an F32, BF16 or F16 tensor as f32.
    pub(crate) fn append_f32(&self, entry: &Entry, out: &mut Vec<f32>) {
        let bytes = self.bytes(entry);
        match entry.stored {
            Stored::F32 => out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Stored::Bf16 => out.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32())),
            Stored::F16 => out.extend(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
            Stored::E4m3 | Stored::Other => {}
        }
    }

    /// Appends the values of a BF16 tensor.
    pub(crate) fn append_bf16(&self, entry: &Entry, out: &mut Vec<bf16>) {
        out.extend(self.bytes(entry).as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)));
    }
}

fn map(path: &Path) -> Result<Mmap, Error> {
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    #[allow(unsafe_code)] // Checkpoints are larger than memory; reading them through a buffer would double it.
    // SAFETY: the map is read-only and private to this folder; the bytes are only ever copied out as plain numbers, so
    // a writer elsewhere could change values but no invariant of this process.
    unsafe { Mmap::map(&file) }.map_err(unreadable)
}

fn header(map: &[u8]) -> Result<(serde_json::Map<String, serde_json::Value>, usize), String> {
    let Some((length, rest)) = map.split_first_chunk::<8>() else {
        return Err(format!("{} bytes are too few for a safetensors file", map.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX || length > rest.len() as u64 {
        return Err(format!("a header of {length} bytes does not fit the file's {}", map.len()));
    }
    let text = &rest[..length as usize];
    let fields = serde_json::from_slice(text).map_err(|error| format!("no safetensors header: {error}"))?;
    Ok((fields, 8 + length as usize))
}
