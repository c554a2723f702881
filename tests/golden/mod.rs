//! Numbers against an outside implementation: every folder under `tests/data/oracles/`, or under `$DSV3_ORACLES` when
//! that is set, by the records it holds. Names of folders, layers, depths, FP8 cases and hyper-parameters come from the
//! files. `tests/data/oracles/README.md` says what the records mean.

mod fp8;
mod grpo;
mod init;
mod oracle;
mod planted;
mod records;
mod trace;
