//! Tensors of a trainer to the files of a checkpoint, one per rank, and back from any number of them.
//!
//! A file is safetensors: 8 bytes of header length, the header, the tensors in the order the library itself uses (larger
//! element types first, then by name), so the files of one rank are those that `safetensors::serialize` writes. Of a
//! tensor that is dealt to several ranks a file holds some rows under the tensor's own name; the table that says which
//! ([`TensorEntry`]) goes into the checkpoint's record. `masters.safetensors` of one rank is
//! `masters-00001-of-00004.safetensors`, .. of four.
//!
//! The copy out of the live buffers is all a step waits for, so it is one pass, in parallel, into the final bytes.

use std::{collections::BTreeMap, ops::Range};

use dsv3_ops::{DType, Tensor};
use dsv3_store::{TensorEntry, TensorRole, TensorSlice, TensorType};
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

    /// Writes the elements of `range` as little-endian bytes.
    fn copy(self, range: Range<usize>, to: &mut [u8]) {
        match self {
            Self::F32(list) => {
                let parts = list[range].par_chunks(COPY_ELEMENTS);
                parts.zip(to.par_chunks_mut(COPY_ELEMENTS * 4)).for_each(|(from, to)| {
                    to.as_chunks_mut::<4>().0.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_le_bytes());
                });
            }
            Self::Bf16(list) => {
                let parts = list[range].par_chunks(COPY_ELEMENTS);
                parts.zip(to.par_chunks_mut(COPY_ELEMENTS * 2)).for_each(|(from, to)| {
                    to.as_chunks_mut::<2>().0.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_le_bytes());
                });
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

/// Name and content of a file.
pub(crate) type NamedFile = (String, Vec<u8>);

/// The files of `ranks` ranks and the table of what they hold. Slices have no digests yet.
pub(crate) fn write(
    group: &str,
    mut tensors: Vec<Live<'_>>,
    ranks: usize,
) -> Result<(Vec<NamedFile>, Vec<TensorEntry>)> {
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
    let mut files = Vec::with_capacity(ranks);
    for rank in 0..ranks {
        let name = file_name(group, ranks, rank);
        let bytes = write_rank(&name, &tensors, &mut table, ranks, rank)?;
        files.push((name, bytes));
    }
    Ok((files, table))
}

/// One file; its slices are added to the table.
fn write_rank(
    file: &str,
    tensors: &[Live<'_>],
    table: &mut [TensorEntry],
    ranks: usize,
    rank: usize,
) -> Result<Vec<u8>> {
    let mut infos = Vec::new();
    let mut parts: Vec<(Elements<'_>, Range<usize>, Range<usize>)> = Vec::new();
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
        parts.push((live.elements, elements, at..at + bytes));
        at += bytes;
    }
    let metadata = Metadata::new(None, infos.clone()).map_err(|error| damaged(file, error))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|source| Error::State { source })?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let start = 8 + header.len();
    // Zeroed by the system as its pages are first touched, which the parallel copy does.
    let mut bytes = vec![0_u8; start + at];
    bytes[..8].copy_from_slice(&(header.len() as u64).to_le_bytes());
    bytes[8..start].copy_from_slice(&header);
    let mut rest = &mut bytes[start..];
    for (elements, from, to) in parts {
        let (here, after) = rest.split_at_mut(to.len());
        elements.copy(from, here);
        rest = after;
    }
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
        entry.slices.push(TensorSlice { file: file.to_owned(), offsets, lengths, bytes: range, digest: None });
    }
    Ok(bytes)
}

/// The tensors of a checkpoint, whatever files they lie in.
pub(crate) struct StoredTensors {
    table: BTreeMap<String, TensorEntry>,
    files: BTreeMap<String, Vec<u8>>,
}

impl StoredTensors {
    /// Reads every file that `tensors` names. A checkpoint of format 1 has no table: then `groups` name its files, whose
    /// own headers say what lies where.
    pub(crate) fn open(
        tensors: &[TensorEntry],
        groups: &[&str],
        mut read: impl FnMut(&str) -> Result<Vec<u8>, dsv3_core::Error>,
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
        let bytes = self.bytes(entry)?;
        Ok(if dtype == DType::Bf16 {
            Tensor::bf16(shape, bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b)).collect())
        } else {
            Tensor::f32(shape, bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        })
    }

    /// All bytes of a tensor, put together from its slices.
    fn bytes(&self, entry: &TensorEntry) -> Result<Vec<u8>> {
        let rows = 0..entry.rows();
        let mut bytes = vec![0; (entry.rows() * entry.row_bytes()) as usize];
        for slice in &entry.slices {
            let short = || damaged(&slice.file, format!("it does not hold its slice of {}", entry.name));
            let file = self.files.get(&slice.file).ok_or_else(short)?;
            let [begin, end] = slice.bytes;
            let held = file.get(begin as usize..end as usize).ok_or_else(short)?;
            entry.copy(slice, held, &rows, &mut bytes).ok_or_else(short)?;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn values(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| seed + i as f32 * 0.37).collect()
    }

    fn live<'a>(name: &str, shape: &[usize], elements: Elements<'a>) -> Live<'a> {
        Live { name: name.to_owned(), role: TensorRole::Master, shape: shape.to_vec(), elements }
    }

    #[test]
    fn one_rank_writes_the_bytes_that_the_library_writes() {
        let (a, b, c) = (values(15, 1.0), values(3, 2.0), values(8, 3.0));
        let half: Vec<bf16> = c.iter().map(|x| bf16::from_f32(*x)).collect();
        let tensors = || {
            vec![
                live("second", &[3], Elements::F32(&b)),
                live("half", &[2, 4], Elements::Bf16(&half)),
                live("first\"", &[5, 3], Elements::F32(&a)),
            ]
        };
        let (files, table) = write("masters", tensors(), 1).unwrap();
        let bytes = |list: &[f32]| list.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (a, b) = (bytes(&a), bytes(&b));
        let half: Vec<u8> = half.iter().flat_map(|x| x.to_le_bytes()).collect();
        let views = [
            ("half", TensorView::new(Dtype::BF16, vec![2, 4], &half).unwrap()),
            ("first\"", TensorView::new(Dtype::F32, vec![5, 3], &a).unwrap()),
            ("second", TensorView::new(Dtype::F32, vec![3], &b).unwrap()),
        ];
        assert_eq!(files[0].0, "masters.safetensors");
        assert_eq!(files[0].1, safetensors::serialize(views, None).unwrap());
        let names: Vec<&str> = table.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["first\"", "second", "half"]);
    }

    #[test]
    fn every_split_reads_back_and_every_file_is_safetensors() {
        let (a, b) = (values(7 * 11, 1.0), values(2, -4.0));
        for ranks in 1..=5 {
            let tensors = vec![live("a", &[7, 11], Elements::F32(&a)), live("b", &[2], Elements::F32(&b))];
            let (files, table) = write("m", tensors, ranks).unwrap();
            assert_eq!(files.len(), ranks);
            for (name, bytes) in &files {
                SafeTensors::deserialize(bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            }
            let find = |name: &str| Ok(files.iter().find(|(file, _)| file == name).unwrap().1.clone());
            let stored = StoredTensors::open(&table, &[], find).unwrap();
            assert_eq!(stored.tensor("a", DType::F32, &[7, 11]).unwrap().as_f32(), a);
            assert_eq!(stored.tensor("b", DType::F32, &[2]).unwrap().as_f32(), b);
            assert!(stored.tensor("a", DType::F32, &[11, 7]).is_err());
            assert!(stored.tensor("c", DType::F32, &[1]).is_err());
        }
        assert_eq!(file_name("masters", 4, 3), "masters-00004-of-00004.safetensors");
    }
}
