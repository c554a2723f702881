//! Files of one and of several ranks, read back, and written again into the same memory.

use safetensors::tensor::TensorView;

use super::*;

fn values(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|i| seed + i as f32 * 0.37).collect()
}

fn live<'a>(name: &str, shape: &[usize], elements: Elements<'a>) -> Live<'a> {
    Live { name: name.to_owned(), role: TensorRole::Master, shape: shape.to_vec(), elements }
}

fn write(group: &str, tensors: Vec<Live<'_>>, ranks: usize) -> (Vec<(String, Bytes)>, Vec<TensorEntry>) {
    let files = Files::of(vec![(group, tensors)], ranks).unwrap();
    (files.write(&Buffers::new(files.lengths())).unwrap(), files.table)
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
    let (files, table) = write("masters", tensors(), 1);
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

/// Larger than one task copies and than a buffer on the heap, so that the memory of the first save is used again.
#[test]
fn nothing_of_the_save_before_is_left_in_the_next_one() {
    let expected = |a: &[f32], b: &[bf16]| {
        let bytes = |list: &[f32]| list.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (a, b) = (bytes(a), b.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        let (rows, half) = (a.len() / 12, b.len() / 2);
        let views = [
            ("a", TensorView::new(Dtype::F32, vec![rows, 3], &a).unwrap()),
            ("b", TensorView::new(Dtype::BF16, vec![half], &b).unwrap()),
        ];
        safetensors::serialize(views, None).unwrap()
    };
    let (mut kept, mut before) = (None, None);
    for round in 0..3 {
        let a = values(3 * (COPY_ELEMENTS * 2 + 7), round as f32);
        let b: Vec<bf16> = values(COPY_ELEMENTS + 3, -round as f32).into_iter().map(bf16::from_f32).collect();
        let tensors = vec![live("a", &[a.len() / 3, 3], Elements::F32(&a)), live("b", &[b.len()], Elements::Bf16(&b))];
        let files = Files::of(vec![("m", tensors)], 1).unwrap();
        let buffers = kept.get_or_insert_with(|| Buffers::new(files.lengths()));
        let written = files.write(buffers).unwrap().remove(0).1;
        assert!(written == expected(&a, &b), "round {round}");
        let start = written.as_ptr() as usize;
        assert_eq!(*before.get_or_insert(start), start, "round {round}: other memory");
    }
}

#[test]
fn every_split_reads_back_and_every_file_is_safetensors() {
    let (a, b) = (values(7 * 11, 1.0), values(2, -4.0));
    for ranks in 1..=5 {
        let tensors = vec![live("a", &[7, 11], Elements::F32(&a)), live("b", &[2], Elements::F32(&b))];
        let (files, table) = write("m", tensors, ranks);
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
