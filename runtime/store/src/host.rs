//! Who this process is: host, boot, process id and start, so that a contender on the same host sees at once that a
//! holder is gone; and nonces, by which a writer recognises its own record.

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::{BuildHasher, Hasher},
    sync::OnceLock,
};

use serde::{Deserialize, Serialize};

/// A process that holds a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Host name.
    pub host: String,
    /// Boot of that host; empty where the system does not say.
    pub boot_id: String,
    /// Process-id name space: containers of one host count processes apart.
    pub pid_space: String,
    /// Process id.
    pub pid: u32,
    /// Start of the process in clock ticks after boot: tells it from a later process with the same id.
    pub process_start: u64,
    /// Run it works for.
    pub run: String,
}

impl Holder {
    /// This process, working for `run`.
    pub fn this_process(run: impl Into<String>) -> Self {
        static IDENTITY: OnceLock<Holder> = OnceLock::new();
        let identity = IDENTITY.get_or_init(|| Holder {
            host: read("/proc/sys/kernel/hostname").or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default(),
            boot_id: read("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            pid_space: pid_space(),
            pid: std::process::id(),
            process_start: process_start(std::process::id()).unwrap_or_default(),
            run: String::new(),
        });
        Holder { run: run.into(), ..identity.clone() }
    }

    /// Whether this process can tell that the holder no longer exists. False when in doubt.
    pub fn is_gone(&self) -> bool {
        let here = Self::this_process("");
        if self.host != here.host || self.boot_id.is_empty() || here.boot_id.is_empty() {
            return false;
        }
        if self.boot_id != here.boot_id {
            return true;
        }
        self.pid_space == here.pid_space && process_start(self.pid) != Some(self.process_start)
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} on {} (run {})", self.pid, self.host, self.run)
    }
}

/// 128 random bits as 32 hexadecimal digits. For identity only, never for results.
pub fn nonce() -> String {
    // The standard library seeds each hasher from the system's random source.
    let bits = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", bits(), bits() ^ (u64::from(std::process::id()) << 32))
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn pid_space() -> String {
    fs::read_link("/proc/self/ns/pid").map_or_else(|_| String::new(), |path| path.display().to_string())
}

/// Field 22 of `/proc/<pid>/stat`; the second field is in brackets and may hold spaces. A zombie counts as gone.
fn process_start(pid: u32) -> Option<u64> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if fields.next() == Some("Z") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_not_gone_and_a_reused_id_is() {
        let here = Holder::this_process("r");
        assert!(!here.is_gone());
        if here.boot_id.is_empty() {
            return;
        }
        assert!(Holder { process_start: here.process_start + 1, ..here.clone() }.is_gone());
        assert!(Holder { boot_id: "another".into(), ..here.clone() }.is_gone());
        assert!(!Holder { host: "another".into(), boot_id: "another".into(), ..here }.is_gone());
    }

    #[test]
    fn nonces_differ() {
        assert_ne!(nonce(), nonce());
        assert_eq!(nonce().len(), 32);
    }
}
