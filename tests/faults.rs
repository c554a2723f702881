//! What can go wrong in the middle of a run: the process is killed or told to stop, files are damaged or gone, data is
//! poisoned. Nothing that was committed is lost, and what is made in the end has the bits of an undisturbed run.

mod attempts;
mod damage;
mod guard;
mod kills;
mod stops;
