//! Operations as a test names them: `KIND PATH #NTH`, where NTH counts equal kinds and paths from 1.
//!
//! Names do not depend on chance: the id of a run reads `RUN`, a file under `tmp/` is just `tmp`. So the operations of
//! one pipeline have the same names in every run, however its tasks interleave, and a fault can be put at one of them.

use std::{fmt, str::FromStr};

/// What a store is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OperationKind {
    /// A conditional create.
    Create,
    /// An unconditional put.
    Put,
    /// The start of an upload in parts.
    Multipart,
    /// One part of an upload.
    Part,
    /// The end of an upload in parts.
    Complete,
    /// A read of an object or a range of it.
    Get,
    /// A look at an object's length.
    Head,
    /// A listing.
    List,
    /// A deletion.
    Delete,
    /// Local disk: a temporary file is about to be made.
    Stage,
    /// Local disk: the temporary file is written and about to be synced.
    Sync,
    /// Local disk: the synced file is about to get its name.
    Link,
    /// Local disk: the file has its name, its folder is about to be synced.
    SyncFolder,
    /// Local disk: the create is durable and about to be reported.
    Answer,
}

impl OperationKind {
    /// All kinds, in the order of tables.
    pub const ALL: [Self; 14] = [
        Self::Create,
        Self::Put,
        Self::Multipart,
        Self::Part,
        Self::Complete,
        Self::Get,
        Self::Head,
        Self::List,
        Self::Delete,
        Self::Stage,
        Self::Sync,
        Self::Link,
        Self::SyncFolder,
        Self::Answer,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Put => "put",
            Self::Multipart => "multipart",
            Self::Part => "part",
            Self::Complete => "complete",
            Self::Get => "get",
            Self::Head => "head",
            Self::List => "list",
            Self::Delete => "delete",
            Self::Stage => "stage",
            Self::Sync => "sync",
            Self::Link => "link",
            Self::SyncFolder => "sync-folder",
            Self::Answer => "answer",
        }
    }

    /// Whether it is a step of a create on a local disk.
    pub fn is_local(self) -> bool {
        matches!(self, Self::Stage | Self::Sync | Self::Link | Self::SyncFolder | Self::Answer)
    }

    /// Whether it changes an object store.
    pub fn is_write(self) -> bool {
        use OperationKind as K;
        matches!(self, K::Create | K::Put | K::Multipart | K::Part | K::Complete | K::Delete)
    }

    /// Whether it brings bytes to a store.
    pub fn brings_bytes(self) -> bool {
        use OperationKind as K;
        matches!(self, K::Create | K::Put | K::Multipart | K::Part | K::Complete | K::Stage | K::Sync)
    }
}

impl fmt::Display for OperationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One operation of a run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Operation {
    /// What was asked.
    pub kind: OperationKind,
    /// Of which object, with what chance chose left out.
    pub path: String,
    /// The how many-th of this kind on this path, from 1.
    pub nth: u64,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} #{}", self.kind, self.path, self.nth)
    }
}

impl FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no operation: KIND PATH #NTH is expected");
        let (kind, rest) = text.split_once(' ').ok_or_else(wrong)?;
        let (path, nth) = rest.rsplit_once(" #").ok_or_else(wrong)?;
        let kind = OperationKind::ALL.into_iter().find(|known| known.name() == kind).ok_or_else(wrong)?;
        Ok(Self { kind, path: path.to_owned(), nth: nth.parse().map_err(|_| wrong())? })
    }
}

impl Operation {
    /// What the object is in the store's layout: `blob`, `checkpoint`, `lease`, ..
    pub fn class(&self) -> &'static str {
        class(&self.path)
    }
}

/// What an object is in the store's layout, told from its path.
pub fn class(path: &str) -> &'static str {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        ["blobs", ..] => "blob",
        ["tmp", ..] => "temporary file",
        ["stages", _, "checkpoints"] => "checkpoints",
        ["stages", _, "checkpoints", ..] => "checkpoint",
        ["stages", _, "leases"] => "leases",
        ["stages", _, "leases", name] if name.ends_with(".beat") => "beat",
        ["stages", _, "leases", name] if name.ends_with(".end") => "lease end",
        ["stages", _, "leases", ..] => "lease",
        ["stages", _, "profiles", ..] => "profile",
        ["stages", _, "result.json"] => "result",
        ["stages", _, "key.json"] => "key",
        ["runs", _, "plan.json"] => "plan",
        ["runs", _, "status", ..] => "status",
        ["runs", _, "events", ..] => "events",
        _ => "other",
    }
}

/// A path without what chance chose.
pub(super) fn plain_path(path: &str) -> String {
    let mut parts: Vec<&str> = path.split('/').collect();
    match parts.as_mut_slice() {
        ["runs", id, ..] => *id = "RUN",
        ["tmp", ..] => parts.truncate(1),
        _ => {}
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_leave_out_chance() {
        assert_eq!(plain_path("runs/01J9/status/00000001.json"), "runs/RUN/status/00000001.json");
        assert_eq!(plain_path("tmp/0a1b"), "tmp");
        assert_eq!(plain_path("runs"), "runs");
        for kind in OperationKind::ALL {
            let operation = Operation { kind, path: "stages/k/result.json".into(), nth: 3 };
            assert_eq!(operation.to_string().parse::<Operation>(), Ok(operation));
        }
        for wrong in ["", "create", "create a", "create a #b", "fly a #1"] {
            assert!(wrong.parse::<Operation>().is_err(), "{wrong}");
        }
    }
}
