//! End-to-end tests of the whole project. One binary: it links once, and `cargo test golden` picks out what it names.

mod buckets;
mod chaos;
mod cli;
mod clients;
mod embed;
mod faults;
mod fuzz;
mod golden;
#[path = "../runtime/hooks/tests/guest/mod.rs"]
mod guest;
mod hooks;
mod memory;
mod pipelines;
mod proof;
mod report;
mod runners;
mod serve;
mod stores;
mod tidy;
mod tiny;
