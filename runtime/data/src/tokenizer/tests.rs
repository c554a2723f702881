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
