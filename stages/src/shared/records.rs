//! Data files given from outside, looked into before anything runs.

use std::path::Path;

use dsv3_core::Error;
use dsv3_data::{RecordKind, check_columns};
use dsv3_stage::{InputFacts, PortFacts, Problems};

/// Files of a port that are opened; a corpus of thousands is alike.
const FILES_MAX: usize = 16;

/// Checks that the port's local files have the columns the stage reads.
pub(crate) fn check_records(facts: &InputFacts, port: &str, kind: RecordKind<'_>, problems: &mut Problems) {
    let files = facts.all(port).iter().flat_map(|one| match one {
        PortFacts::External(files) => files.as_slice(),
        PortFacts::Upstream(_) => &[],
    });
    for file in files.filter(|file| !file.contains("://")).take(FILES_MAX) {
        if let Err(error) = check_columns(Path::new(file), kind) {
            let error = Error::from(error);
            problems.push(format!("inputs.{port}"), super::facts::chain(&error), error.help.unwrap_or_default());
        }
    }
}
