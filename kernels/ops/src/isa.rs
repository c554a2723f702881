//! Which instruction set the CPU kernels run on, and the macro that compiles one body for each.
//!
//! Invariant: an [`Isa`] other than the portable one exists only where detection found it, so calling a function
//! compiled for it is sound. Every body gives the same bits on every set: Rust never contracts `a * b + c`, and fused
//! multiply-adds are written out.
//!
//! AVX-512 comes with or without dot products of BF16 pairs. They count as found only where a self-check shows that the
//! processor adds both products of a pair as two fused multiply-adds, each rounded to nearest, ties to even, the second
//! element of the pair first. (The instruction takes subnormals for zero; kernels that use it keep clear of them.)

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
mod bf16_dot;

/// Names that [`limit_instruction_set`] takes, widest first.
pub const INSTRUCTION_SETS: [&str; 4] = ["avx512-bf16", "avx512", "avx2", "portable"];

/// Why the instruction set cannot be limited.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// None of [`INSTRUCTION_SETS`].
    #[error("no instruction set is called `{0}`; there are {list}", list = INSTRUCTION_SETS.join(", "))]
    Unknown(String),
    /// This machine lacks it.
    #[error("this machine does not have `{wanted}`; its widest instruction set is `{widest}`")]
    Missing {
        /// What was asked for.
        wanted: String,
        /// What there is.
        widest: &'static str,
    },
    /// Kernels have run on another one.
    #[error("the instruction set is already `{0}`; it is limited before the first operation")]
    TooLate(&'static str),
}

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
pub(crate) struct Isa {
    kind: Kind,
    bf16_dot: bool,
    byte_tables: bool,
}

/// The set in use, once something asked for it.
static BEST: OnceLock<Isa> = OnceLock::new();

impl Isa {
    /// The widest set of this machine, or the one it was limited to.
    pub(crate) fn best() -> Self {
        *BEST.get_or_init(|| Self::all()[0])
    }

    /// Every set this machine has, widest first; the last is portable.
    pub(crate) fn all() -> Vec<Self> {
        let mut found = Vec::new();
        let mut push = |kind, bf16_dot, byte_tables| found.push(Self { kind, bf16_dot, byte_tables });
        #[cfg(target_arch = "x86_64")]
        {
            let narrow = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if narrow && wide {
                if bf16_dot::follows_the_rule() {
                    push(Kind::Avx512, true, true);
                }
                push(Kind::Avx512, false, is_x86_feature_detected!("avx512vbmi"));
            }
            if narrow {
                push(Kind::Avx2, false, false);
            }
        }
        push(Kind::Portable, false, false);
        found
    }

    pub(crate) fn kind(self) -> Kind {
        self.kind
    }

    /// Whether functions compiled for `avx512bf16` and `avx512vbmi`, besides the features of AVX-512 in [`simd_fn`], may
    /// be called, and a dot product of pairs is two fused multiply-adds in the order of the file's head.
    pub(crate) fn has_bf16_dot(self) -> bool {
        self.bf16_dot
    }

    /// Whether functions compiled for `avx512vbmi`, besides the features of AVX-512 in [`simd_fn`], may be called.
    pub(crate) fn has_byte_tables(self) -> bool {
        self.byte_tables
    }

    /// Its name among [`INSTRUCTION_SETS`].
    fn name(self) -> &'static str {
        match self.kind {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 if self.has_bf16_dot() => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Portable => "portable",
        }
    }

    fn named(name: &str) -> Result<Self, IsaError> {
        if !INSTRUCTION_SETS.contains(&name) {
            return Err(IsaError::Unknown(name.to_owned()));
        }
        let all = Self::all();
        let found = all.iter().find(|isa| isa.name() == name);
        found.copied().ok_or_else(|| IsaError::Missing { wanted: name.to_owned(), widest: all[0].name() })
    }
}

/// Name of the instruction set the kernels run on: `AVX-512 BF16`, `AVX-512`, `AVX2` or `portable`. Results do not depend
/// on it.
pub fn instruction_set() -> &'static str {
    match Isa::best().name() {
        "avx512-bf16" => "AVX-512 BF16",
        "avx512" => "AVX-512",
        "avx2" => "AVX2",
        portable => portable,
    }
}

/// Has the kernels of this process run on the set of that name (one of [`INSTRUCTION_SETS`]) instead of the widest: for
/// measurements, and for tests that compare the sets. Results do not depend on it.
///
/// # Errors
/// Of an unknown name, of a set that this machine lacks, and once an operation has run on another set.
pub fn limit_instruction_set(name: &str) -> Result<(), IsaError> {
    let wanted = Isa::named(name)?;
    let used = *BEST.get_or_init(|| wanted);
    if used == wanted { Ok(()) } else { Err(IsaError::TooLate(used.name())) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_found_by_name_widest_first() {
        let all = Isa::all();
        let names: Vec<&str> = all.iter().map(|isa| isa.name()).collect();
        let known: Vec<&str> = INSTRUCTION_SETS.into_iter().filter(|name| names.contains(name)).collect();
        assert_eq!((names.last(), &names), (Some(&"portable"), &known));
        for isa in &all {
            assert_eq!(Isa::named(isa.name()), Ok(*isa));
        }
        assert_eq!(Isa::named("neon"), Err(IsaError::Unknown("neon".to_owned())));
        if let Some(missing) = INSTRUCTION_SETS.into_iter().find(|name| !names.contains(name)) {
            let wanted = missing.to_owned();
            assert_eq!(Isa::named(missing), Err(IsaError::Missing { wanted, widest: all[0].name() }));
        }
    }

    /// Other tests of this process share the set, so it can only be confirmed here; `tests/cli.rs` limits it.
    #[test]
    fn a_set_in_use_stays() {
        let used = Isa::best();
        assert_eq!(limit_instruction_set(used.name()), Ok(()));
        for other in Isa::all().into_iter().filter(|isa| *isa != used) {
            assert_eq!(limit_instruction_set(other.name()), Err(IsaError::TooLate(used.name())));
        }
        assert!(INSTRUCTION_SETS.contains(&used.name()) && !instruction_set().is_empty());
    }
}
