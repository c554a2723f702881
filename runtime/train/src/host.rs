//! What a run is handed by its stage: events, a clock, a way to be stopped, and a place for checkpoints.

use bytes::Bytes;
use dsv3_core::{Cancel, Clock, Event, Events, Level};
use dsv3_store::{Buffers, Checkpoint, blocking::Save};

use crate::{
    checkpoint::Snapshot,
    error::{Error, Result},
    trainer::Trainer,
};

/// Where checkpoints go and come from.
pub trait CheckpointStore {
    /// The newest valid checkpoint.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn latest(&self) -> Result<Option<Checkpoint>, dsv3_core::Error>;

    /// Content of a file of a checkpoint.
    ///
    /// # Errors
    /// When the file is missing or damaged.
    fn read(&self, checkpoint: &Checkpoint, name: &str) -> Result<Bytes, dsv3_core::Error>;

    /// Commits a checkpoint; durable when this returns.
    ///
    /// # Errors
    /// When the store refuses, or another process has taken over.
    fn save(&self, snapshot: Snapshot) -> Result<(), dsv3_core::Error>;

    /// Takes a snapshot that is to be committed while the run goes on; waits for the one before it.
    ///
    /// # Errors
    /// Those of the one before it.
    fn start(&self, snapshot: Snapshot) -> Result<(), dsv3_core::Error> {
        self.save(snapshot)
    }

    /// Tells the error of a commit that has failed meanwhile; never waits.
    ///
    /// # Errors
    /// As [`Self::save`].
    fn poll(&self) -> Result<(), dsv3_core::Error> {
        Ok(())
    }

    /// Waits until everything that was started is durable.
    ///
    /// # Errors
    /// As [`Self::save`].
    fn finish(&self) -> Result<(), dsv3_core::Error> {
        Ok(())
    }
}

impl CheckpointStore for dsv3_store::blocking::Checkpoints {
    fn latest(&self) -> Result<Option<Checkpoint>, dsv3_core::Error> {
        Ok(Self::latest(self)?)
    }

    fn read(&self, checkpoint: &Checkpoint, name: &str) -> Result<Bytes, dsv3_core::Error> {
        let Some(entry) = checkpoint.file(name) else {
            return Err(dsv3_core::Error::data(format!("checkpoint {} has no file {name}", checkpoint.seq)));
        };
        Ok(Self::read(self, entry)?)
    }

    fn save(&self, snapshot: Snapshot) -> Result<(), dsv3_core::Error> {
        CheckpointStore::start(self, snapshot)?;
        Ok(Self::finish(self)?)
    }

    fn start(&self, snapshot: Snapshot) -> Result<(), dsv3_core::Error> {
        let Snapshot { step, files, tensors, state } = snapshot;
        Ok(Self::start(self, Save { step, files, tensors, state })?)
    }

    fn poll(&self) -> Result<(), dsv3_core::Error> {
        Ok(Self::poll(self)?)
    }

    fn finish(&self) -> Result<(), dsv3_core::Error> {
        Ok(Self::finish(self)?)
    }
}

/// What a run is handed.
#[derive(Clone, Copy)]
pub struct TrainHost<'a> {
    /// Name of the stage in the pipeline, for events.
    pub stage: &'a str,
    /// Where events go.
    pub events: &'a Events,
    /// Asks the run to stop at a checkpoint.
    pub cancel: &'a Cancel,
    /// Read for rates and checkpoint intervals only; nothing of it reaches the state.
    pub clock: &'a dyn Clock,
    /// Checkpoints of the stage.
    pub checkpoints: &'a dyn CheckpointStore,
    /// The newest checkpoint is the end: no step is taken, so that the stage publishes it as it is.
    pub as_it_is: bool,
}

impl TrainHost<'_> {
    pub(crate) fn metric(&self, name: &str, step: u64, value: f64) {
        let (stage, name) = (self.stage.to_owned(), name.to_owned());
        self.events.emit(Event::Metric { stage, name, step, value });
    }

    pub(crate) fn progress(&self, done: u64, total: u64, unit: &str) {
        let (stage, unit) = (self.stage.to_owned(), unit.to_owned());
        self.events.emit(Event::Progress { stage, done, total: Some(total), unit });
    }

    pub(crate) fn log(&self, level: Level, message: String) {
        self.events.emit(Event::Log { stage: self.stage.to_owned(), level, message });
    }

    /// Newest checkpoint of the stage.
    pub(crate) fn latest(&self) -> Result<Option<Checkpoint>> {
        self.checkpoints.latest().map_err(|source| Error::Store { source })
    }

    /// Puts a checkpoint's content in place of the trainer's.
    pub(crate) fn restore(&self, trainer: &mut Trainer, checkpoint: &Checkpoint) -> Result<()> {
        trainer.restore(&checkpoint.state, &checkpoint.tensors, |name| self.checkpoints.read(checkpoint, name))
    }

    /// Copies the trainer out and hands the copy over, to be committed while the run goes on. All the time this takes is
    /// time that no step is taken in.
    pub(crate) fn save(&self, trainer: &Trainer, buffers: &Buffers, ranks: usize) -> Result<()> {
        let started = self.clock.monotonic();
        // The copy before is gone when this one is made: at most one is held, and its memory is used again.
        self.finish()?;
        let snapshot = trainer.snapshot_into(buffers, ranks)?;
        let step = snapshot.step;
        self.checkpoints.start(snapshot).map_err(|source| Error::Store { source })?;
        let stalled = self.clock.monotonic().saturating_sub(started);
        self.metric("checkpoint_stall_seconds", step, stalled.as_secs_f64());
        Ok(())
    }

    /// The error of a save that has failed meanwhile.
    pub(crate) fn poll(&self) -> Result<()> {
        self.checkpoints.poll().map_err(|source| Error::Store { source })
    }

    /// Waits for the save in flight.
    pub(crate) fn finish(&self) -> Result<()> {
        self.checkpoints.finish().map_err(|source| Error::Store { source })
    }
}
