//! Small elementwise operations: sums of gradients and the residual addition.

/// `acc[i] += x[i]`.
///
/// # Panics
/// When the lengths differ.
pub fn add_assign(acc: &mut [f32], x: &[f32]) {
    assert_eq!(acc.len(), x.len(), "gradients of one value differ in size");
    for (a, b) in acc.iter_mut().zip(x) {
        *a += b;
    }
}
