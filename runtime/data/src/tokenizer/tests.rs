//! Training, round trips, special tokens, streaming decoding.

use super::*;

fn trained() -> Tokenizer {
    let documents = (0..200).map(|i| format!("Sam has {} shells. héllo wörld {i}", i % 20));
    Tokenizer::train(documents, &TrainOptions::new(330)).unwrap()
}

#[test]
fn specials_are_the_first_ids_and_bytes_round_trip() {
    let t = trained();
    assert_eq!(t.vocab_size(), 330);
    let ids: Vec<u32> = t.specials().present().into_values().collect();
    assert_eq!(
        {
            let mut sorted = ids.clone();
            sorted.sort_unstable();
            sorted
        },
        (0..10).collect::<Vec<u32>>()
    );
    for text in ["Sam has 7 shells.", "日本語 \u{1F600}\n\t x", "", "  double  space "] {
        assert_eq!(t.decode(&t.encode(text).unwrap()), text);
    }
}

#[test]
fn only_chat_text_makes_special_tokens() {
    let t = trained();
    let text = "<think> 1 + 1 = 2</think>";
    assert!(t.encode(text).unwrap().iter().all(|id| *id >= 10));
    let ids = t.encode_chat(text).unwrap();
    assert_eq!((ids.first(), ids.last()), (Some(&5), Some(&6)));
    assert_eq!((t.decode(&ids).as_str(), t.decode(&t.encode(text).unwrap()).as_str()), (text, text));
}

#[test]
fn training_is_deterministic_and_reloads() {
    let (a, b) = (trained(), trained());
    assert_eq!(a.to_bytes(), b.to_bytes());
    let again = Tokenizer::from_bytes(a.to_bytes()).unwrap();
    assert_eq!(again.encode("Sam has 19 shells").unwrap(), a.encode("Sam has 19 shells").unwrap());
    assert!(Tokenizer::train(["x"].iter(), &TrainOptions::new(200)).is_err());
    assert!(Tokenizer::from_bytes(b"{").is_err());
}

#[test]
fn a_word_level_tokenizer_works() {
    let vocab: serde_json::Map<String, serde_json::Value> = (0..20).map(|i| (format!("t{i}"), i.into())).collect();
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    });
    let mut t = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    t.read_config(br#"{"bos_token": "t0", "eos_token": {"content": "t1"}}"#).unwrap();
    assert_eq!((t.specials().bos, t.specials().eos), (Some(0), Some(1)));
    let ids = t.encode("t5 t6 word t7").unwrap();
    assert_eq!(ids, [5, 6, 0, 7]);
    assert_eq!((t.decode(&ids).as_str(), t.decode_token(7).as_str()), ("t5 t6 t0 t7", "t7"));
    let mut stream = Incremental::new();
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(&t, *id)).collect();
    assert_eq!(pieces, ["t5", " t6", " t0", " t7"]);
}

#[test]
fn streamed_pieces_join_to_the_whole_text() {
    let t = trained();
    let text = "wörld 日本 \u{1F600} Sam has 3 <think>ok</think>";
    let ids = t.encode_chat(text).unwrap();
    let mut stream = Incremental::new();
    let mut joined: String = ids.iter().map(|id| stream.push(&t, *id)).collect();
    joined += &stream.finish(&t);
    assert_eq!(joined, text);
    let cut = &t.encode("é").unwrap()[..1];
    let mut stream = Incremental::new();
    if t.decode(cut) == "\u{FFFD}" {
        assert_eq!((stream.push(&t, cut[0]).as_str(), stream.finish(&t).as_str()), ("", "\u{FFFD}"));
    }
    let bytes: Vec<u8> = t.encode("日 x").unwrap().iter().flat_map(|id| t.token_bytes(*id)).collect();
    assert_eq!(bytes, "日 x".as_bytes());
}

#[test]
fn a_role_makes_a_token_special_even_where_the_file_does_not() {
    let mut json: serde_json::Value = serde_json::from_slice(trained().to_bytes()).unwrap();
    for token in json["added_tokens"].as_array_mut().unwrap() {
        token["special"] = (token["content"] != "<think>").into();
    }
    let t = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    assert_eq!(t.encode_chat("<think>").unwrap(), [5]);
    assert!(t.encode("a<think>b").unwrap().iter().all(|id| *id >= 10));
    assert!(t.spells_special("a<think>b"));
}

/// Words, numbers, other scripts, long spaces, and stretches where nothing changes for a while.
fn long_text(bytes: usize) -> String {
    let mut rng = dsv3_core::Rng::new(9);
    let mut text = String::with_capacity(bytes + 4096);
    while text.len() < bytes {
        match rng.below(8) {
            0 => text += &rng.next_u64().to_string(),
            1 => text += "日本語のテキスト。",
            2 => text += &" ".repeat(1 + rng.below(2000) as usize),
            3 => text += &"x".repeat(1 + rng.below(3000) as usize),
            4 => text += "\n\n\t\r\n",
            5 => text += "e\u{301} \u{1F600}, don't; (a) --- ",
            _ => text += ["Sam ", "has", " shells. ", "wörld"][rng.below(4) as usize],
        }
    }
    text
}

#[test]
fn the_tokens_of_a_long_text_are_those_of_its_pieces() {
    let t = trained();
    let text = long_text(3 * PIECE_BYTES);
    let pieces: Vec<&str> = t.pieces(&text).collect::<Result<_>>().unwrap();
    assert!(pieces.len() >= 3 && pieces.concat() == text);
    let lengths: Vec<usize> = pieces.iter().map(|piece| piece.len()).collect();
    assert!(lengths.iter().all(|length| *length < 2 * PIECE_BYTES), "{lengths:?}");
    let apart: Vec<u32> = pieces.iter().flat_map(|piece| t.encode(piece).unwrap()).collect();
    assert!(apart == t.encode(&text).unwrap());
    let short = &text[..t.pieces(&text).next().unwrap().unwrap().len() / 2];
    let pieces: Vec<&str> = t.pieces(short).collect::<Result<_>>().unwrap();
    assert_eq!(pieces, [short], "a text of ordinary length is one piece");
    assert_eq!(t.pieces("").count(), 0);
}

#[test]
fn a_text_that_cannot_be_cut_is_one_piece_or_refused() {
    let t = trained();
    let dull = "x".repeat(UNCUT_BYTES_MAX);
    assert_eq!(t.pieces(&dull).map(|piece| piece.unwrap().len()).collect::<Vec<_>>(), [UNCUT_BYTES_MAX]);
    let longer = dull + "x";
    let pieces: Vec<Result<&str>> = t.pieces(&longer).collect();
    assert!(matches!(&pieces[..], [Err(error)] if error.to_string().contains("8 MiB")), "{pieces:?}");
    // A tokenizer that puts a mark before every text it is given cannot be cut at all.
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Prepend", "prepend": "^"}, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": {"^": 0, "a": 1, " ": 2}, "merges": [], "unk_token": "a"}
    });
    let t = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    let text = "a a ".repeat(PIECE_BYTES);
    assert_eq!(t.pieces(&text).collect::<Result<Vec<_>>>().unwrap(), [&text]);
}

#[test]
fn a_long_document_teaches_what_it_would_teach_whole() {
    let split =
        Split::new(SplitPattern::Regex(SPLIT_PATTERN.to_owned()), SplitDelimiterBehavior::Isolated, false).unwrap();
    let words = |text: &str| {
        let mut text = PreTokenizedString::from(text);
        split.pre_tokenize(&mut text).unwrap();
        let words = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        words.into_iter().map(|(word, _, _)| word.to_owned()).collect::<Vec<_>>()
    };
    let text = long_text(3 * PIECE_BYTES);
    let parts = parts(&text, |left: &str, right: &str| splits(&split, left, right));
    assert!(parts.len() >= 3);
    assert!(parts.iter().flat_map(|part| words(part.as_ref())).collect::<Vec<_>>() == words(&text));
}

#[test]
fn a_file_that_cuts_texts_to_a_length_cuts_none_of_ours() {
    let mut json: serde_json::Value = serde_json::from_slice(trained().to_bytes()).unwrap();
    json["truncation"] =
        serde_json::json!({"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 2, "pad_type_id": 0,
        "pad_token": "a"
    });
    let t = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    let text = "Sam has 19 shells and some more words";
    assert_eq!(t.encode(text).unwrap(), trained().encode(text).unwrap());
    assert_eq!(t.encode_chat(text).unwrap(), trained().encode_chat(text).unwrap());
}
