//! Which stages of a plan may run: `--from`, `--only`, `--until`. The others lend their finished results.

use std::collections::BTreeSet;

use dsv3_core::Error;

use crate::plan::Plan;

/// A choice of stages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    /// Every stage.
    #[default]
    All,
    /// One stage alone.
    Only(String),
    /// Stages between two, both included: `from` and what needs it, `until` and what it needs.
    Between {
        /// First stage, if there is one.
        from: Option<String>,
        /// Last stage, if there is one.
        until: Option<String>,
    },
}

impl Selection {
    /// Names of the chosen stages in the plan's order.
    ///
    /// # Errors
    /// Invalid when a name is no stage, or when nothing lies between the two.
    pub fn names(&self, plan: &Plan) -> Result<Vec<String>, Error> {
        let all: BTreeSet<String> = plan.stages.iter().map(|stage| stage.name.clone()).collect();
        let chosen = match self {
            Self::All => all,
            Self::Only(name) => BTreeSet::from([plan.stage(name)?.name.clone()]),
            Self::Between { from, until } => {
                let mut chosen = all;
                if let Some(from) = from {
                    let below = plan.descendants(&plan.stage(from)?.name);
                    chosen.retain(|name| below.contains(name));
                }
                if let Some(until) = until {
                    let above = plan.ancestors(&plan.stage(until)?.name);
                    chosen.retain(|name| above.contains(name));
                }
                if let (true, Some(from), Some(until)) = (chosen.is_empty(), from, until) {
                    return Err(Error::invalid(format!(
                        "stage `{until}` does not need stage `{from}`: nothing is chosen"
                    )));
                }
                chosen
            }
        };
        Ok(plan.stages.iter().map(|stage| stage.name.clone()).filter(|name| chosen.contains(name)).collect())
    }
}
