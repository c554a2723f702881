//! The steps of a durable create on a local disk, as operations that fail as planned.

use std::{fs::OpenOptions, io, path::Path};

use super::{Crashed, Fault, Faults, Met, OperationKind as Kind};
use crate::local::{Step, Steps};

impl Steps for Faults {
    fn step(&self, step: Step, path: &str, staged: &Path) -> io::Result<()> {
        let (kind, bytes) = match step {
            Step::Stage => (Kind::Stage, 0),
            Step::Sync => (Kind::Sync, staged.metadata().map_or(0, |data| data.len())),
            Step::Link => (Kind::Link, 0),
            Step::SyncFolder => (Kind::SyncFolder, 0),
            Step::Answer => (Kind::Answer, 0),
        };
        match self.meet(kind, path, bytes) {
            Met::Nothing => Ok(()),
            Met::Dead => Err(io::Error::other(Crashed)),
            Met::Fault(Fault::Full) => Err(io::ErrorKind::StorageFull.into()),
            Met::Fault(Fault::ReadOnly) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Met::Fault(Fault::Torn) => {
                let file = OpenOptions::new().write(true).open(staged)?;
                file.set_len(file.metadata()?.len() / 2)?;
                Err(io::Error::other(Crashed))
            }
            Met::Fault(_) => Ok(()),
        }
    }

    fn is_dead(&self) -> bool {
        self.crashed()
    }
}
