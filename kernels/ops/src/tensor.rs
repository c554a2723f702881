//! Tensors: contiguous, row-major, typed, immutable while shared.
//!
//! Invariant: `shape.product() == buffer length`. A tensor never has strides; an op that wants another layout makes
//! a new tensor. Cloning shares the buffer; [`Tensor::make_mut`] copies only when somebody else still holds it.

use std::sync::Arc;

use half::bf16;

use crate::{bfloat, memory};

/// Element type of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision; activations, masters and gradients.
    F32,
    /// bfloat16; weights and moments.
    Bf16,
    /// Bytes; FP8 codes.
    U8,
    /// Unsigned indices.
    U32,
}

/// Where a tensor lives. The CPU is the oracle of every other device.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// Host memory and the process's rayon pool.
    #[default]
    Cpu,
}

/// A typed host buffer.
#[derive(Clone, Debug)]
pub enum CpuBuf {
    /// See [`DType::F32`].
    F32(Vec<f32>),
    /// See [`DType::Bf16`].
    Bf16(Vec<bf16>),
    /// See [`DType::U8`].
    U8(Vec<u8>),
    /// See [`DType::U32`].
    U32(Vec<u32>),
}

impl Drop for CpuBuf {
    fn drop(&mut self) {
        match self {
            Self::F32(v) => memory::give_back(std::mem::take(v)),
            Self::Bf16(v) => memory::give_back(std::mem::take(v)),
            Self::U8(v) => memory::give_back(std::mem::take(v)),
            Self::U32(_) => {}
        }
    }
}

#[derive(Clone, Debug)]
enum Storage {
    Cpu(Arc<CpuBuf>),
}

/// A contiguous row-major array. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tensor {
    storage: Storage,
    dtype: DType,
    shape: Vec<usize>,
}

macro_rules! typed {
    ($ty:ty, $variant:ident, $new:ident, $get:ident, $get_mut:ident, $into:ident) => {
        #[doc = concat!("Makes a `", stringify!($variant), "` tensor. \n\n# Panics\nWhen `data.len()` is not the product of `shape`.")]
        pub fn $new(shape: &[usize], data: Vec<$ty>) -> Self {
            assert_eq!(shape.iter().product::<usize>(), data.len(), "tensor of shape {shape:?} given {} elements", data.len());
            Self { storage: Storage::Cpu(Arc::new(CpuBuf::$variant(data))), dtype: DType::$variant, shape: shape.to_vec() }
        }
        #[doc = concat!("The elements as `", stringify!($ty), "`. \n\n# Panics\nWhen the dtype is another.")]
        pub fn $get(&self) -> &[$ty] {
            let Storage::Cpu(buf) = &self.storage;
            match buf.as_ref() {
                CpuBuf::$variant(v) => v,
                _ => panic!("tensor of shape {:?} is {:?}, not {}", self.shape, self.dtype, stringify!($variant)),
            }
        }
        #[doc = concat!("The elements as mutable `", stringify!($ty), "`; copies them first when they are shared. \n\n# Panics\nWhen the dtype is another.")]
        pub fn $get_mut(&mut self) -> &mut [$ty] {
            let (dtype, Storage::Cpu(buf)) = (self.dtype, &mut self.storage);
            match Arc::make_mut(buf) {
                CpuBuf::$variant(v) => v,
                _ => panic!("tensor is {dtype:?}, not {}", stringify!($variant)),
            }
        }
        #[doc = concat!("The elements as an owned `Vec<", stringify!($ty), ">`, without a copy when unshared. \n\n# Panics\nWhen the dtype is another.")]
        pub fn $into(self) -> Vec<$ty> {
            let Storage::Cpu(buf) = self.storage;
            match &mut Arc::try_unwrap(buf).unwrap_or_else(|shared| (*shared).clone()) {
                CpuBuf::$variant(v) => std::mem::take(v),
                _ => panic!("tensor is {:?}, not {}", self.dtype, stringify!($variant)),
            }
        }
    };
}

impl Tensor {
    typed!(f32, F32, f32, as_f32, as_f32_mut, into_f32);
    typed!(bf16, Bf16, bf16, as_bf16, as_bf16_mut, into_bf16);
    typed!(u8, U8, u8, as_u8, as_u8_mut, into_u8);
    typed!(u32, U32, u32, as_u32, as_u32_mut, into_u32);

    /// F32 zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self::f32(shape, vec![0.0; shape.iter().product()])
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size of the last dimension (1 for a scalar).
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Bytes of the buffer.
    pub fn bytes(&self) -> usize {
        self.numel()
            * match self.dtype {
                DType::F32 | DType::U32 => 4,
                DType::Bf16 => 2,
                DType::U8 => 1,
            }
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// When the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), self.numel(), "reshape {:?} -> {shape:?}", self.shape);
        Self { storage: self.storage.clone(), dtype: self.dtype, shape: shape.to_vec() }
    }

    /// Converts F32 or BF16 to F32 (shares the buffer when it is F32 already).
    ///
    /// # Panics
    /// On index and code dtypes.
    pub fn to_f32(&self) -> Self {
        match self.dtype {
            DType::F32 => self.clone(),
            DType::Bf16 => Self::f32(&self.shape, bfloat::widened(self.as_bf16())),
            other => panic!("{other:?} has no plain conversion to F32"),
        }
    }

    /// Converts F32 or BF16 to BF16, round to nearest even.
    ///
    /// # Panics
    /// On index and code dtypes.
    pub fn to_bf16(&self) -> Self {
        match self.dtype {
            DType::Bf16 => self.clone(),
            DType::F32 => Self::bf16(&self.shape, bfloat::narrowed(self.as_f32())),
            other => panic!("{other:?} has no plain conversion to BF16"),
        }
    }
}

/// Boundaries of the sequences that lie one after another in a `[tokens, ..]` tensor.
///
/// `offsets` starts at 0, ends at the token count and never falls; attention and the balance loss never look across one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans {
    offsets: Vec<usize>,
}

impl Spans {
    /// `rows` sequences of `len` tokens each.
    pub fn uniform(rows: usize, len: usize) -> Self {
        Self { offsets: (0..=rows).map(|row| row * len).collect() }
    }

    /// From the length of each sequence.
    pub fn from_lens(lens: impl IntoIterator<Item = usize>) -> Self {
        let mut offsets = vec![0];
        for len in lens {
            offsets.push(offsets[offsets.len() - 1] + len);
        }
        Self { offsets }
    }

    /// Token offsets, one more than there are sequences.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Number of sequences.
    pub fn count(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of tokens in all.
    pub fn tokens(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    /// Token range of sequence `i`.
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }

    /// All ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.offsets.windows(2).map(|w| w[0]..w[1])
    }

    /// Position of every token within its own sequence, `[tokens]`.
    pub fn positions(&self) -> Vec<u32> {
        self.iter().flat_map(|range| 0..range.len() as u32).collect()
    }
}
