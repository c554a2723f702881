//! A checkpoint of a training stage as the artifact its end would be: the stage publishes it beside the store, and the
//! files come back as bytes.

use dsv3_core::{ArtifactRef, Cancel, Digest, Error, Events, Manifest};
use dsv3_store::Store;

use crate::{
    Engine,
    error::EngineError,
    run::beside::{Beside, Purpose},
};

/// What a checkpoint was published as.
#[derive(Debug)]
pub struct Exported {
    /// Number of the checkpoint.
    pub seq: u64,
    /// Its step.
    pub step: u64,
    /// Digest of the artifact; that of the stage's own output when the checkpoint is its last.
    pub digest: Digest,
    /// Its files.
    pub manifest: Manifest,
    /// Where these files lie: the store with what was published beside it.
    pub store: Store,
}

impl Engine {
    /// Publishes the checkpoint `at` (the newest when absent) of a training stage of the stored run `id` as the model the
    /// stage would end with. The store is only read.
    ///
    /// # Errors
    /// Invalid when the stage writes no checkpoints or makes no model, Data when the checkpoint cannot be used.
    pub async fn export_checkpoint(
        &self,
        store: &Store,
        id: &str,
        stage: &str,
        at: Option<u64>,
        threads: Option<usize>,
        cancel: &Cancel,
    ) -> Result<Exported, EngineError> {
        let plan = self.stored_plan(store, id).await?;
        let beside = Beside::find(self, store, &plan, id, stage).await?;
        let checkpoint = beside.checkpoint(at).await?;
        let (outputs, left) = beside.run(checkpoint.seq, Purpose::Publish, threads, cancel, Events::none()).await?;
        let outputs = outputs.map_err(|error| error.context(format!("stage `{stage}`")))?;
        let model = outputs.as_object().into_iter().flatten().find_map(|(_, output)| {
            let output: ArtifactRef = serde_json::from_value(output.clone()).ok()?;
            (output.kind == "model").then_some(output.digest)
        });
        let digest = model.ok_or_else(|| Error::invalid(format!("stage `{stage}` makes no model")))?;
        let manifest = left.manifest(digest).await?;
        Ok(Exported { seq: checkpoint.seq, step: checkpoint.step, digest, manifest, store: left })
    }
}
