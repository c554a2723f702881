//! How much memory the measured work takes: the highest resident memory of the process while it runs, by
//! `/proc/self/status`, model included.

/// Highest memory before the work; made just before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peak {
    before_bytes: Option<u64>,
}

impl Peak {
    /// Forgets the highest memory so far, where the system lets a process do so.
    pub(super) fn begin() -> Self {
        dsv3_ops::return_freed_memory();
        // Some containers refuse it: the highest memory so far is then that of measuring the ceilings.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        Self { before_bytes: highest_bytes() }
    }

    /// The highest memory since then; nothing where the work stayed below what came before it.
    pub(super) fn end(self) -> Option<u64> {
        highest_bytes().filter(|now| self.before_bytes.is_none_or(|before| *now > before))
    }
}

fn highest_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}
