//! Work made of many short parallel regions, such as a decoding step: threads stay awake between them.
//!
//! A thread of the pool that finds no work for some microseconds goes to sleep, and waking it takes longer than many
//! a region of decoding lasts. [`with_threads_awake`] has the other threads look for work until it is over.
//!
//! Invariant: only the time it takes changes.

use std::sync::atomic::{AtomicBool, Ordering};

/// Times a thread looks at the pool before it offers its processor to others.
const LOOKS: usize = 64;

/// Runs `work` on a thread of the current pool while the others keep looking for parts of it. May nest.
pub fn with_threads_awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() == 1 {
        return work();
    }
    let over = AtomicBool::new(false);
    rayon::scope(|scope| {
        let (own, over) = (rayon::current_thread_index(), &over);
        // One job for each thread. That of this one may be drawn while it waits for a part of `work`, and must end.
        scope.spawn_broadcast(move |_, _| {
            if rayon::current_thread_index() != own {
                look_for_work(over);
            }
        });
        let _ends = Ends(over);
        work()
    })
}

/// Says that it is over, after a panic too.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn look_for_work(over: &AtomicBool) {
    let mut idle = 0;
    while !over.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            idle = 0;
        } else if idle < LOOKS {
            idle += 1;
            std::hint::spin_loop();
        } else {
            idle = 0;
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_is_done_alone_nested_and_after_a_panic() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let sum = || (0..1000_u64).into_par_iter().map(|i| i * i).sum::<u64>();
            let twice = || with_threads_awake(|| with_threads_awake(sum) + sum());
            assert_eq!(pool.install(twice), 2 * sum());
            let panics = || pool.install(|| with_threads_awake(|| assert!(sum() == 0, "on purpose")));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
            assert_eq!(pool.install(|| with_threads_awake(sum)), sum());
            // Several at once share the pool.
            let many: Vec<u64> = pool.install(|| (0..8).into_par_iter().map(|_| with_threads_awake(sum)).collect());
            assert_eq!(many, vec![sum(); 8]);
        }
    }
}
