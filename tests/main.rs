//! tests
mod golden;
