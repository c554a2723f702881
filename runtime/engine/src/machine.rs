//! What a run was computed on: recorded in its status, outside every key. Results do not depend on it; times do.

use dsv3_core::Error;
use serde::{Deserialize, Serialize};

/// A machine and how much of it a process used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor, as the system names it.
    pub cpu: String,
    /// Instruction set of the kernels.
    pub instruction_set: String,
    /// Cores of the machine that the process may use.
    pub cores: usize,
    /// Compute threads of the process.
    pub threads: usize,
    /// Operating system and architecture.
    pub system: String,
    /// Version of this program.
    pub version: String,
}

impl Machine {
    /// This process with `threads` compute threads; as many as cores when absent.
    pub fn this(threads: Option<usize>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            cpu: cpu().unwrap_or_else(|_| "unknown processor".to_owned()),
            instruction_set: dsv3_stage::instruction_set().to_owned(),
            cores,
            threads: threads.unwrap_or(cores),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, instruction_set, cores, threads, system, version } = self;
        write!(f, "{cpu}, {instruction_set}, {threads} threads on {cores} cores, {system}, dsv3-pipeline {version}")
    }
}

/// The processor as Linux names it; other systems are not asked.
fn cpu() -> Result<String, Error> {
    let unknown = || Error::unavailable("the system does not name its processor");
    let text = std::fs::read_to_string("/proc/cpuinfo").map_err(|error| unknown().source(error))?;
    cpu_of(&text).ok_or_else(unknown)
}

/// The first `model name` of a `/proc/cpuinfo`, its spaces made single.
fn cpu_of(cpuinfo: &str) -> Option<String> {
    let mut named = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let (_, name) = named.find(|(field, _)| field.trim() == "model name")?;
    Some(name.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_names_its_processor_and_its_threads() {
        let text = "processor\t: 0\nvendor_id\t: X\nmodel name\t: Some  CPU @ 2 GHz\nmodel name\t: other\n";
        assert_eq!(cpu_of(text).as_deref(), Some("Some CPU @ 2 GHz"));
        assert_eq!(cpu_of("processor: 0"), None);
        let machine = Machine::this(Some(3));
        assert_eq!(machine.threads, 3);
        assert!(machine.to_string().contains("3 threads"), "{machine}");
    }
}
