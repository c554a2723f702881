//! A store that fails on demand: what is lost, late, cut, flipped or full, and the crash of the process at any operation.
//!
//! [`Faults::wrap`] gives a second handle on the bytes of a store. Whatever passes through it is logged and may meet a
//! fault that was planned at a path, at a named operation or at an operation's number, or one that a seed draws. A
//! [`Fault::CrashBefore`], [`Fault::CrashAfter`] or [`Fault::Torn`] ends the handle: from then on nothing reaches the store
//! and every call fails, as after the death of its process; a fresh handle on the same store is the next process. On a
//! local disk each step of a create (stage, sync, link, sync the folder, answer) is an operation.
//!
//! Invariant: which fault an operation meets depends on the plan, the seed and the operation's name alone.

mod ground;
mod local;
mod objects;
mod operation;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dsv3_core::Rng;
use object_store::{Error, memory::InMemory};

use crate::Store;

pub use ground::Ground;
pub use objects::FaultyObjects;
pub use operation::{Operation, OperationKind, class};

/// How long a stalled operation waits.
const STALL: Duration = Duration::from_millis(40);

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The operation times out and has no effect.
    Timeout,
    /// The write arrives, its answer times out.
    LostAnswer,
    /// The create arrives, and the answer says that somebody was first: what a client sees that tries again by itself
    /// after a lost answer.
    AlreadyExists,
    /// The store is full.
    Full,
    /// Half of the bytes are written and success is reported.
    Cut,
    /// The store takes no write: it is mounted or granted for reading only.
    ReadOnly,
    /// A read gives half of its bytes and reports success.
    Short,
    /// One bit of what a read gives is another.
    Flip,
    /// The operation takes long, and is done.
    Stall,
    /// A listing fails midway.
    BrokenList,
    /// The process dies before the operation.
    CrashBefore,
    /// The operation arrives and the process dies before the answer.
    CrashAfter,
    /// The process dies while it writes: on a local disk a temporary file stays half written. An object store's put is
    /// whole or not at all, so there this is [`Fault::CrashBefore`].
    Torn,
}

impl Fault {
    /// All faults.
    pub const ALL: [Self; 13] = [
        Self::Timeout,
        Self::LostAnswer,
        Self::AlreadyExists,
        Self::Full,
        Self::Cut,
        Self::ReadOnly,
        Self::Short,
        Self::Flip,
        Self::Stall,
        Self::BrokenList,
        Self::CrashBefore,
        Self::CrashAfter,
        Self::Torn,
    ];
    /// Every way for a process to die.
    pub const CRASHES: [Self; 3] = [Self::CrashBefore, Self::CrashAfter, Self::Torn];
    /// Everything a store may do to a process that lives, short of lying about what it has written.
    pub const TROUBLES: [Self; 9] = [
        Self::Timeout,
        Self::LostAnswer,
        Self::AlreadyExists,
        Self::Full,
        Self::ReadOnly,
        Self::Short,
        Self::Flip,
        Self::Stall,
        Self::BrokenList,
    ];

    /// Its name in reports and arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::LostAnswer => "lost-answer",
            Self::AlreadyExists => "already-exists",
            Self::Full => "full",
            Self::Cut => "cut",
            Self::ReadOnly => "read-only",
            Self::Short => "short",
            Self::Flip => "flip",
            Self::Stall => "stall",
            Self::BrokenList => "broken-list",
            Self::CrashBefore => "crash-before",
            Self::CrashAfter => "crash-after",
            Self::Torn => "torn",
        }
    }

    /// The fault of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// Whether the process ends by it.
    pub fn is_crash(self) -> bool {
        matches!(self, Self::CrashBefore | Self::CrashAfter | Self::Torn)
    }

    /// Whether an operation of this kind can meet it.
    pub fn meets(self, kind: OperationKind) -> bool {
        match self {
            Self::Timeout | Self::Stall => !kind.is_local(),
            Self::CrashBefore => true,
            Self::LostAnswer | Self::CrashAfter => kind.is_write(),
            Self::AlreadyExists => kind == OperationKind::Create,
            Self::Full => kind.brings_bytes(),
            Self::Cut => matches!(kind, OperationKind::Create | OperationKind::Put),
            Self::ReadOnly => kind.is_write() || kind == OperationKind::Stage,
            Self::Short | Self::Flip => kind == OperationKind::Get,
            Self::BrokenList => kind == OperationKind::List,
            Self::Torn => kind == OperationKind::Sync,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where a planned fault strikes.
#[derive(Clone, Debug)]
enum Place {
    /// At every operation on a path that contains this.
    Path(String),
    /// At this operation.
    Operation(Operation),
    /// At the operation with this number, from 1, in the order of arrival.
    Number(u64),
}

#[derive(Debug)]
struct Rule {
    place: Place,
    fault: Fault,
    left: usize,
}

/// Faults drawn by a seed.
#[derive(Debug)]
struct Storm {
    seed: u64,
    per_mille: u64,
    faults: Vec<Fault>,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    storm: Option<Storm>,
    /// Bytes that the store still takes.
    bytes_left: Option<u64>,
    counts: BTreeMap<(OperationKind, String), u64>,
    log: Vec<Operation>,
    struck: Vec<(Operation, Fault)>,
    crashed: bool,
}

/// Faults to come, and the log of what passed. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

/// What an operation meets.
enum Met {
    Nothing,
    Fault(Fault),
    /// The process is dead.
    Dead,
}

impl Faults {
    /// The next `times` operations on objects whose path contains `path`, and which can meet it, end in `fault`.
    pub fn plan(&self, path: &str, fault: Fault, times: usize) {
        self.state().rules.push(Rule { place: Place::Path(path.to_owned()), fault, left: times });
    }

    /// This operation ends in `fault`.
    pub fn plan_at(&self, operation: Operation, fault: Fault) {
        self.state().rules.push(Rule { place: Place::Operation(operation), fault, left: 1 });
    }

    /// The operation with this number, from 1 in the order of arrival, ends in `fault`.
    pub fn plan_number(&self, number: u64, fault: Fault) {
        self.state().rules.push(Rule { place: Place::Number(number), fault, left: 1 });
    }

    /// Of a thousand operations about `per_mille` meet one of `faults`; `seed` and the operation's name say which.
    pub fn storm(&self, seed: u64, per_mille: u64, faults: &[Fault]) {
        self.state().storm = Some(Storm { seed, per_mille, faults: faults.to_vec() });
    }

    /// The store takes this many bytes more and is full then.
    pub fn capacity(&self, bytes: u64) {
        self.state().bytes_left = Some(bytes);
    }

    /// Takes back what was planned and has not come yet. A crash stays.
    pub fn clear(&self) {
        let mut state = self.state();
        state.rules.clear();
        (state.storm, state.bytes_left) = (None, None);
    }

    /// Every operation so far, in the order of arrival.
    pub fn operations(&self) -> Vec<Operation> {
        self.state().log.clone()
    }

    /// The faults that operations have met.
    pub fn struck(&self) -> Vec<(Operation, Fault)> {
        self.state().struck.clone()
    }

    /// Whether the process has died.
    pub fn crashed(&self) -> bool {
        self.state().crashed
    }

    /// A fresh store in memory that fails as planned here.
    pub fn memory(&self) -> Store {
        Store::with_objects("memory://", Arc::new(FaultyObjects::new(Arc::new(InMemory::new()), self.clone())))
    }

    /// Another handle on the bytes of `store`, with nothing in common but them: it fails as planned here.
    pub fn wrap(&self, store: &Store) -> Store {
        let objects = Arc::new(FaultyObjects::new(store.shared_objects(), self.clone()));
        store.over(objects, Some(Arc::new(self.clone())))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the operation and says what it meets. `bytes` is what it brings.
    fn meet(&self, kind: OperationKind, path: &str, bytes: u64) -> Met {
        let mut state = self.state();
        let plain = operation::plain_path(path);
        let count = state.counts.entry((kind, plain.clone())).or_default();
        *count += 1;
        let operation = Operation { kind, path: plain, nth: *count };
        state.log.push(operation.clone());
        if state.crashed {
            return Met::Dead;
        }
        let Some(fault) = state.fault(&operation, path, bytes) else { return Met::Nothing };
        state.struck.push((operation, fault));
        match fault {
            Fault::CrashBefore => {
                state.crashed = true;
                Met::Dead
            }
            Fault::Torn | Fault::CrashAfter => {
                state.crashed = true;
                Met::Fault(fault)
            }
            fault => Met::Fault(fault),
        }
    }
}

impl State {
    fn fault(&mut self, operation: &Operation, path: &str, bytes: u64) -> Option<Fault> {
        let number = self.log.len() as u64;
        let planned = self.rules.iter_mut().find(|rule| {
            let here = match &rule.place {
                Place::Path(part) => path.contains(part.as_str()),
                Place::Operation(at) => at == operation,
                Place::Number(at) => *at == number,
            };
            here && rule.left > 0 && rule.fault.meets(operation.kind)
        });
        if let Some(rule) = planned {
            rule.left = rule.left.saturating_sub(1);
            return Some(rule.fault);
        }
        if let Some(left) = &mut self.bytes_left
            && operation.kind.brings_bytes()
        {
            let fits = bytes <= *left;
            *left = left.saturating_sub(bytes);
            if !fits {
                return Some(Fault::Full);
            }
        }
        let storm = self.storm.as_ref()?;
        let mut rng = Rng::new(storm.seed).key(operation.to_string().as_str());
        let strikes = rng.below(1000) < storm.per_mille;
        let able: Vec<Fault> = storm.faults.iter().copied().filter(|fault| fault.meets(operation.kind)).collect();
        if !strikes || able.is_empty() {
            return None;
        }
        Some(able[rng.below(able.len() as u64) as usize])
    }
}

/// The error of every call after a crash.
#[derive(Debug, thiserror::Error)]
#[error("the process has died here (an injected crash)")]
struct Crashed;

/// What a client of an object store is told.
fn told(fault: Fault, path: &str) -> Error {
    let source = |kind| Box::new(io::Error::from(kind));
    match fault {
        Fault::ReadOnly => {
            Error::PermissionDenied { path: path.to_owned(), source: source(io::ErrorKind::ReadOnlyFilesystem) }
        }
        Fault::AlreadyExists => {
            Error::AlreadyExists { path: path.to_owned(), source: source(io::ErrorKind::AlreadyExists) }
        }
        Fault::Full => Error::Generic { store: "faulty", source: source(io::ErrorKind::StorageFull) },
        fault if fault.is_crash() => Error::Generic { store: "faulty", source: Box::new(Crashed) },
        _ => Error::Generic { store: "faulty", source: source(io::ErrorKind::TimedOut) },
    }
}
