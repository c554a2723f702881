//! Is a stored run what was written? Every object it names is read again and its digest compared; some steps of a training
//! stage are done again and their bits compared; what was found goes into a certificate.

mod certificate;
mod objects;
mod replay;

use dsv3_core::{Cancel, ErrorKind};
use dsv3_store::Store;
use serde::{Deserialize, Serialize};

pub use objects::{Damage, VerifiedStage};
pub use replay::Replay;

use crate::{Engine, error::EngineError};

/// What is to be verified.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// This stage alone; every stage and the run's own records when absent.
    pub stage: Option<String>,
    /// Steps to do again from a checkpoint of the stage.
    pub replay: Option<u64>,
    /// Checkpoint to do them from; the last that another follows when absent.
    pub at: Option<u64>,
    /// Compute threads of the replay.
    pub threads: Option<usize>,
    /// Write nothing, not even the certificate of a sound run.
    pub no_certificate: bool,
    /// Asks to stop.
    pub cancel: Cancel,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Id of the run.
    pub run: String,
    /// Objects read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is wrong, in the order it was met.
    pub damaged: Vec<Damage>,
    /// Stages that were looked at.
    pub stages: Vec<VerifiedStage>,
    /// The steps that were done again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
    /// Path of the certificate in the store; none when something is wrong, when none was wanted, or when the store takes
    /// no write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// Why a sound run has no certificate although one was wanted: the store takes no write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncertified: Option<String>,
}

impl Verification {
    /// Whether nothing is damaged and nothing came out differently.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.replay.as_ref().is_none_or(|replay| replay.differences.is_empty())
    }
}

impl Engine {
    /// Verifies the stored run `id`, from the store alone, and writes a certificate when it is sound.
    ///
    /// # Errors
    /// When the store cannot be read, or holds records of a newer build. Damage is no error: it is reported; so is a store
    /// that takes no certificate.
    pub async fn verify(&self, store: &Store, id: &str, options: &VerifyOptions) -> Result<Verification, EngineError> {
        let mut look = objects::Look::new(store, id);
        let plan = look.run_records().await?;
        let mut found = Verification {
            run: id.to_owned(),
            objects: 0,
            bytes: 0,
            damaged: Vec::new(),
            stages: Vec::new(),
            replay: None,
            certificate: None,
            uncertified: None,
        };
        if let Some(plan) = &plan {
            if let Some(stage) = &options.stage {
                plan.stage(stage)?;
            }
            look.plan_blobs(plan, options.stage.as_deref()).await?;
            for (stage, key) in self.keys(store, id, plan).await? {
                if options.stage.as_ref().is_none_or(|only| *only == stage) {
                    look.stage(&stage, &key, plan).await?;
                }
            }
        }
        (found.objects, found.bytes) = (look.objects, look.bytes);
        (found.damaged, found.stages) = (look.damaged, look.stages);
        if let (Some(steps), Some(plan), true) = (options.replay, &plan, found.damaged.is_empty()) {
            found.replay = Some(self.replay(store, id, plan, steps, options).await?);
        }
        if let Some(plan) = plan.filter(|_| found.is_sound() && !options.no_certificate) {
            match certificate::write(self, store, &plan, &found, options.threads).await {
                Ok(path) => found.certificate = Some(path),
                Err(error) if error.kind == ErrorKind::Unavailable => found.uncertified = Some(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }
}
