//! The processor's vector instructions, chosen at run time.
//!
//! A binary for any x86-64 may use only SSE2. [`vectorized`] runs a closure compiled once more for AVX2 and for AVX-512,
//! so that the plain loops inside become wider vector code. The arithmetic is the same, operation by operation (Rust
//! never fuses or reorders floating point), and so are the results, bit for bit.
//!
//! `QPACK_ISA=portable|avx2|avx512` holds the choice down, for tests and comparisons; it never raises it above what the
//! processor has.

use std::sync::OnceLock;

/// Sets of vector instructions, ascending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every processor of this target has.
    Portable,
    /// AVX2, F16C and FMA (x86-64 since 2013).
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// The name, as `QPACK_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// What is used: the best that the processor has and `QPACK_ISA` allows. Looked up once.
    pub fn current() -> Self {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Self::detect().min(Self::limit().unwrap_or(Self::Avx512)))
    }

    /// The best that the processor has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("fma") {
                return if avx512 { Self::Avx512 } else { Self::Avx2 };
            }
        }
        Self::Portable
    }

    /// The most that `QPACK_ISA` allows.
    ///
    /// # Errors
    /// One line, if it is set to something else than a name.
    pub fn limit() -> Result<Self, String> {
        let Some(asked) = std::env::var_os("QPACK_ISA") else { return Ok(Self::Avx512) };
        let known = [Self::Portable, Self::Avx2, Self::Avx512];
        let unknown = || format!("QPACK_ISA is {}, expected portable, avx2 or avx512", asked.display());
        known.into_iter().find(|isa| asked == isa.name()).ok_or_else(unknown)
    }
}

/// Run `work` compiled for [`Isa::current`]. What it calls must be `#[inline(always)]` to be compiled with it.
#[inline(always)]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    compiled_for(Isa::current(), work)
}

/// As [`vectorized`], for `isa` or what the processor has of it.
#[inline(always)]
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
pub(crate) fn compiled_for<R>(isa: Isa, work: impl FnOnce() -> R) -> R {
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { with_avx512(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { with_avx2(work) },
        _ => work(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
fn with_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}
