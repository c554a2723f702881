//! Reuse of large buffers: a pool behind f32 tensors, and what the allocator does with the rest.
//!
//! A training step frees megabytes that the next step asks for again. glibc by default hands them back to the kernel, and
//! every page is then faulted in and cleared anew: up to half the time of a small layer. Dropped f32 tensors return
//! to a pool, whose buffers need no clearing for an op that writes every element; a process that trains or serves also
//! calls [`keep_freed_memory`] once at its start.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Smaller buffers are the allocator's business.
const ELEMENTS_MIN: usize = 1 << 13;
/// The pool is emptied when it would hold more elements than this (512 MiB unless [`keep_buffers`] said otherwise), so that
/// sizes of a finished phase do not stay.
static ELEMENTS_MAX: AtomicUsize = AtomicUsize::new(1 << 29);

struct Pool {
    by_capacity: BTreeMap<usize, Vec<Vec<f32>>>,
    elements: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { by_capacity: BTreeMap::new(), elements: 0 });

/// A buffer of `len` elements of unspecified value, for an op that writes all of them.
pub(crate) fn buffer(len: usize) -> Vec<f32> {
    if len >= ELEMENTS_MIN
        && let Ok(mut pool) = POOL.lock()
    {
        // A quarter more than wanted is the most that is wasted.
        let fitting = pool.by_capacity.range_mut(len..=len + len / 4).next();
        if let Some((&capacity, buffers)) = fitting {
            let found = buffers.pop();
            if buffers.is_empty() {
                pool.by_capacity.remove(&capacity);
            }
            if let Some(mut found) = found {
                pool.elements -= capacity;
                drop(pool);
                found.resize(len, 0.0);
                return found;
            }
        }
    }
    vec![0.0; len]
}

/// Offers a buffer for reuse.
pub(crate) fn give_back(buffer: Vec<f32>) {
    let capacity = buffer.capacity();
    let elements_max = ELEMENTS_MAX.load(Ordering::Relaxed);
    if !(ELEMENTS_MIN..=elements_max / 4).contains(&capacity) {
        return;
    }
    if let Ok(mut pool) = POOL.lock() {
        if pool.elements + capacity > elements_max {
            let old = std::mem::take(&mut pool.by_capacity);
            pool.elements = 0;
            drop(pool);
            drop(old);
            return;
        }
        pool.elements += capacity;
        pool.by_capacity.entry(capacity).or_default().push(buffer);
    }
}

/// Sets how many bytes of dropped buffers are kept for reuse. A server, whose batches have many sizes, keeps few.
pub fn keep_buffers(bytes_max: usize) {
    ELEMENTS_MAX.store(bytes_max / size_of::<f32>(), Ordering::Relaxed);
}

/// Makes glibc keep freed memory for reuse instead of returning it to the kernel. Does nothing on other C libraries.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::set();
}

/// Empties the pool and hands freed memory back to the kernel: after a model was loaded, before it is served. Elsewhere
/// than on glibc it only empties the pool.
pub fn return_freed_memory() {
    if let Ok(mut pool) = POOL.lock() {
        *pool = Pool { by_capacity: BTreeMap::new(), elements: 0 };
    }
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::trim();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
mod glibc {
    //! `mallopt` with its parameters, and `malloc_trim`, from `malloc.h`.

    use std::ffi::c_int;

    const TRIM_THRESHOLD: c_int = -1;
    const TOP_PAD: c_int = -2;
    const MMAP_THRESHOLD: c_int = -3;
    const ARENA_MAX: c_int = -8;
    /// The largest threshold glibc takes on 64-bit machines.
    const MMAP_BYTES: c_int = 32 << 20;
    /// Size of a thread arena's heap: none is ever empty enough to be unmapped.
    const HEAP_BYTES: c_int = 64 << 20;

    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
        fn malloc_trim(pad: usize) -> c_int;
    }

    pub(super) fn trim() {
        // SAFETY: `malloc_trim` takes an integer and may be called at any time.
        unsafe { malloc_trim(0) };
    }

    pub(super) fn set() {
        // One arena: a thread's own is cut into heaps of 64 MiB, of which large buffers waste a third.
        let settings =
            [(TRIM_THRESHOLD, c_int::MAX), (TOP_PAD, HEAP_BYTES), (MMAP_THRESHOLD, MMAP_BYTES), (ARENA_MAX, 1)];
        for (parameter, value) in settings {
            // SAFETY: `mallopt` takes two integers, may be called at any time, and refuses values it does not like.
            unsafe { mallopt(parameter, value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_tensor_is_used_again_and_small_ones_are_not_kept() {
        // A size no other test uses, since the pool is shared.
        let len = 1_234_567;
        let tensor = crate::Tensor::f32(&[len], vec![1.0; len]);
        let kept = tensor.clone();
        let address = tensor.as_f32().as_ptr();
        drop(tensor);
        let other = buffer(len);
        assert_ne!(other.as_ptr(), address, "a shared buffer is still in use");
        drop(kept);
        let again = buffer(len - 10);
        assert_eq!(again.as_ptr(), address);
        assert_eq!(again.len(), len - 10);
        assert_eq!(buffer(7), vec![0.0; 7]);
    }
}
