//! Where a trial is disturbed, and how it ended.

use std::{fmt, str::FromStr};

use dsv3_store::faults::{Fault, Operation};
use serde::Serialize;

/// A fault at an operation of a stage. Its text, `STAGE: KIND PATH #NTH FAULT`, reads back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChaosPoint {
    /// Name of the stage.
    pub stage: String,
    /// The operation of the stage's undisturbed run.
    pub operation: Operation,
    /// What it meets.
    pub fault: Fault,
}

impl fmt::Display for ChaosPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.stage, self.operation, self.fault)
    }
}

impl FromStr for ChaosPoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no point: `STAGE: KIND PATH #NTH FAULT` is expected");
        let (stage, rest) = text.split_once(": ").ok_or_else(wrong)?;
        let (operation, fault) = rest.rsplit_once(' ').ok_or_else(wrong)?;
        let fault = Fault::from_name(fault).ok_or_else(wrong)?;
        Ok(Self { stage: stage.to_owned(), operation: operation.parse()?, fault })
    }
}

/// How the disturbed attempt itself ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TrialEnd {
    /// The operation was not met; the attempt ran to its end.
    NotMet,
    /// The attempt went on over the fault to its end.
    Survived,
    /// The attempt ended with an error; the next one went on.
    Stopped,
}

/// One point tried.
#[derive(Clone, Debug)]
pub struct ChaosTrial {
    /// Where.
    pub point: ChaosPoint,
    /// How the disturbed attempt ended.
    pub end: TrialEnd,
    /// Attempts until the stage was finished, the disturbed ones included.
    pub attempts: u32,
    /// Crashes after the first one.
    pub further_crashes: u32,
    /// Attempts that went on from a checkpoint.
    pub resumed: u32,
    /// What is not as in the undisturbed run; none when all is.
    pub problem: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_reads_back() {
        let text = "base: create stages/ab/checkpoints/00000001.json #1 crash-after";
        let point: ChaosPoint = text.parse().unwrap();
        assert_eq!((point.stage.as_str(), point.fault), ("base", Fault::CrashAfter));
        assert_eq!(point.to_string(), text);
        for wrong in ["", "base", "base: create x", "base: create x #1 boom"] {
            assert!(wrong.parse::<ChaosPoint>().is_err(), "{wrong}");
        }
    }
}
