//! A folder of safetensors files as named tensors, read one range at a time; every length is checked before a weight is read.
//!
//! File layout: u64 header length n, n bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the data.
//! Several files are joined by `model.safetensors.index.json` with `weight_map: {name: file}`.
//!
//! **Invariant**: after [`Folder::open`] every entry lies inside its file, shares no byte with another, and has as many
//! bytes as its shape and type say, so whatever the file holds, reading it cannot panic, and can fail only when the disk
//! does or somebody shortens the file meanwhile. Nothing of the files stays in memory: what a caller asks for is copied
//! to where it is wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde::Deserialize;

use crate::Error;

/// Longest header a file may claim.
const HEADER_BYTES_MAX: u64 = 256 << 20;
/// Bytes read at a time when they are converted; a multiple of every element's size.
const READ_BYTES: usize = 1 << 20;
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
    begin: u64,
    bytes: usize,
}

/// All tensors of a folder.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    files: Vec<(PathBuf, File)>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Folder {
    /// Opens the weights files of `path` and checks their headers.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let mut folder = Self { path: path.to_owned(), files: Vec::new(), entries: BTreeMap::new() };
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
        let unreadable = |source| Error::Read { path: path.to_owned(), source };
        let damaged = |what: String| Error::File { path: path.to_owned(), what };
        let file = File::open(path).map_err(unreadable)?;
        let file_bytes = file.metadata().map_err(unreadable)?.len();
        let text = header(&file, file_bytes).map_err(unreadable)?.map_err(damaged)?;
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("no safetensors header: {error}")))?;
        let data_start = 8 + text.len() as u64;
        let mut places = Vec::new();
        for (name, value) in fields {
            if name == "__metadata__" || !wanted(&name) {
                continue;
            }
            let fields: Header =
                serde_json::from_value(value).map_err(|error| damaged(format!("header of {name:?}: {error}")))?;
            let [from, to] = fields.data_offsets;
            let (stored, size) = Stored::parse(&fields.dtype);
            let size = size.ok_or_else(|| damaged(format!("{name:?} has the unknown type {:?}", fields.dtype)))?;
            let bytes = fields.shape.iter().try_fold(size, |product, n| product.checked_mul(*n));
            let inside = from <= to && to as u64 <= file_bytes - data_start && bytes == Some(to - from);
            if !inside {
                let what = format!("{name:?} of shape {:?} does not lie inside the file", fields.shape);
                return Err(damaged(what));
            }
            let (begin, bytes) = (data_start + from as u64, to - from);
            let type_name = fields.dtype;
            if bytes > 0 {
                places.push((begin, begin + bytes as u64, name.clone()));
            }
            let file = self.files.len();
            self.entries.insert(name, Entry { stored, type_name, shape: fields.shape, file, begin, bytes });
        }
        places.sort_unstable();
        if let Some(pair) = places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(damaged(format!("{:?} and {:?} share bytes", pair[0].2, pair[1].2)));
        }
        self.files.push((path.to_owned(), file));
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

    /// Reads bytes of a tensor, from its byte `from` on, until `out` is full.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub(crate) fn read(&self, entry: &Entry, from: usize, out: &mut [u8]) -> Result<(), Error> {
        let (path, file) = &self.files[entry.file];
        file.read_exact_at(out, entry.begin + from as u64).map_err(|source| Error::Read { path: path.clone(), source })
    }

    /// Calls `take` with the bytes of a tensor, [`READ_BYTES`] at a time.
    fn read_parts(&self, entry: &Entry, mut take: impl FnMut(&[u8])) -> Result<(), Error> {
        let mut part = vec![0; entry.bytes.min(READ_BYTES)];
        for from in (0..entry.bytes).step_by(READ_BYTES) {
            let part = &mut part[..READ_BYTES.min(entry.bytes - from)];
            self.read(entry, from, part)?;
            take(part);
        }
        Ok(())
    }

    /// Appends the values of an F32, BF16 or F16 tensor as f32.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub(crate) fn append_f32(&self, entry: &Entry, out: &mut Vec<f32>) -> Result<(), Error> {
        self.read_parts(entry, |bytes| match entry.stored {
            Stored::F32 => out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Stored::Bf16 => out.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32())),
            Stored::F16 => out.extend(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
            Stored::E4m3 | Stored::Other => {}
        })
    }

    /// Reads the values of a BF16 tensor to `out`, which has as many elements.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub(crate) fn read_bf16(&self, entry: &Entry, out: &mut [bf16]) -> Result<(), Error> {
        let mut out = out.iter_mut();
        self.read_parts(entry, |bytes| {
            for (bytes, value) in bytes.as_chunks().0.iter().zip(&mut out) {
                *value = bf16::from_le_bytes(*bytes);
            }
        })
    }
}

/// The header's text; the inner error says what is wrong with the file.
fn header(file: &File, file_bytes: u64) -> std::io::Result<Result<Vec<u8>, String>> {
    let Some(rest) = file_bytes.checked_sub(8) else {
        return Ok(Err(format!("{file_bytes} bytes are too few for a safetensors file")));
    };
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX || length > rest {
        return Ok(Err(format!("a header of {length} bytes does not fit the file's {file_bytes}")));
    }
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, 8)?;
    Ok(Ok(text))
}
