//! Reuse of large buffers: a pool behind tensors, and what the allocator does with the rest.
//!
//! A training step frees megabytes that the next step asks for again. glibc by default hands them back to the kernel, and
//! every page is then faulted in and cleared anew: up to half the time of a small layer. Dropped tensors return
//! to a pool, whose buffers need no clearing for an op that writes every element; a process that trains or serves also
//! calls [`keep_freed_memory`] once at its start.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;

/// Smaller buffers are the allocator's business.
const BYTES_MIN: usize = 1 << 15;
/// The pool is emptied when it would hold more than this (2 GiB unless [`keep_buffers`] said otherwise), so that sizes of a
/// finished phase do not stay.
static BYTES_MAX: AtomicUsize = AtomicUsize::new(1 << 31);

/// Free buffers by capacity.
type Free<T> = BTreeMap<usize, Vec<Vec<T>>>;

/// What the pool keeps of every element type, and how many bytes in all.
pub(crate) struct Pool {
    f32: Free<f32>,
    bf16: Free<bf16>,
    u8: Free<u8>,
    bytes: usize,
}

impl Pool {
    const fn new() -> Self {
        Self { f32: BTreeMap::new(), bf16: BTreeMap::new(), u8: BTreeMap::new(), bytes: 0 }
    }
}

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

/// An element type whose buffers are kept.
pub(crate) trait Pooled: Copy + Default {
    /// Takes a buffer of this capacity or up to a quarter more: the most that is wasted.
    fn take(pool: &mut Pool, len: usize) -> Option<Vec<Self>>;

    /// Puts one back.
    fn put(pool: &mut Pool, buffer: Vec<Self>);
}

macro_rules! pooled {
    ($($ty:ident),*) => {
        $(impl Pooled for $ty {
            fn take(pool: &mut Pool, len: usize) -> Option<Vec<Self>> {
                let (&capacity, buffers) = pool.$ty.range_mut(len..=len + len / 4).next()?;
                let found = buffers.pop();
                if buffers.is_empty() {
                    pool.$ty.remove(&capacity);
                }
                pool.bytes -= found.as_ref().map_or(0, |_| capacity * size_of::<Self>());
                found
            }

            fn put(pool: &mut Pool, buffer: Vec<Self>) {
                pool.bytes += buffer.capacity() * size_of::<Self>();
                pool.$ty.entry(buffer.capacity()).or_default().push(buffer);
            }
        })*
    };
}
pooled!(f32, bf16, u8);

/// A buffer of `len` elements of unspecified value, for an op that writes all of them.
pub(crate) fn buffer<T: Pooled>(len: usize) -> Vec<T> {
    if len * size_of::<T>() >= BYTES_MIN
        && let Ok(mut pool) = POOL.lock()
        && let Some(mut found) = T::take(&mut pool, len)
    {
        drop(pool);
        found.resize(len, T::default());
        return found;
    }
    vec![T::default(); len]
}

/// A buffer of `len` zeros, for an op that adds to them.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    let mut zeros = buffer(len);
    zeros.fill(0.0);
    zeros
}

/// Offers a buffer for reuse.
pub(crate) fn give_back<T: Pooled>(buffer: Vec<T>) {
    let bytes = buffer.capacity() * size_of::<T>();
    let bytes_max = BYTES_MAX.load(Ordering::Relaxed);
    if !(BYTES_MIN..=bytes_max / 4).contains(&bytes) {
        return;
    }
    if let Ok(mut pool) = POOL.lock() {
        if pool.bytes + bytes > bytes_max {
            let old = std::mem::replace(&mut *pool, Pool::new());
            drop(pool);
            drop(old);
            return;
        }
        T::put(&mut pool, buffer);
    }
}

/// Sets how many bytes of dropped buffers are kept for reuse. A server, whose batches have many sizes, keeps few.
pub fn keep_buffers(bytes_max: usize) {
    BYTES_MAX.store(bytes_max, Ordering::Relaxed);
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
        *pool = Pool::new();
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
        let other: Vec<f32> = buffer(len);
        assert_ne!(other.as_ptr(), address, "a shared buffer is still in use");
        drop(kept);
        let again: Vec<f32> = buffer(len - 10);
        assert_eq!(again.as_ptr(), address);
        assert_eq!(again.len(), len - 10);
        assert_eq!(buffer::<f32>(7), vec![0.0; 7]);
    }
}
