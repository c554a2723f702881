//! Per-thread buffers that kernels pack into, kept between calls.

use std::cell::RefCell;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with a buffer of `len` elements of unspecified content. Calls may nest.
pub(crate) fn with_f32<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    if len == 0 {
        return work(&mut []);
    }
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = work(&mut buffer[..len]);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}
