//! Strips of floats of each instruction set, and how they are rounded.
//!
//! What is computed here in f32 is never exact, and need not be: of every value two bounds are rounded, and where they
//! round to different results the value is in doubt. All others are what the exact value rounds to.
//!
//! Everything between [`run`] and these functions must be `#[inline(always)]`, and must not call them in a closure that is
//! not: what is not inlined is compiled without the vector instructions.

use super::factors::Strip;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512};
use crate::Isa;

/// Half of the last place that bfloat16 keeps of an f32.
#[cfg(target_arch = "x86_64")]
pub(super) const HALF: i32 = 0x8000;

/// A strip of each instruction set, or part of one: `WIDTH` floats in two registers, those of even columns and those of odd
/// ones.
pub(super) trait Lanes: Copy {
    type Floats: Copy;
    const WIDTH: usize;

    /// Fetch what is at this address into the cache; it need not be anything.
    fn prefetch(self, address: *const u8);

    /// Of `WIDTH` columns of a strip, number `part` of as many.
    fn part(self, strip: &Strip, part: usize) -> Self::Floats;

    /// Of the first `WIDTH` of `values`.
    fn apart(self, values: &[f32]) -> Self::Floats;
    fn splat(self, value: f32) -> Self::Floats;
    fn add(self, left: Self::Floats, right: Self::Floats) -> Self::Floats;
    fn sub(self, left: Self::Floats, right: Self::Floats) -> Self::Floats;
    fn abs(self, values: Self::Floats) -> Self::Floats;

    /// `left * right + sum`, rounded once.
    fn mul_add(self, left: Self::Floats, right: Self::Floats, sum: Self::Floats) -> Self::Floats;

    /// The levels of `WIDTH` codes, two a byte, times `scale`.
    fn levels(self, codes: &[u8], scale: f32) -> Self::Floats;

    /// Write the values that lie strictly between `low` and `high` to `out`, rounded to bfloat16 or else to f16, in the order
    /// of their columns, and return which of them are in doubt, one bit a value. All bounds are finite.
    fn round<const BF16: bool>(self, low: Self::Floats, high: Self::Floats, out: &mut [[u8; 2]]) -> u32;
}

/// A computation that is compiled for each instruction set. `run` must be `#[inline(always)]`.
pub(super) trait Work {
    /// For AVX-512: eight rows at a time leave room for two strips and what they are multiplied by.
    fn run<L: Lanes, const ROWS: usize>(self, lanes: L);
}

/// Run `work` on `isa` or what the processor has of it; whether there is anything for it to run on.
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
pub(super) fn run(isa: Isa, work: impl Work) -> bool {
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { with_avx512(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { with_avx2(work) },
        _ => return false,
    }
    true
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn with_avx512(work: impl Work) {
    work.run::<_, 8>(Avx512);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2(work: impl Work) {
    work.run::<_, 4>(Avx2);
}
