//! Tensors of a trainer to the files of a checkpoint, one per rank, and back from any number of them.
//!
//! A file is safetensors: 8 bytes of header length, the header, the tensors in the order the library itself uses (larger
//! element types first, then by name), so the files of one rank are those that `safetensors::serialize` writes. Of a
//! tensor that is dealt to several ranks a file holds some rows under the tensor's own name; the table that says which
//! ([`TensorEntry`]) goes into the checkpoint's record. `masters.safetensors` of one rank is
//! `masters-00001-of-00004.safetensors`, .. of four.
//!
//! The copy out of the live buffers is all a step waits for, so it is one pass, in parallel, into the final bytes, which
//! lie in memory that is kept between saves ([`Buffers`]). Every byte of it is written each time.

use std::{collections::BTreeMap, ops::Range};

use bytes::Bytes;
use dsv3_ops::{DType, Tensor};
use dsv3_store::{Buffers, TensorEntry, TensorRole, TensorSlice, TensorType};
use half::bf16;
use rayon::prelude::*;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};

use crate::error::{Error, Result};

/// Elements that one task copies.
const COPY_ELEMENTS: usize = 1 << 18;

/// Elements of a live tensor.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Elements<'a> {
    /// Of a master or a moment.
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        match tensor.dtype() {
            DType::Bf16 => Self::Bf16(tensor.as_bf16()),
            _ => Self::F32(tensor.as_f32()),
        }
    }

    fn dtype(self) -> TensorType {
        match self {
            Self::F32(_) => TensorType::F32,
            Self::Bf16(_) => TensorType::Bf16,
        }
    }

    /// The elements of `range`, and their little-endian bytes in `to`, in parts that one task copies.
    fn parts(self, range: Range<usize>, to: &'a mut [u8], parts: &mut Vec<Part<'a>>) {
        match self {
            Self::F32(list) => {
                let to = to.chunks_mut(COPY_ELEMENTS * 4);
                parts.extend(list[range].chunks(COPY_ELEMENTS).zip(to).map(|(from, to)| Part::F32(from, to)));
            }
            Self::Bf16(list) => {
                let to = to.chunks_mut(COPY_ELEMENTS * 2);
                parts.extend(list[range].chunks(COPY_ELEMENTS).zip(to).map(|(from, to)| Part::Bf16(from, to)));
            }
        }
    }
}

/// Elements, and where their bytes go.
enum Part<'a> {
    F32(&'a [f32], &'a mut [u8]),
    Bf16(&'a [bf16], &'a mut [u8]),
}

impl Part<'_> {
    fn copy(self) {
        match self {
            Self::F32(from, to) => {
                to.as_chunks_mut::<4>().0.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_le_bytes());
            }
            Self::Bf16(from, to) => {
                to.as_chunks_mut::<2>().0.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_le_bytes());
            }
        }
    }
}

/// A tensor to save.
pub(crate) struct Live<'a> {
    pub(crate) name: String,
    pub(crate) role: TensorRole,
    pub(crate) shape: Vec<usize>,
    pub(crate) elements: Elements<'a>,
}

/// `group.safetensors` of one rank, `group-00001-of-00004.safetensors` of the first of four.
pub(crate) fn file_name(group: &str, ranks: usize, rank: usize) -> String {
    match ranks {
        0 | 1 => format!("{group}.safetensors"),
        _ => format!("{group}-{:05}-of-{ranks:05}.safetensors", rank + 1),
    }
}

fn safe_dtype(dtype: TensorType) -> Dtype {
    match dtype {
        TensorType::F32 => Dtype::F32,
        TensorType::Bf16 => Dtype::BF16,
    }
}

fn damaged(file: &str, problem: impl ToString) -> Error {
    Error::Checkpoint { file: file.to_owned(), problem: problem.to_string() }
}

/// A file to write, and what of which tensor lies where in it.
struct Layout<'a> {
    name: String,
    /// Length of the header and the header.
    head: Vec<u8>,
    /// Elements in the order of their bytes, which fill the rest of the file.
    content: Vec<(Elements<'a>, Range<usize>)>,
    bytes: usize,
}

/// Files to write and the table of what they hold. Slices have no digests yet.
pub(crate) struct Files<'a> {
    layouts: Vec<Layout<'a>>,
    pub(crate) table: Vec<TensorEntry>,
}

impl<'a> Files<'a> {
    /// Lays out the files of `ranks` ranks for each group of tensors.
    pub(crate) fn of(groups: Vec<(&str, Vec<Live<'a>>)>, ranks: usize) -> Result<Self> {
        let mut files = Self { layouts: Vec::new(), table: Vec::new() };
        for (group, mut tensors) in groups {
            tensors.sort_by(|a, b| {
                let dtype = |live: &Live<'_>| safe_dtype(live.elements.dtype());
                dtype(b).cmp(&dtype(a)).then_with(|| a.name.cmp(&b.name))
            });
            let entry = |live: &Live<'_>| TensorEntry {
                name: live.name.clone(),
                role: live.role,
                dtype: live.elements.dtype(),
                shape: live.shape.iter().map(|size| *size as u64).collect(),
                slices: Vec::new(),
            };
            let mut table: Vec<TensorEntry> = tensors.iter().map(entry).collect();
            let ranks = ranks.max(1);
            for rank in 0..ranks {
                files.layouts.push(lay_out(file_name(group, ranks, rank), &tensors, &mut table, ranks, rank)?);
            }
            files.table.append(&mut table);
        }
        Ok(files)
    }

    /// Length of each file in bytes.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.layouts.iter().map(|layout| layout.bytes).collect()
    }

    /// Copies everything out, into memory of `buffers`.
    pub(crate) fn write(&self, buffers: &Buffers) -> Result<Vec<(String, Bytes)>> {
        let take = |layout: &Layout<'_>| buffers.take(layout.bytes).map_err(|source| Error::Memory { source });
        let mut files = self.layouts.iter().map(take).collect::<Result<Vec<_>>>()?;
        let mut parts = Vec::new();
        for (layout, file) in self.layouts.iter().zip(&mut files) {
            let (head, mut rest) = file.split_at_mut(layout.head.len());
            head.copy_from_slice(&layout.head);
            for (elements, range) in &layout.content {
                let (here, after) = rest.split_at_mut(range.len() * elements.dtype().bytes() as usize);
                elements.parts(range.clone(), here, &mut parts);
                rest = after;
            }
        }
        parts.into_par_iter().for_each(Part::copy);
        let names = self.layouts.iter().map(|layout| layout.name.clone());
        Ok(names.zip(files.into_iter().map(Bytes::from)).collect())
    }
}

/// One file; its slices are added to the table.
fn lay_out<'a>(
    file: String,
    tensors: &[Live<'a>],
    table: &mut [TensorEntry],
    ranks: usize,
    rank: usize,
) -> Result<Layout<'a>> {
    let mut infos = Vec::new();
    let mut content = Vec::new();
    let mut at = 0_usize;
    for (live, entry) in tensors.iter().zip(table.iter()) {
        let rows = entry.rows_of(ranks as u64, rank as u64);
        if rows.is_empty() || entry.row_bytes() == 0 {
            continue;
        }
        let mut shape = live.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = (rows.end - rows.start) as usize;
        }
        let row_elements = (entry.row_bytes() / entry.dtype.bytes()) as usize;
        let elements = rows.start as usize * row_elements..rows.end as usize * row_elements;
        let bytes = elements.len() * entry.dtype.bytes() as usize;
        let dtype = safe_dtype(entry.dtype);
        infos.push((live.name.clone(), TensorInfo { dtype, shape, data_offsets: (at, at + bytes) }));
        content.push((live.elements, elements));
        at += bytes;
    }
    let metadata = Metadata::new(None, infos.clone()).map_err(|error| damaged(&file, error))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|source| Error::State { source })?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut head = (header.len() as u64).to_le_bytes().to_vec();
    head.append(&mut header);
    let start = head.len();
    let mut infos = infos.into_iter().peekable();
    for entry in table {
        let Some((_, info)) = infos.next_if(|(name, _)| *name == entry.name) else { continue };
        let rows = entry.rows_of(ranks as u64, rank as u64);
        let mut offsets = vec![0; entry.shape.len()];
        if let Some(first) = offsets.first_mut() {
            *first = rows.start;
        }
        let lengths = info.shape.iter().map(|size| *size as u64).collect();
        let range = [(start + info.data_offsets.0) as u64, (start + info.data_offsets.1) as u64];
        entry.slices.push(TensorSlice { file: file.clone(), offsets, lengths, bytes: range, digest: None });
    }
    Ok(Layout { name: file, head, content, bytes: start + at })
}

/// The tensors of a checkpoint, whatever files they lie in.
pub(crate) struct StoredTensors {
    table: BTreeMap<String, TensorEntry>,
    files: BTreeMap<String, Bytes>,
}

impl StoredTensors {
    /// Reads every file that `tensors` names. A checkpoint of format 1 has no table: then `groups` name its files, whose
    /// own headers say what lies where.
    pub(crate) fn open(
        tensors: &[TensorEntry],
        groups: &[&str],
        mut read: impl FnMut(&str) -> Result<Bytes, dsv3_core::Error>,
    ) -> Result<Self> {
        let mut stored = Self { table: BTreeMap::new(), files: BTreeMap::new() };
        let mut read = |name: &str| read(name).map_err(|source| Error::Store { source });
        if tensors.is_empty() {
            for name in groups {
                let bytes = read(name)?;
                stored.describe(name, &bytes)?;
                stored.files.insert((*name).to_owned(), bytes);
            }
            return Ok(stored);
        }
        for entry in tensors {
            for slice in &entry.slices {
                if !stored.files.contains_key(&slice.file) {
                    let bytes = read(&slice.file)?;
                    stored.files.insert(slice.file.clone(), bytes);
                }
            }
            stored.table.insert(entry.name.clone(), entry.clone());
        }
        Ok(stored)
    }

    /// Adds the tensors of a file of format 1, each whole.
    fn describe(&mut self, file: &str, bytes: &[u8]) -> Result<()> {
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| damaged(file, error))?;
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => TensorType::F32,
                Dtype::BF16 => TensorType::Bf16,
                other => return Err(damaged(file, format!("{name} is of type {other:?}"))),
            };
            let shape: Vec<u64> = info.shape.iter().map(|size| *size as u64).collect();
            let start = 8 + header;
            let range = [(start + info.data_offsets.0) as u64, (start + info.data_offsets.1) as u64];
            let (offsets, lengths) = (vec![0; shape.len()], shape.clone());
            let slice = TensorSlice { file: file.to_owned(), offsets, lengths, bytes: range, digest: None };
            let role = TensorRole::Master;
            self.table.insert(name.clone(), TensorEntry { name, role, dtype, shape, slices: vec![slice] });
        }
        Ok(())
    }

    /// The tensor `name`, which must have this type and shape.
    pub(crate) fn tensor(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let entry = self.table.get(name).ok_or_else(|| damaged("tensors", format!("there is no {name}")))?;
        let wanted = if dtype == DType::Bf16 { TensorType::Bf16 } else { TensorType::F32 };
        let wanted_shape: Vec<u64> = shape.iter().map(|size| *size as u64).collect();
        if entry.dtype != wanted || entry.shape != wanted_shape {
            let found = format!("{:?} {:?}", entry.dtype, entry.shape);
            return Err(damaged("tensors", format!("{name} is {found}, the run needs {wanted:?} {shape:?}")));
        }
        Ok(if dtype == DType::Bf16 {
            Tensor::bf16(shape, self.elements(entry, bf16::from_le_bytes)?)
        } else {
            Tensor::f32(shape, self.elements(entry, f32::from_le_bytes)?)
        })
    }

    /// All elements of a tensor, put together from its slices, in parallel.
    fn elements<T: Copy + Default + Send, const N: usize>(
        &self,
        entry: &TensorEntry,
        decode: impl Fn([u8; N]) -> T + Sync,
    ) -> Result<Vec<T>> {
        let fill = |to: &mut [T], from: &[u8]| {
            let from = from.as_chunks::<N>().0;
            let parts = to.par_chunks_mut(COPY_ELEMENTS).zip(from.par_chunks(COPY_ELEMENTS));
            parts.for_each(|(to, from)| to.iter_mut().zip(from).for_each(|(to, bytes)| *to = decode(*bytes)));
        };
        let row_elements = entry.row_bytes() as usize / N;
        let mut elements = vec![T::default(); entry.rows() as usize * row_elements];
        if entry.slices.iter().any(|slice| slice.lengths.iter().skip(1).ne(entry.shape.iter().skip(1))) {
            fill(&mut elements, &self.bytes(entry)?);
            return Ok(elements);
        }
        // Whole rows, as this library writes them, need no copy on the way.
        for slice in &entry.slices {
            let short = || damaged(&slice.file, format!("it does not hold its slice of {}", entry.name));
            let held = self.held(slice).ok_or_else(short)?;
            let first = slice.offsets.first().map_or(0, |row| *row as usize) * row_elements;
            let count = slice.lengths.first().map_or(1, |rows| *rows as usize) * row_elements;
            let to = elements.get_mut(first..first + count).filter(|to| to.len() * N == held.len());
            fill(to.ok_or_else(short)?, held);
        }
        Ok(elements)
    }

    /// All bytes of a tensor, whatever boxes its slices are.
    fn bytes(&self, entry: &TensorEntry) -> Result<Vec<u8>> {
        let rows = 0..entry.rows();
        let mut bytes = vec![0; (entry.rows() * entry.row_bytes()) as usize];
        for slice in &entry.slices {
            let short = || damaged(&slice.file, format!("it does not hold its slice of {}", entry.name));
            let held = self.held(slice).ok_or_else(short)?;
            entry.copy(slice, held, &rows, &mut bytes).ok_or_else(short)?;
        }
        Ok(bytes)
    }

    /// The bytes of a slice in its file.
    fn held(&self, slice: &TensorSlice) -> Option<&[u8]> {
        let [begin, end] = slice.bytes;
        self.files.get(&slice.file)?.get(begin as usize..end as usize)
    }
}

#[cfg(test)]
mod tests;
