//! A stage that cannot run because bytes of its inputs are damaged: the stages that made them run again, and it is tried
//! once more. Equal keys have equal outputs, so what they make has the same digests and takes the place of the damage.
//!
//! Damage is seen where bytes are read, by the stage that needs them; a stored result is trusted until then. Each stage is
//! made again once in a walk at most.

use dsv3_core::{Error, ErrorKind, Outcome};
use dsv3_stage::StageEntry;
use dsv3_store::StageResult;

use super::Run;
use crate::{
    cached::{self, Inputs},
    plan::{Plan, PlannedStage, key::KeyRecord},
};

impl Run<'_> {
    /// [`Self::execute`], again for as long as damaged inputs can be made anew.
    pub(super) async fn execute_healed(
        &mut self,
        stage: &PlannedStage,
        entry: &StageEntry,
        record: &KeyRecord,
        inputs: &Inputs,
    ) -> Result<(Outcome, StageResult), Error> {
        loop {
            let ended = self.execute(stage, entry, record, inputs).await;
            let Err(error) = &ended else { return ended };
            if !self.heal_inputs(stage, error).await? {
                return ended;
            }
        }
    }

    /// Makes the damaged inputs of a stage that ended with `error` again. False when there are none.
    ///
    /// # Errors
    /// When a stage that made them may not run here, or fails itself.
    async fn heal_inputs(&mut self, stage: &PlannedStage, error: &Error) -> Result<bool, Error> {
        if error.kind != ErrorKind::Data {
            return Ok(false);
        }
        let mut healed = false;
        let (plan, above) = (self.plan, Plan::upstream(stage));
        for from in plan.stages.iter().filter(|from| above.contains(from.name.as_str())) {
            let Some(result) = self.results.get(&from.name) else { continue };
            let Some(why) = cached::seen_damaged(self.store, result).await? else { continue };
            if !self.selected.contains(&from.name) {
                let help = format!(
                    "stage `{}` made what is damaged; it runs again in a run without --only and --from, or once the damaged \
                     object is deleted",
                    from.name
                );
                return Err(Error::data(error.to_string()).help(help));
            }
            if !self.healed.insert(from.name.clone()) {
                return Ok(false);
            }
            self.warn(&from.name, format!("what this stage made is damaged, so it runs again: {why}"));
            self.reports.retain(|report| report.stage != from.name);
            Box::pin(self.one(from, true)).await?;
            healed = true;
        }
        Ok(healed)
    }

    /// The error of a stage that needs `from`, which has no result that can be used.
    pub(super) fn lacks(&self, stage: &PlannedStage, from: &str) -> Error {
        match self.broken.get(from) {
            None => Error::invalid(format!("stage `{}` needs stage `{from}`, which has not finished", stage.name))
                .help(format!("run `{from}` first, or without --from and --only")),
            Some(why) => {
                let message =
                    format!("stage `{}` needs stage `{from}`, whose result cannot be found: {why}", stage.name);
                Error::data(message).help(format!("run `{from}` again, or without --from and --only: it is made anew"))
            }
        }
    }
}
