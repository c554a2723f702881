//! Any number of writers, any number of readers; tables that do not tile.

use bytes::Bytes;
use serde_json::json;

use super::*;

/// A tensor of odd numbers, its rows dealt to `ranks` files.
fn tensor(name: &str, role: TensorRole, dtype: TensorType, shape: &[u64]) -> TensorEntry {
    TensorEntry { name: name.into(), role, dtype, shape: shape.to_vec(), slices: Vec::new() }
}

fn content(entry: &TensorEntry) -> Vec<u8> {
    let bytes = entry.rows() * entry.row_bytes();
    (0..bytes).map(|i| (i * 7 + i / 251 + entry.name.len() as u64) as u8).collect()
}

fn table() -> Vec<TensorEntry> {
    use TensorRole::{Master, Moment, RouterBias};
    vec![
        tensor("experts", Master, TensorType::F32, &[5, 3, 2]),
        tensor("embedding", Master, TensorType::F32, &[13, 4]),
        tensor("few", Master, TensorType::F32, &[2, 7]),
        tensor("norm", Master, TensorType::F32, &[3]),
        tensor("scalar", Master, TensorType::F32, &[]),
        tensor("bias", RouterBias, TensorType::F32, &[8]),
        tensor("first.embedding", Moment, TensorType::Bf16, &[13, 4]),
    ]
}

/// Stores the table as `ranks` ranks would.
async fn save(store: &Store, ranks: u64) -> Checkpoint {
    let mut tensors = table();
    let mut files = Vec::new();
    for rank in 0..ranks {
        let (path, mut bytes) = (format!("shard-{rank}"), Vec::new());
        for entry in &mut tensors {
            let rows = entry.rows_of(ranks, rank);
            if rows.is_empty() {
                continue;
            }
            let (row, at) = (entry.row_bytes(), bytes.len() as u64);
            let held = part(&content(entry), rows.start * row, (rows.end - rows.start) * row).unwrap().to_vec();
            let (mut offsets, mut lengths) = (vec![0; entry.shape.len()], entry.shape.clone());
            if let (Some(offset), Some(length)) = (offsets.first_mut(), lengths.first_mut()) {
                (*offset, *length) = (rows.start, rows.end - rows.start);
            }
            let digest = Some(Digest::of(&held));
            let range = [at, at + held.len() as u64];
            entry.slices.push(TensorSlice { file: path.clone(), offsets, lengths, bytes: range, digest });
            bytes.extend(held);
        }
        let length = bytes.len() as u64;
        let digest = store.put_blob(Bytes::from(bytes)).await.unwrap();
        files.push(FileEntry { path, digest, bytes: length });
    }
    let checkpoint = Checkpoint { seq: 1, step: 3, state: json!({"cursor": 9}), files, tensors };
    store.commit_checkpoint(&format!("key-{ranks}"), 1, &checkpoint).await.unwrap();
    store.find_checkpoint(&format!("key-{ranks}")).await.unwrap().checkpoint.unwrap()
}

#[tokio::test]
async fn saves_of_any_number_of_ranks_load_into_any_other_bit_for_bit() {
    let store = Store::with_memory();
    for writers in 1..=6 {
        let checkpoint = save(&store, writers).await;
        assert_eq!(checkpoint.files.len() as u64, writers);
        for readers in 1..=6 {
            for entry in &checkpoint.tensors {
                let mut together = Vec::new();
                for rank in 0..readers {
                    let rows = entry.rows_of(readers, rank);
                    together.extend(store.read_rows(&checkpoint, &entry.name, rows).await.unwrap());
                }
                assert!(together == content(entry), "{} from {writers} to {readers}", entry.name);
            }
        }
    }
}

#[test]
fn ranks_share_rows_evenly_and_some_have_none() {
    let rows = |rows, ranks| (0..ranks).map(|rank| rows_of_rank(rows, ranks, rank)).collect::<Vec<_>>();
    assert_eq!(rows(13, 4), [0..3, 3..6, 6..9, 9..13]);
    assert_eq!(rows(2, 3), [0..0, 0..1, 1..2]);
    assert_eq!(rows(u64::MAX, 2)[1].end, u64::MAX);
}

#[tokio::test]
async fn boxes_in_several_dimensions_are_put_together() {
    let mut entry = tensor("w", TensorRole::Master, TensorType::Bf16, &[4, 5]);
    let whole = content(&entry);
    let boxes = [([0, 0], [4, 2]), ([0, 2], [1, 3]), ([1, 2], [3, 3])];
    let mut held = Vec::new();
    for (i, (offsets, lengths)) in boxes.iter().enumerate() {
        let mut bytes = Vec::new();
        for row in offsets[0]..offsets[0] + lengths[0] {
            bytes.extend_from_slice(part(&whole, (row * 5 + offsets[1]) * 2, lengths[1] * 2).unwrap());
        }
        let range = [0, bytes.len() as u64];
        let (offsets, lengths) = (offsets.to_vec(), lengths.to_vec());
        entry.slices.push(TensorSlice { file: i.to_string(), offsets, lengths, bytes: range, digest: None });
        held.push(bytes);
    }
    let entry_of = |i: usize| FileEntry { path: i.to_string(), digest: Digest::of(&held[i]), bytes: 100 };
    let files: Vec<FileEntry> = (0..3).map(entry_of).collect();
    entry.check(&files).unwrap();
    let rows = 1..4;
    let mut to = vec![0; 30];
    for slice in entry.slices_of(&rows) {
        entry.copy(slice, &held[slice.file.parse::<usize>().unwrap()], &rows, &mut to).unwrap();
    }
    assert_eq!(to, whole[10..]);
}

/// Each of these would load as something else; each is named.
#[tokio::test]
async fn missing_and_overlapping_slices_are_named() {
    let store = Store::with_memory();
    let good = save(&store, 4).await;
    let at = good.tensors.iter().position(|tensor| tensor.name == "embedding").unwrap();
    let broken = |change: &dyn Fn(&mut TensorEntry)| {
        let mut tensors = good.tensors.clone();
        change(&mut tensors[at]);
        check_table(&tensors, &good.files).unwrap_err()
    };
    let said = broken(&|tensor| drop(tensor.slices.remove(1)));
    assert!(said.contains("embedding") && said.contains("rows 3..6 are missing"), "{said}");
    let said = broken(&|tensor| tensor.slices[1].offsets[0] = 2);
    assert!(said.contains("[2, 0]+[3, 4] in shard-1 overlaps slice [0, 0]+[3, 4] in shard-0"), "{said}");
    let said = broken(&|tensor| tensor.slices[3].offsets[0] = 12);
    assert!(said.contains("leaves the shape [13, 4]"), "{said}");
    let said = broken(&|tensor| tensor.slices[3].bytes[1] += 4);
    assert!(said.contains("has the bytes"), "{said}");
    let said = broken(&|tensor| tensor.slices[2].file = "shard-9".into());
    assert!(said.contains("a file that the checkpoint does not have"), "{said}");
    let said = broken(&|tensor| tensor.slices[0].lengths = vec![3]);
    assert!(said.contains("another number of dimensions"), "{said}");
    let said = broken(&|tensor| (tensor.shape, tensor.slices) = (vec![u64::MAX, 3], Vec::new()));
    assert!(said.contains("claims the shape"), "{said}");
    let twice = check_table(&[good.tensors[at].clone(), good.tensors[at].clone()], &good.files).unwrap_err();
    assert!(twice.contains("stands twice"), "{twice}");
    // A record with such a table is never written, and one that was written elsewhere is a damaged one.
    let mut tensors = good.tensors.clone();
    tensors[at].slices.remove(0);
    let error = store.commit_checkpoint("k", 1, &Checkpoint { tensors, ..good.clone() }).await.unwrap_err();
    assert!(error.to_string().contains("rows 0..3 are missing"), "{error}");
}

#[tokio::test]
async fn a_slice_of_other_bytes_is_named_although_its_file_was_believed() {
    let store = Store::with_memory();
    let mut checkpoint = save(&store, 2).await;
    let tensor = checkpoint.tensors.iter_mut().find(|tensor| tensor.name == "experts").unwrap();
    tensor.slices[1].digest = Some(Digest::of(b"other"));
    assert!(store.read_rows(&checkpoint, "experts", 0..2).await.is_ok());
    let error = store.read_rows(&checkpoint, "experts", 1..3).await.unwrap_err().to_string();
    assert!(error.contains("experts") && error.contains("shard-1"), "{error}");
    assert!(store.read_rows(&checkpoint, "experts", 0..6).await.is_err());
    assert!(store.read_rows(&checkpoint, "nothing", 0..1).await.is_err());
}
