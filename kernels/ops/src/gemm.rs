//! General matrix product, C += A·B, under the numerics rule of the crate.

/// A strided view of an f32 matrix.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    /// Elements; element (i, j) is `data[i * row_stride + j * col_stride]`.
    pub(crate) data: &'a [f32],
    /// Distance between rows, in elements.
    pub(crate) row_stride: usize,
    /// Distance between columns, in elements.
    pub(crate) col_stride: usize,
}

/// `c[m, n] (+)= a[m, k] · b[k, n]` in the calling thread. `c` is row-major with `c_stride` elements between rows.
pub(crate) fn gemm_serial(
    m: usize,
    n: usize,
    k: usize,
    a: Mat<'_>,
    b: Mat<'_>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    for i in 0..m {
        for j in 0..n {
            let mut sum = if accumulate { c[i * c_stride + j] } else { 0.0 };
            for p in 0..k {
                sum = a.data[i * a.row_stride + p * a.col_stride]
                    .mul_add(b.data[p * b.row_stride + j * b.col_stride], sum);
            }
            c[i * c_stride + j] = sum;
        }
    }
}
