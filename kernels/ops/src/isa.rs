//! Which instruction set the CPU kernels run on, and the macro that compiles one body for each.
//!
//! Invariant: an [`Isa`] other than the portable one exists only where detection found it, so calling a function
//! compiled for it is sound. Every body gives the same bits on every set: Rust never contracts `a * b + c`, and fused
//! multiply-adds are written out.

use std::sync::OnceLock;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// An instruction set this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

impl Isa {
    /// The widest set of this machine.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::all()[0])
    }

    /// Every set this machine has, widest first; the last is portable.
    pub(crate) fn all() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let narrow = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if narrow && wide {
                found.push(Self(Kind::Avx512));
            }
            if narrow {
                found.push(Self(Kind::Avx2));
            }
        }
        found.push(Self(Kind::Portable));
        found
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}

/// Name of the instruction set the kernels run on: `AVX-512`, `AVX2` or `portable`. Results do not depend on it.
pub fn instruction_set() -> &'static str {
    match Isa::best().kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => "AVX-512",
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => "AVX2",
        Kind::Portable => "portable",
    }
}

/// Defines a function whose body is compiled once per instruction set; its first argument picks one.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[allow(unsafe_code)]
        $vis fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn wide($($arg: $ty),*) { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn narrow($($arg: $ty),*) { body($($arg),*) }
            match isa.kind() {
                // SAFETY: an `Isa` of this kind exists only where these features were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Kind::Avx512 => unsafe { wide($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Kind::Avx2 => unsafe { narrow($($arg),*) },
                $crate::isa::Kind::Portable => body($($arg),*),
            }
        }
    };
}
pub(crate) use simd_fn;
