//! Work made of many short parallel regions, such as a decoding step: threads stay awake between them.
//!
//! A thread of the pool that finds no work for some microseconds goes to sleep, and waking it takes longer than many
//! a region of decoding lasts. [`with_threads_awake`] has the other threads look for work until it is over, or until
//! there has been none for [`PATIENCE`].
//!
//! Invariants: only the time it takes changes. Looking ends by itself: a thread that waits inside a part of the work may
//! draw the job that looks, on top of that part, and the work is over only after the part.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// Times a thread looks at the pool before it offers its processor to others.
const LOOKS: usize = 64;
/// Time without any work after which a thread stops looking: many times the pause between two regions of decoding.
const PATIENCE: Duration = Duration::from_millis(1);

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
    let mut looks = 0;
    let mut idle_since = Instant::now();
    while !over.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            looks = 0;
            idle_since = Instant::now();
        } else if looks < LOOKS {
            looks += 1;
            std::hint::spin_loop();
        } else if idle_since.elapsed() >= PATIENCE {
            return;
        } else {
            looks = 0;
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use rayon::prelude::*;

    use super::*;

    /// A part of the work is begun by another thread, which waits inside it: there it draws the job that looks for
    /// work, and the work waits for that part.
    #[test]
    fn a_thread_that_looks_inside_a_part_of_the_work_comes_back() {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool");
            let [part_begun, work_begun, part_done] = [const { AtomicBool::new(false) }; 3];
            let wait_for = |flag: &AtomicBool| {
                while !flag.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
            };
            pool.install(|| {
                rayon::join(
                    || {
                        wait_for(&part_begun);
                        with_threads_awake(|| {
                            work_begun.store(true, Ordering::Release);
                            wait_for(&part_done);
                        });
                    },
                    || {
                        part_begun.store(true, Ordering::Release);
                        wait_for(&work_begun);
                        while rayon::yield_now() == Some(rayon::Yield::Executed) {}
                        part_done.store(true, Ordering::Release);
                    },
                )
            });
            done.send(()).expect("the test waits");
        });
        is_done.recv_timeout(Duration::from_secs(60)).expect("the thread that looks for work comes back");
    }

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
