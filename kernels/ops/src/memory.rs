//! What the allocator does with freed buffers.
//!
//! A training step frees megabytes that the next step asks for again. glibc by default hands them back to the kernel, and
//! every page is then faulted in and cleared anew: up to half the time of a small layer. A process that trains or
//! serves calls [`keep_freed_memory`] once at its start.

/// Makes glibc keep freed memory for reuse instead of returning it to the kernel. Does nothing on other C libraries.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::set();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
mod glibc {
    //! `mallopt` and its parameters, from `malloc.h`.

    use std::ffi::c_int;

    const TRIM_THRESHOLD: c_int = -1;
    const TOP_PAD: c_int = -2;
    const MMAP_THRESHOLD: c_int = -3;
    /// The largest threshold glibc takes on 64-bit machines.
    const MMAP_BYTES: c_int = 32 << 20;
    /// Size of a thread arena's heap: none is ever empty enough to be unmapped.
    const HEAP_BYTES: c_int = 64 << 20;

    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
    }

    pub(super) fn set() {
        for (parameter, value) in
            [(TRIM_THRESHOLD, c_int::MAX), (TOP_PAD, HEAP_BYTES), (MMAP_THRESHOLD, MMAP_BYTES)]
        {
            // SAFETY: `mallopt` takes two integers, may be called at any time, and refuses values it does not like.
            unsafe { mallopt(parameter, value) };
        }
    }
}
