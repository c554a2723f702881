//! The certificate of a sound run: `runs/<id>/certificates/<n>.json`, a sealed record beside the run's plan.
//!
//! It says what was read and done again, by which program on which machine, under which numerics profile. It proves
//! nothing to somebody who distrusts whoever wrote it; it tells a later reader what held, and when.

use dsv3_core::Error;
use dsv3_store::Store;
use serde_json::{Value, json};

use super::Verification;
use crate::{Engine, machine::Machine, plan::Plan};

/// Version of this record.
const FORMAT: u32 = 1;

/// Writes it; answers its path.
pub(super) async fn write(
    engine: &Engine,
    store: &Store,
    plan: &Plan,
    found: &Verification,
    threads: Option<usize>,
) -> Result<String, Error> {
    let mut profiles = serde_json::Map::new();
    for verified in &found.stages {
        let stage = plan.stage(&verified.stage)?;
        if let Ok(entry) = engine.entry(&stage.kind, stage.version) {
            profiles.insert(stage.name.clone(), entry.profile_config(&stage.config)?);
        }
    }
    let body = json!({
        "format": FORMAT,
        "run": found.run,
        "unix_millis": engine.clock.unix_millis(),
        "plan_format": plan.format,
        "objects": found.objects,
        "bytes": found.bytes,
        "stages": found.stages,
        "replay": found.replay,
        "profile": { "device": plan.device, "config": Value::Object(profiles) },
        "machine": Machine::this(threads.or(plan.threads)),
    });
    Ok(store.add_record(&format!("runs/{}/certificates", found.run), &body).await?)
}
