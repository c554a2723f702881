//! What is known before anything runs: facts about inputs and outputs, and the problems a stage finds in them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// What is known of one artifact at a port.
#[derive(Clone, Debug, PartialEq)]
pub enum PortFacts {
    /// It comes from another stage, which says this about it (null when it says nothing).
    Upstream(Value),
    /// It is external: absolute paths or URIs of its files, sorted.
    External(Vec<String>),
}

/// What is known of the inputs, by port, and which hook ports are filled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputFacts {
    inputs: BTreeMap<String, Vec<PortFacts>>,
    hooks: BTreeSet<String>,
}

impl InputFacts {
    /// Adds an artifact to a port.
    pub fn push(&mut self, port: &str, facts: PortFacts) {
        self.inputs.entry(port.to_owned()).or_default().push(facts);
    }

    /// Says that the pipeline gives the stage a hook at this port.
    pub fn push_hook(&mut self, port: &str) {
        self.hooks.insert(port.to_owned());
    }

    /// Whether the pipeline gives the stage a hook at this port.
    pub fn has_hook(&self, port: &str) -> bool {
        self.hooks.contains(port)
    }

    /// All artifacts of a port.
    pub fn all(&self, port: &str) -> &[PortFacts] {
        self.inputs.get(port).map_or(&[], Vec::as_slice)
    }

    /// Whether the port is connected.
    pub fn has(&self, port: &str) -> bool {
        !self.all(port).is_empty()
    }

    /// What the upstream stage says of the port's first artifact.
    pub fn upstream(&self, port: &str) -> Option<&Value> {
        match self.all(port).first()? {
            PortFacts::Upstream(facts) => Some(facts),
            PortFacts::External(_) => None,
        }
    }

    /// One fact of the port's first artifact.
    pub fn fact(&self, port: &str, name: &str) -> Option<&Value> {
        self.upstream(port)?.get(name)
    }

    /// Files of the port's first artifact when it is external.
    pub fn external(&self, port: &str) -> Option<&[String]> {
        match self.all(port).first()? {
            PortFacts::Upstream(_) => None,
            PortFacts::External(files) => Some(files),
        }
    }

    /// The external file called `name`, as a local path; none for a URI.
    pub fn external_file(&self, port: &str, name: &str) -> Option<&std::path::Path> {
        let is_it = |file: &&String| file.rsplit('/').next() == Some(name) && !file.contains("://");
        self.external(port)?.iter().find(is_it).map(std::path::Path::new)
    }
}

/// What is known of the outputs, by port.
pub type OutputFacts = BTreeMap<String, Value>;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Dotted path below the stage: `config.model.n_group`, `inputs.tokens`, `hooks.filter`.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// Everything that is wrong, in the order it was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Adds a problem at a dotted path below the stage; an empty `help` is none.
    pub fn push(&mut self, path: impl Into<String>, message: impl Into<String>, help: impl Into<String>) {
        let help = Some(help.into()).filter(|help| !help.is_empty());
        self.0.push(Problem { path: path.into(), message: message.into(), help });
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The problems.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }
}

impl IntoIterator for Problems {
    type Item = Problem;
    type IntoIter = std::vec::IntoIter<Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl Extend<Problem> for Problems {
    fn extend<T: IntoIterator<Item = Problem>>(&mut self, problems: T) {
        self.0.extend(problems);
    }
}
