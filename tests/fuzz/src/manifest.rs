//! Records of a store. The first byte says which one; the rest is its text, as it is and, where the record carries a check
//! digest, sealed with the right one, so that what lies behind the check is reached.

use dsv3_core::json_digest;
use dsv3_pipeline::{ALL, Engine, Store};
use dsv3_store::LeaseOptions;
use serde_json::Value;

use super::block_on;

const KEY: &str = "0123456789abcdef";

/// Reads the bytes as records.
pub fn manifest(bytes: &[u8]) {
    let Some((kind, text)) = bytes.split_first() else { return };
    for text in [Some(text.to_vec()), sealed(text)].into_iter().flatten() {
        block_on(read(kind % 6, text));
    }
}

/// The text with its check digest, when it is a JSON map.
fn sealed(text: &[u8]) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(text).ok()?;
    value.as_object_mut()?.remove("check");
    let check = json_digest(&value).to_string();
    value.as_object_mut()?.insert("check".to_owned(), check.into());
    serde_json::to_vec(&value).ok()
}

async fn read(kind: u8, text: Vec<u8>) {
    let store = Store::with_memory();
    let put = async |path: &str| {
        store.create(path, text.clone().into()).await.expect("memory takes everything");
    };
    match kind {
        0 => {
            let digest = store.put_blob(text.clone().into()).await.expect("memory takes everything");
            if let Ok(manifest) = store.manifest(digest).await {
                let _ = (manifest.bytes(), manifest.to_bytes());
            }
        }
        1 => {
            put(&format!("stages/{KEY}/result.json")).await;
            let _ = store.read_result(KEY).await;
        }
        2 => {
            put(&format!("stages/{KEY}/checkpoints/00000001.json")).await;
            let _ = store.find_checkpoint(KEY).await;
        }
        3 => {
            put("runs/r/status/00000001.json").await;
            put("runs/r/events/00000001.jsonl").await;
            let _ = (store.read_status("r").await, store.read_events("r").await);
        }
        4 => {
            put(&format!("stages/{KEY}/leases/00000001.json")).await;
            put(&format!("stages/{KEY}/leases/00000001.end")).await;
            let _ = store.lease_holder(KEY).await;
        }
        _ => {
            put("runs/r/plan.json").await;
            let engine =
                Engine::builder().stages(ALL).store(store.clone()).lease_options(LeaseOptions::default()).build();
            if let Ok(plan) = engine.stored_plan(&store, "r").await {
                let _ = engine.states(&plan).await;
            }
        }
    }
}
