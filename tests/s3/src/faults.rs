//! What goes wrong between client and server, by method and part of the request line, a number of times; and a record of
//! the requests that came.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Requests that are remembered.
const REQUESTS_MAX: usize = 100_000;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is answered with this status and does not reach the server.
    Status(u16),
    /// It reaches the server, and the answer is replaced by this status.
    LostAnswer(u16),
    /// The connection is cut before it reaches the server.
    CutBefore,
    /// It reaches the server, and the connection is cut before the answer.
    CutAfter,
    /// Half of the answer's body arrives, then the connection is cut.
    CutBody,
    /// Half of the answer's body arrives and its headers say that this is all.
    ShortBody,
    /// A byte of the answer's body is another.
    FlippedBit,
    /// It waits that long before it reaches the server.
    Stall(Duration),
}

/// A request that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub target: String,
    /// Its `Range` header, or nothing.
    pub range: String,
}

#[derive(Debug)]
struct Rule {
    method: String,
    part: String,
    fault: Fault,
    left: usize,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    requests: Vec<Request>,
    conditions_ignored: bool,
}

/// Faults to come and requests that came. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next `times` requests of `method` (empty: any) whose path and query contain `part` meet `fault`.
    pub fn plan(&self, method: &str, part: &str, fault: Fault, times: usize) {
        let (method, part) = (method.to_owned(), part.to_owned());
        self.state().rules.push(Rule { method, part, fault, left: times });
    }

    /// Takes back what was planned and has not come yet, and heeds conditions again.
    pub fn clear(&self) {
        let mut state = self.state();
        state.rules.clear();
        state.conditions_ignored = false;
    }

    /// Whether the server writes whatever `If-None-Match` says, as some servers do.
    pub fn ignore_conditions(&self, ignored: bool) {
        self.state().conditions_ignored = ignored;
    }

    /// The requests of `method` (empty: any) whose path and query contain `part`, in the order they came.
    pub fn requests(&self, method: &str, part: &str) -> Vec<Request> {
        let fits =
            |request: &&Request| (method.is_empty() || request.method == method) && request.target.contains(part);
        self.state().requests.iter().filter(fits).cloned().collect()
    }

    /// Forgets the requests so far.
    pub fn forget_requests(&self) {
        self.state().requests.clear();
    }

    pub(crate) fn conditions_ignored(&self) -> bool {
        self.state().conditions_ignored
    }

    /// Notes a request and answers what happens to it.
    pub(crate) fn take(&self, request: Request) -> Option<Fault> {
        let mut state = self.state();
        let rule = state.rules.iter_mut().find(|rule| {
            rule.left > 0
                && (rule.method.is_empty() || rule.method == request.method)
                && request.target.contains(&rule.part)
        });
        let fault = rule.map(|rule| {
            rule.left -= 1;
            rule.fault
        });
        if state.requests.len() < REQUESTS_MAX {
            state.requests.push(request);
        }
        fault
    }
}
