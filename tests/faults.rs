//! What can go wrong in the middle of a run: the process is killed or told to stop, files are damaged or gone, data is
//! poisoned, a store takes no more writes. Nothing that was committed is lost, and what is made in the end has the bits of an
//! undisturbed run.

mod attempts;
mod damage;
mod flips;
mod guard;
mod kills;
mod no_writes;
mod stops;

pub(crate) use kills::place_before;
