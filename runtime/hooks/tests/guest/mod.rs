//! Guests written in WebAssembly text, as components: the bodies of `judge` or `score` around a common allocator and
//! `configure`. The tests of this crate and those of whole pipelines (`tests/`) build theirs here.

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};

/// Memory, an allocator that aligns to 8, and the `configure` every world has.
fn common(interface: &str) -> String {
    format!(
        r#"(memory (export "memory") 2)
  (global $top (mut i32) (i32.const 65536))
  (func $alloc (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
    (global.set $top (i32.add (local.get $at) (local.get 3)))
    (if (i32.gt_u (global.get $top) (i32.mul (memory.size) (i32.const 65536)))
      (then (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))))
    (local.get $at))
  (func (export "dsv3:hooks/{interface}@0.1.0#configure") (param i32 i32) (result i32)
    (i32.store8 (i32.const 16) (i32.const 0)) (i32.const 16))
  (func $recurse (param i32) (result i32)
    (i32.add (call $recurse (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))"#
    )
}

/// The module `text` as a component of `world`.
fn component(text: &str, world: &str) -> Vec<u8> {
    let mut module = wat::parse_str(text).expect("a module");
    let mut resolve = wit_parser::Resolve::default();
    let wit = include_str!("../../../../schemas/hooks/hooks.wit");
    let package = resolve.push_str("hooks.wit", wit).expect("the package");
    let world = resolve.select_world(&[package], Some(world)).expect("the world");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("metadata");
    ComponentEncoder::default().module(&module).expect("a module").encode().expect("a component")
}

/// A `document-filter` whose `judge` runs `body`, with `$n` documents. `$answer` makes an `ok` answer of `$n` actions that
/// all equal its second parameter, with empty notes: actions and their number at 36 and 40, note bytes at 44 and 48,
/// offsets at 52 and 56. The first data byte of the batch is `(i32.load8_u (local.get $data))`.
pub(crate) fn filter(body: &str) -> Vec<u8> {
    let common = common("filter");
    let text = format!(
        r#"(module
  {common}
  (func $answer (param $n i32) (param $action i32) (result i32)
    (local $actions i32) (local $offsets i32)
    (local.set $actions (call $alloc (i32.const 0) (i32.const 0) (i32.const 1) (local.get $n)))
    (local.set $offsets (call $alloc (i32.const 0) (i32.const 0) (i32.const 4)
      (i32.mul (i32.add (local.get $n) (i32.const 1)) (i32.const 4))))
    (memory.fill (local.get $actions) (local.get $action) (local.get $n))
    (memory.fill (local.get $offsets) (i32.const 0) (i32.mul (i32.add (local.get $n) (i32.const 1)) (i32.const 4)))
    (i32.store (i32.const 32) (i32.const 0))
    (i32.store (i32.const 36) (local.get $actions)) (i32.store (i32.const 40) (local.get $n))
    (i32.store (i32.const 44) (i32.const 0)) (i32.store (i32.const 48) (i32.const 0))
    (i32.store (i32.const 52) (local.get $offsets)) (i32.store (i32.const 56) (i32.add (local.get $n) (i32.const 1)))
    (i32.const 32))
  (func (export "dsv3:hooks/filter@0.1.0#judge")
    (param $data i32) (param $data_len i32) (param $offsets i32) (param $offsets_len i32) (result i32)
    (local $n i32)
    (local.set $n (i32.sub (local.get $offsets_len) (i32.const 1)))
    {body}))"#
    );
    component(&text, "document-filter")
}

/// A `reward` whose `score` runs `body` on the `$n` items at `$items`: 16 bytes for each of the four texts (data, its
/// length, offsets, their length), completions second. `$answer` makes an `ok` answer of `$n` totals that all equal its
/// second parameter, without parts: totals and their number at 36 and 40, part names at 44 and 48, parts at 52 and 56.
pub(crate) fn reward(body: &str) -> Vec<u8> {
    let common = common("rewards");
    let text = format!(
        r#"(module
  {common}
  (func $answer (param $n i32) (param $total f64) (result i32)
    (local $i i32) (local $totals i32)
    (local.set $totals (call $alloc (i32.const 0) (i32.const 0) (i32.const 8) (i32.mul (local.get $n) (i32.const 8))))
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
      (f64.store (i32.add (local.get $totals) (i32.mul (local.get $i) (i32.const 8))) (local.get $total))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $next)))
    (i32.store (i32.const 32) (i32.const 0))
    (i32.store (i32.const 36) (local.get $totals)) (i32.store (i32.const 40) (local.get $n))
    (i32.store (i32.const 44) (i32.const 8)) (i32.store (i32.const 48) (i32.const 0))
    (i32.store (i32.const 52) (i32.const 8)) (i32.store (i32.const 56) (i32.const 0))
    (i32.const 32))
  (func (export "dsv3:hooks/rewards@0.1.0#score") (param $items i32) (result i32)
    (local $n i32) (local $i i32) (local $at i32) (local $end i32) (local $sum i32) (local $totals i32)
    (local.set $n (i32.sub (i32.load offset=28 (local.get $items)) (i32.const 1)))
    {body}))"#
    );
    component(&text, "reward")
}

/// An endless loop.
pub(crate) const ENDLESS: &str = "(loop $again (br $again)) unreachable";

/// Allocates until it is refused.
pub(crate) const GREEDY: &str = "(loop $again (drop (call $alloc (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 65536))) \
     (br $again)) unreachable";

/// Calls itself until the stack ends.
pub(crate) const DEEP: &str = "(call $recurse (i32.const 0))";

/// Broken answers of a filter: body, and what the error says of it for a single document.
pub(crate) fn broken_verdicts() -> Vec<(String, &'static str)> {
    let keep = "(drop (call $answer (local.get $n) (i32.const 1)))";
    // One note of one byte that begins a character and does not end it.
    let note = "(i32.store8 (i32.const 64) (i32.const 0xC3)) (i32.store (i32.const 44) (i32.const 64)) \
         (i32.store (i32.const 48) (i32.const 1))";
    let end = |offset: u32| {
        format!(
            "(i32.store (i32.add (i32.load (i32.const 52)) (i32.mul (local.get $n) (i32.const 4))) (i32.const {offset}))"
        )
    };
    vec![
        ("(call $answer (i32.add (local.get $n) (i32.const 1)) (i32.const 0))".to_owned(), "2 actions for 1 documents"),
        ("(call $answer (i32.const 0) (i32.const 0))".to_owned(), "0 actions for 1 documents"),
        ("(call $answer (local.get $n) (i32.const 9))".to_owned(), "action 9 of document 0"),
        (format!("{keep} {} (i32.const 32)", end(99)), "offsets 0..99 of item 0"),
        (format!("{keep} (i32.store (i32.const 56) (i32.const 1)) (i32.const 32)"), "1 offsets for 1 items"),
        (format!("{keep} {note} {} (i32.const 32)", end(1)), "text of item 0 is not UTF-8"),
        (format!("{keep} (i32.store (i32.const 36) (i32.const -1)) (i32.const 32)"), "out of bounds"),
    ]
}

/// Broken answers of a reward: body, and what the error says of it for a single completion.
pub(crate) fn broken_scores() -> Vec<(String, &'static str)> {
    let one = "(drop (call $answer (local.get $n) (f64.const 1)))";
    // One part name of one byte at 64, one part a completion at 96.
    let part = |byte: u32, value: &str| {
        format!(
            "{one} (i32.store8 (i32.const 64) (i32.const {byte})) (i32.store (i32.const 72) (i32.const 64)) \
             (i32.store (i32.const 76) (i32.const 1)) (i32.store (i32.const 44) (i32.const 72)) \
             (i32.store (i32.const 48) (i32.const 1)) (f64.store (i32.const 96) (f64.const {value})) \
             (i32.store (i32.const 52) (i32.const 96)) (i32.store (i32.const 56) (i32.const 1)) (i32.const 32)"
        )
    };
    vec![
        ("(call $answer (local.get $n) (f64.const nan))".to_owned(), "the reward of item 0 is NaN"),
        ("(call $answer (local.get $n) (f64.const -inf))".to_owned(), "the reward of item 0 is -inf"),
        ("(call $answer (i32.add (local.get $n) (i32.const 1)) (f64.const 0))".to_owned(), "2 totals and 0 parts"),
        ("(call $answer (i32.const 0) (f64.const 0))".to_owned(), "0 totals and 0 parts"),
        (format!("{one} (i32.store (i32.const 56) (i32.const 1)) (i32.const 32)"), "1 totals and 1 parts for 1 items"),
        (part(b'p'.into(), "nan"), "part `p` of item 0 is NaN"),
        (part(0xC3, "1"), "utf-8"),
    ]
}
