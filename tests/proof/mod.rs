//! What a sceptic asks for, held against the whole project; `tests/README.md` says which test or command shows what.

mod ingest;
mod input;
mod rl;
mod runtime;
