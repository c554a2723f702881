//! Tensors of a checkpoint, and the slices of them that its files hold.
//!
//! ```text
//! name, role, dtype, shape        of the whole tensor
//! slices: file, offsets, lengths  a box of the whole, one number per dimension
//!         bytes [begin, end), digest
//! ```
//!
//! The bytes of a slice are its elements, row-major, little-endian. Any number of ranks may have written the files; a
//! reader on any other number takes the rows it needs: [`TensorEntry::rows_of`] says which rows a rank holds, balanced
//! and contiguous along dimension 0 (so a stack of experts goes expert by expert); router biases lie on rank 0.
//!
//! **Invariant**: the slices of a tensor tile its shape. No element is missing, none is held twice; a table that says
//! otherwise is refused before one byte of it is used.

use std::ops::Range;

use dsv3_core::{Digest, FileEntry};
use serde::{Deserialize, Serialize};

use crate::{
    Checkpoint, Store,
    blobs::blob_path,
    error::{Result, StoreError},
};

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TensorType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
}

impl TensorType {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// What a tensor is to a trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorRole {
    /// A weight in full precision.
    Master,
    /// Router biases of one layer; whole, on rank 0.
    RouterBias,
    /// A moment of the optimiser.
    Moment,
}

/// A box of a tensor, held by one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSlice {
    /// Name of the file in the checkpoint.
    pub file: String,
    /// First index in every dimension.
    pub offsets: Vec<u64>,
    /// Indices in every dimension.
    pub lengths: Vec<u64>,
    /// Its bytes in the file: begin and end.
    pub bytes: [u64; 2],
    /// Digest of these bytes; absent while they have not been hashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// What it is.
    pub role: TensorRole,
    /// Element type.
    pub dtype: TensorType,
    /// Global shape.
    pub shape: Vec<u64>,
    /// Where its elements lie.
    pub slices: Vec<TensorSlice>,
}

/// Rows of `rows` that rank `rank` of `ranks` holds: balanced, contiguous, empty for some when there are too few.
pub fn rows_of_rank(rows: u64, ranks: u64, rank: u64) -> Range<u64> {
    let bound = |rank: u64| (u128::from(rows) * u128::from(rank) / u128::from(ranks.max(1))) as u64;
    bound(rank)..bound(rank + 1)
}

impl TensorSlice {
    fn range(&self, dimension: usize) -> Range<u64> {
        self.offsets[dimension]..self.offsets[dimension].saturating_add(self.lengths[dimension])
    }

    /// Indices of dimension 0; `0..1` of a scalar.
    fn rows(&self) -> Range<u64> {
        if self.offsets.is_empty() { 0..1 } else { self.range(0) }
    }

    fn elements(&self) -> Option<u64> {
        self.lengths.iter().try_fold(1_u64, |product, length| product.checked_mul(*length))
    }

    fn overlaps(&self, other: &Self) -> bool {
        (0..self.offsets.len()).all(|d| {
            let (a, b) = (self.range(d), other.range(d));
            a.start < b.end && b.start < a.end
        })
    }

    fn shown(&self) -> String {
        format!("{:?}+{:?} in {}", self.offsets, self.lengths, self.file)
    }
}

impl TensorEntry {
    /// Size of dimension 0; 1 of a scalar.
    pub fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> u64 {
        self.shape.iter().skip(1).product::<u64>() * self.dtype.bytes()
    }

    /// Rows that rank `rank` of `ranks` holds.
    pub fn rows_of(&self, ranks: u64, rank: u64) -> Range<u64> {
        let whole = self.role == TensorRole::RouterBias || self.shape.is_empty();
        match whole {
            true if rank == 0 => 0..self.rows(),
            true => 0..0,
            false => rows_of_rank(self.rows(), ranks, rank),
        }
    }

    /// Whether the slices tile the shape and lie within `files`.
    ///
    /// # Errors
    /// What is wrong, with the slice or the first missing row named.
    pub fn check(&self, files: &[FileEntry]) -> Result<(), String> {
        let name = &self.name;
        let total = self.shape.iter().try_fold(self.dtype.bytes(), |product, size| product.checked_mul(*size));
        let total = total.ok_or_else(|| format!("tensor {name} claims the shape {:?}", self.shape))?;
        let mut held = 0_u64;
        for (i, slice) in self.slices.iter().enumerate() {
            held = held.saturating_add(self.check_slice(slice, files)?);
            if let Some(other) = self.slices[..i].iter().find(|other| other.overlaps(slice)) {
                return Err(format!("tensor {name}: slice {} overlaps slice {}", slice.shown(), other.shown()));
            }
        }
        if held != total {
            let missing = self.missing_rows().map_or_else(String::new, |rows| format!(", rows {rows:?} are missing"));
            return Err(format!(
                "tensor {name} of shape {:?}: slices hold {held} of {total} bytes{missing}",
                self.shape
            ));
        }
        Ok(())
    }

    fn check_slice(&self, slice: &TensorSlice, files: &[FileEntry]) -> Result<u64, String> {
        let name = &self.name;
        let wrong = |problem: &str| format!("tensor {name}: slice {} {problem}", slice.shown());
        if slice.offsets.len() != self.shape.len() || slice.lengths.len() != self.shape.len() {
            return Err(wrong("has another number of dimensions"));
        }
        let inside = |d: usize| slice.offsets[d].checked_add(slice.lengths[d]).is_some_and(|end| end <= self.shape[d]);
        if !(0..self.shape.len()).all(inside) {
            return Err(wrong(&format!("leaves the shape {:?}", self.shape)));
        }
        let bytes = slice.elements().and_then(|count| count.checked_mul(self.dtype.bytes()));
        let [begin, end] = slice.bytes;
        if bytes.is_none() || end.checked_sub(begin) != bytes || bytes == Some(0) {
            return Err(wrong(&format!("has the bytes {begin}..{end}")));
        }
        let file = files.iter().find(|file| file.path == slice.file);
        match file {
            None => Err(wrong("names a file that the checkpoint does not have")),
            Some(file) if end > file.bytes => Err(wrong(&format!("ends at byte {end} of {}", file.bytes))),
            Some(_) => Ok(end - begin),
        }
    }

    /// The first rows that no slice holds.
    fn missing_rows(&self) -> Option<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = self.slices.iter().map(TensorSlice::rows).collect();
        ranges.sort_by_key(|range| range.start);
        let mut next = 0;
        for range in ranges {
            if range.start > next {
                return Some(next..range.start);
            }
            next = next.max(range.end);
        }
        (next < self.rows()).then(|| next..self.rows())
    }

    /// Slices that hold any of `rows`.
    pub fn slices_of(&self, rows: &Range<u64>) -> impl Iterator<Item = &TensorSlice> {
        self.slices.iter().filter(|slice| {
            let held = slice.rows();
            held.start < rows.end && rows.start < held.end
        })
    }

    /// Copies what `from`, the bytes of `slice`, holds of `rows` to its place in `to`, the bytes of these rows.
    /// None when the lengths do not fit each other.
    #[must_use]
    pub fn copy(&self, slice: &TensorSlice, from: &[u8], rows: &Range<u64>, to: &mut [u8]) -> Option<()> {
        let held = slice.rows();
        let (begin, end) = (held.start.max(rows.start), held.end.min(rows.end));
        let from_row = slice.lengths.iter().skip(1).product::<u64>() * self.dtype.bytes();
        let to_row = self.row_bytes();
        if slice.lengths.iter().skip(1).eq(self.shape.iter().skip(1)) {
            let bytes = end.saturating_sub(begin).checked_mul(to_row)?;
            let source = part(from, begin.saturating_sub(held.start).checked_mul(from_row)?, bytes)?;
            part_mut(to, begin.saturating_sub(rows.start).checked_mul(to_row)?, bytes)?.copy_from_slice(source);
            return Some(());
        }
        for row in begin..end {
            let at = (row - held.start).checked_mul(from_row)?;
            let source = part(from, at, from_row)?;
            let target = part_mut(to, (row - rows.start).checked_mul(to_row)?, to_row)?;
            self.copy_box(slice, 1, source, target)?;
        }
        Some(())
    }

    /// Copies the part of `slice` in dimensions from `d` on.
    fn copy_box(&self, slice: &TensorSlice, d: usize, from: &[u8], to: &mut [u8]) -> Option<()> {
        if slice.lengths.get(d..)? == self.shape.get(d..)? {
            to.copy_from_slice(from.get(..to.len())?);
            return Some(());
        }
        let below = |sizes: &[u64]| sizes.iter().skip(d + 1).product::<u64>() * self.dtype.bytes();
        let (from_step, to_step) = (below(&slice.lengths), below(&self.shape));
        for i in 0..slice.lengths[d] {
            let source = part(from, i * from_step, from_step)?;
            let target = part_mut(to, (slice.offsets[d] + i) * to_step, to_step)?;
            self.copy_box(slice, d + 1, source, target)?;
        }
        Some(())
    }
}

fn part(bytes: &[u8], at: u64, length: u64) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    bytes.get(at..at.checked_add(usize::try_from(length).ok()?)?)
}

fn part_mut(bytes: &mut [u8], at: u64, length: u64) -> Option<&mut [u8]> {
    let at = usize::try_from(at).ok()?;
    bytes.get_mut(at..at.checked_add(usize::try_from(length).ok()?)?)
}

/// Whether a table is one: every tensor once, tiled, within `files`.
///
/// # Errors
/// What is wrong.
pub(crate) fn check_table(tensors: &[TensorEntry], files: &[FileEntry]) -> Result<(), String> {
    let mut names = std::collections::BTreeSet::new();
    for tensor in tensors {
        if !names.insert(&tensor.name) {
            return Err(format!("tensor {} stands twice in the table", tensor.name));
        }
        tensor.check(files)?;
    }
    Ok(())
}

impl Store {
    /// The bytes of `rows` of the tensor `name` of a checkpoint. Only the slices that hold any of them are read, each by
    /// its range, and each is believed after its digest was compared.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when a slice is not what was written, or the checkpoint has no such tensor or rows.
    pub async fn read_rows(&self, checkpoint: &Checkpoint, name: &str, rows: Range<u64>) -> Result<Vec<u8>> {
        let shown = format!("checkpoint {}", checkpoint.seq);
        let damaged = |problem: String| StoreError::damaged(&shown, problem);
        let tensor = checkpoint.tensors.iter().find(|tensor| tensor.name == name);
        let tensor = tensor.ok_or_else(|| damaged(format!("it has no tensor {name}")))?;
        tensor.check(&checkpoint.files).map_err(damaged)?;
        if rows.start > rows.end || rows.end > tensor.rows() {
            return Err(damaged(format!("tensor {name} has {} rows, not {rows:?}", tensor.rows())));
        }
        let mut bytes = vec![0; ((rows.end - rows.start) * tensor.row_bytes()) as usize];
        for slice in tensor.slices_of(&rows) {
            let held = self.read_slice(checkpoint, tensor, slice).await?;
            let copied = tensor.copy(slice, &held, &rows, &mut bytes);
            copied.ok_or_else(|| damaged(format!("tensor {name}: slice {} is too short", slice.shown())))?;
        }
        Ok(bytes)
    }

    /// The verified bytes of one slice.
    async fn read_slice(&self, checkpoint: &Checkpoint, tensor: &TensorEntry, slice: &TensorSlice) -> Result<Vec<u8>> {
        let missing = || StoreError::damaged(format!("checkpoint {}", checkpoint.seq), format!("no {}", slice.file));
        let file = checkpoint.file(&slice.file).ok_or_else(missing)?;
        let path = blob_path(file.digest);
        let [begin, end] = slice.bytes;
        let Some(digest) = slice.digest else {
            let whole = self.get_blob(file.digest).await?;
            return part(&whole, begin, end - begin).map(<[u8]>::to_vec).ok_or_else(missing);
        };
        let bytes = self.read_range(&path, begin..end).await?;
        if Digest::of(&bytes) == digest {
            return Ok(bytes.to_vec());
        }
        let problem = format!("bytes {begin}..{end} ({}, {}) have another digest", tensor.name, slice.shown());
        Err(StoreError::damaged(self.display_path(&path), problem))
    }
}

#[cfg(test)]
mod tests;
