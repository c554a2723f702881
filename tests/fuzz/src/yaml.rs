//! A pipeline's text: read, checked by every stage type, rendered where it is refused, planned where it is not.
//!
//! Slashes are taken out, so that a changed path stays in the folder of the test and no pattern walks the disk.

use std::{path::PathBuf, sync::OnceLock};

use dsv3_pipeline::{ALL, Engine, LoadOptions, Store};

use super::block_on;

/// The one input file that exists.
pub const DOCUMENTS: &str = "documents.jsonl";

struct Bench {
    engine: Engine,
    folder: PathBuf,
}

fn bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder").keep();
        std::fs::write(folder.join(DOCUMENTS), "{\"text\": \"a document\"}\n").expect("written");
        Bench { engine: Engine::builder().stages(ALL).store(Store::with_memory()).build(), folder }
    })
}

/// Reads the bytes as a pipeline file.
pub fn yaml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let text = text.replace('/', "_");
    let Bench { engine, folder } = bench();
    let options = LoadOptions {
        current_dir: folder.clone(),
        env: Some([("HOME".to_owned(), "here".to_owned())].into()),
        at_tokens: vec![1_000_000],
        ..LoadOptions::default()
    };
    match engine.load_text("fuzz.yaml", &text, folder, &options) {
        Ok(spec) => {
            let _ = block_on(engine.plan(spec)).map(|plan| plan.to_bytes().len());
        }
        Err(report) => {
            assert!(!report.problems.is_empty(), "refused without a word");
            let (plain, coloured) = (report.render(false), report.render(true));
            assert!(plain.contains("error") && coloured.len() >= plain.len());
            assert_eq!(report.to_json().len(), report.problems.len());
        }
    }
}
