//! Two runners on one stage, and runs told to stop at any moment: real processes, on a local disk and on a real S3 server.
//! Whatever the runners do to each other, no checkpoint number is committed twice, a replaced holder commits nothing more,
//! and what is made in the end has the bits of an undisturbed run.

mod api;
mod collect;
mod pair;
mod races;
mod shop;
mod signals;
