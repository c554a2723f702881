//! The tree keeps positions and repeated keys, and hostile texts cost little.

use super::*;
use crate::diagnostics::{Diagnostics, Source, Sources};

fn parse(text: &str) -> (Option<Node>, Vec<String>) {
    let mut sources = Sources::default();
    let index = sources.add(Source::new("p.yaml", text, "."));
    let (node, problems) = read(index, sources.get(index).unwrap());
    let report = Diagnostics::new(sources.clone(), problems);
    (node, report.problems.iter().map(|p| format!("{} {}", sources.locate(p.span), p.message)).collect())
}

#[test]
fn values_keep_their_types_and_places() {
    let (node, problems) = parse("\u{feff}a: [1, 'x', 2.5]\nb:\n  c: true\n  d:\n");
    assert!(problems.is_empty(), "{problems:?}");
    let node = node.unwrap();
    assert_eq!(node.to_json(), serde_json::json!({"a": [1, "x", 2.5], "b": {"c": true, "d": null}}));
    let (c, key, found) = node.follow("b.c");
    assert!(found);
    assert_eq!((c.span.start, key.unwrap().start), (25, 22));
    assert_eq!(node.follow("a[1]").0.text(), Some("x"));
    assert!(!node.follow("b.x.y").2);
}

#[test]
fn a_repeated_key_is_reported_at_its_second_place_and_kept() {
    let (node, problems) = parse("a: 1\nb: 2\na: 3\n");
    assert_eq!(problems, ["p.yaml:3:1 the key `a` stands twice in this map"]);
    assert_eq!(node.unwrap().entries().unwrap().len(), 3);
}

#[test]
fn aliases_and_merges_work() {
    let (node, problems) = parse("base: &b {x: 1, y: 2}\nuse: {<<: *b, y: 3}\nlist: [*b]\n");
    assert!(problems.is_empty(), "{problems:?}");
    let json = node.unwrap().to_json();
    assert_eq!(json["use"], serde_json::json!({"x": 1, "y": 3}));
    assert_eq!(json["list"][0]["y"], 2);
}

#[test]
fn hostile_texts_are_refused_with_a_place() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..20 {
        bomb += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", "));
    }
    let nested = format!("a: {}{}", "[".repeat(5000), "]".repeat(5000));
    let blocks: String = (0..400).map(|i| format!("{}k:\n", " ".repeat(i))).collect();
    let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), vec!["*a"; 100_000].join(", "));
    for (text, part) in [
        (bomb.as_str(), "copies made by aliases"),
        (&long, "64 MB of text, copies made by aliases"),
        (&nested, "nest"),
        (&blocks, "nest"),
        ("a:\n\tb: 1\n", "not YAML"),
        ("a: [1, 2\nb: 3\n", "not YAML"),
        ("a: 'x\n", "not YAML"),
        ("a: *nowhere\n", "not YAML"),
        ("a: &a [*a]\n", "alias"),
        ("a: 1\n---\nb: 2\n", "second document"),
        ("a: !!python/object x\n", ""),
    ] {
        let (_, problems) = parse(text);
        assert!(problems.iter().any(|p| p.contains(part) && p.starts_with("p.yaml:")), "{part}: {problems:?}");
    }
}

#[test]
fn a_text_of_ten_megabytes_ends_soon() {
    let text: String = (0..200_000).map(|i| format!("key{i}: {{a: 1, b: [x, y], c: 'some text here'}}\n")).collect();
    let started = std::time::Instant::now();
    let (_, problems) = parse(&text);
    assert!(problems[0].contains("more than"), "{problems:?}");
    let (node, _) = parse(&format!("a: '{}'\n", "x".repeat(10 << 20)));
    assert!(node.is_some());
    assert!(started.elapsed().as_secs() < 30);
}

#[test]
fn an_argument_is_a_value_with_its_own_places() {
    let source = Source::new("--set", "stages.a.config={x: [1, oops: ]}", ".");
    let (node, problems) = read_argument(0, &source, 16);
    assert!(problems.is_empty());
    assert_eq!(node.follow("x").0.span.start, 20);
    let (node, _) = read_argument(0, &Source::new("--set", "a=*.x: y", "."), 2);
    assert_eq!(node.text(), Some("*.x: y"));
    let (node, _) = read_argument(0, &Source::new("--set", "a=", "."), 2);
    assert_eq!(node.value, Value::Null);
}
