//! Sums from which the error of quantized weights follows, block by block: `x` a weight, `q` its level.
//!
//! ```text
//! xx = sum x * x,  xq = sum x * q,  qq = sum q * q
//! ```
//!
//! The squared error under any scale `a` is `xx - 2 a xq + a^2 qq`, and the best scale is `xq / qq`.
//!
//! Floating-point sums depend on their order, so it is fixed: sixteen partial sums, the i-th of the elements i, i + 16,
//! i + 32 .., products rounded before they are added; then halves added to halves: i + 8, i + 4, i + 2, i + 1. All
//! instruction sets give the same bits.

use super::{LEVELS, check_lengths};
use crate::{Float, Isa};

/// Partial sums.
const LANES: usize = 16;

/// The sums of one block, in f32: with weights above 1e18 they overflow, to infinity or NaN.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Moments {
    /// Sum of the squared weights.
    pub xx: f32,
    /// Sum of weights times their levels.
    pub xq: f32,
    /// Sum of the squared levels.
    pub qq: f32,
}

/// The sums of each block of the weights `bytes`, little-endian values of type `float`, and of the levels of `codes`,
/// two a byte as [`super::quantize`] writes them.
///
/// # Panics
/// If `blocksize` is not one of [`super::BLOCKSIZES`], or `codes` or `out` has the wrong length.
pub fn moments(bytes: &[u8], float: Float, codes: &[u8], blocksize: usize, out: &mut [Moments]) {
    moments_on(Isa::current(), bytes, float, codes, blocksize, out);
}

#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
pub(super) fn moments_on(isa: Isa, bytes: &[u8], float: Float, codes: &[u8], blocksize: usize, out: &mut [Moments]) {
    let elements = bytes.len() / float.size();
    check_lengths(elements, blocksize, out.len(), codes.len());
    let isa = isa.min(Isa::detect());
    let whole = if isa == Isa::Portable { 0 } else { elements / blocksize };
    let (bytes, rest) = bytes.split_at(whole * blocksize * float.size());
    let (codes, rest_codes) = codes.split_at(whole * blocksize / 2);
    let (out, rest_out) = out.split_at_mut(whole);
    match isa {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::moments_avx512(bytes, float, codes, blocksize, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::moments_avx2(bytes, float, codes, blocksize, out) },
        _ => {}
    }
    portable(rest, float, rest_codes, blocksize, rest_out);
}

/// Any blocks; what is missing in a shorter last one adds zeros.
fn portable(bytes: &[u8], float: Float, codes: &[u8], blocksize: usize, out: &mut [Moments]) {
    let blocks = bytes.chunks(blocksize * float.size()).zip(codes.chunks(blocksize / 2)).zip(out);
    for ((bytes, codes), out) in blocks {
        let mut sums = [[0.0; LANES]; 3];
        for (bytes, codes) in bytes.chunks(LANES * float.size()).zip(codes.chunks(LANES / 2)) {
            let (mut x, mut q) = ([0.0; LANES], [0.0; LANES]);
            let elements = bytes.len() / float.size();
            float.decode(bytes, &mut x[..elements]);
            for (index, q) in q[..elements].iter_mut().enumerate() {
                *q = LEVELS[usize::from((codes[index / 2] >> (4 * (1 - index % 2))) & 15)];
            }
            for lane in 0..LANES {
                sums[0][lane] += x[lane] * x[lane];
                sums[1][lane] += x[lane] * q[lane];
                sums[2][lane] += q[lane] * q[lane];
            }
        }
        let [xx, xq, qq] = sums.map(total);
        *out = Moments { xx, xq, qq };
    }
}

fn total(mut sums: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector loads from arrays of the vector's size")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm_add_ps, _mm_cvtsi32_si128, _mm_cvtsi64_si128, _mm_loadu_si128, _mm_movehl_ps,
        _mm_movelh_ps, _mm_setzero_ps, _mm_storeu_ps, _mm_unpackhi_ps, _mm_unpacklo_ps, _mm256_add_ps,
        _mm256_blendv_ps, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepu8_epi64, _mm256_cvtepu16_epi32,
        _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_mul_ps, _mm256_or_si256,
        _mm256_permutevar8x32_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_slli_epi64, _mm256_srli_epi64,
        _mm512_add_ps, _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_cvtepu8_epi64, _mm512_cvtepu16_epi32,
        _mm512_cvtph_ps, _mm512_extractf32x8_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_or_si512,
        _mm512_permutexvar_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_slli_epi64, _mm512_srli_epi64,
    };

    use super::{Float, LANES, LEVELS, Moments};
    use crate::nf4::tiles::prefetch_ahead;

    /// The totals of sums of which eight lanes are left.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn totals(sums: [__m256; 3]) -> Moments {
        let [xx, xq, qq] = sums.map(|sums| _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums)));
        let nothing = _mm_setzero_ps();
        // Turned on their side: lane 0 of all three, then lanes 1, 2 and 3.
        let (low, high) = (_mm_unpacklo_ps(xx, qq), _mm_unpackhi_ps(xx, qq));
        let (low_xq, high_xq) = (_mm_unpacklo_ps(xq, nothing), _mm_unpackhi_ps(xq, nothing));
        let lane0 = _mm_movelh_ps(low, low_xq);
        let lane1 = _mm_movehl_ps(low_xq, low);
        let lane2 = _mm_movelh_ps(high, high_xq);
        let lane3 = _mm_movehl_ps(high_xq, high);
        let total = _mm_add_ps(_mm_add_ps(lane0, lane2), _mm_add_ps(lane1, lane3));
        let mut totals = [0.0; 4];
        // SAFETY: `totals` is four floats.
        unsafe { _mm_storeu_ps(totals.as_mut_ptr(), total) };
        let [xx, qq, xq, _] = totals;
        Moments { xx, xq, qq }
    }

    /// Go over whole blocks: `load` makes sixteen floats of `N` bytes.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn blocks_avx2<const N: usize>(
        bytes: &[u8],
        codes: &[u8],
        blocksize: usize,
        out: &mut [Moments],
        load: impl Fn(&[u8; N]) -> [__m256; 2],
    ) {
        // SAFETY: both pointers are to eight floats.
        let levels = unsafe { [_mm256_loadu_ps(LEVELS.as_ptr()), _mm256_loadu_ps(LEVELS[8..].as_ptr())] };
        let lookup = |codes: i32| {
            let byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(codes));
            // The permutation takes the lower three bits of each index.
            let codes = _mm256_or_si256(_mm256_srli_epi64::<4>(byte), _mm256_slli_epi64::<32>(byte));
            let top_bit = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let [low, high] = levels.map(|levels| _mm256_permutevar8x32_ps(levels, codes));
            _mm256_blendv_ps(low, high, top_bit)
        };
        let groups = blocksize / LANES;
        let (values, codes) = (bytes.as_chunks().0, codes.as_chunks::<8>().0);
        for ((values, codes), out) in values.chunks_exact(groups).zip(codes.chunks_exact(groups)).zip(out) {
            let mut sums = [[_mm256_setzero_ps(); 3]; 2];
            for (values, codes) in values.iter().zip(codes) {
                prefetch_ahead(values);
                let codes = u64::from_le_bytes(*codes);
                let levels = [lookup(codes as i32), lookup((codes >> 32) as i32)];
                for ((sums, x), q) in sums.iter_mut().zip(load(values)).zip(levels) {
                    sums[0] = _mm256_add_ps(sums[0], _mm256_mul_ps(x, x));
                    sums[1] = _mm256_add_ps(sums[1], _mm256_mul_ps(x, q));
                    sums[2] = _mm256_add_ps(sums[2], _mm256_mul_ps(q, q));
                }
            }
            let [low, high] = sums;
            *out = totals(std::array::from_fn(|sum| _mm256_add_ps(low[sum], high[sum])));
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn moments_avx2(bytes: &[u8], float: Float, codes: &[u8], blocksize: usize, out: &mut [Moments]) {
        // SAFETY, of all loads: the chunks are of the vector's size.
        match float {
            Float::BF16 => blocks_avx2(bytes, codes, blocksize, out, |group: &[u8; 32]| {
                std::array::from_fn(|half| {
                    let words = unsafe { _mm_loadu_si128(group.as_chunks::<16>().0[half].as_ptr().cast()) };
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
                })
            }),
            Float::F16 => blocks_avx2(bytes, codes, blocksize, out, |group: &[u8; 32]| {
                std::array::from_fn(|half| {
                    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(group.as_chunks::<16>().0[half].as_ptr().cast()) })
                })
            }),
            Float::F32 => blocks_avx2(bytes, codes, blocksize, out, |group: &[u8; 64]| {
                std::array::from_fn(|half| unsafe { _mm256_loadu_ps(group.as_chunks::<32>().0[half].as_ptr().cast()) })
            }),
        }
    }

    /// Go over whole blocks: `load` makes sixteen floats of `N` bytes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    fn blocks_avx512<const N: usize>(
        bytes: &[u8],
        codes: &[u8],
        blocksize: usize,
        out: &mut [Moments],
        load: impl Fn(&[u8; N]) -> __m512,
    ) {
        // SAFETY: the pointer is to sixteen floats.
        let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
        let groups = blocksize / LANES;
        let (values, codes) = (bytes.as_chunks().0, codes.as_chunks::<8>().0);
        for ((values, codes), out) in values.chunks_exact(groups).zip(codes.chunks_exact(groups)).zip(out) {
            let mut sums = [_mm512_setzero_ps(); 3];
            for (values, codes) in values.iter().zip(codes) {
                prefetch_ahead(values);
                let byte = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*codes)));
                // The permutation takes the lower four bits of each index.
                let codes = _mm512_or_si512(_mm512_srli_epi64::<4>(byte), _mm512_slli_epi64::<32>(byte));
                let (x, q) = (load(values), _mm512_permutexvar_ps(codes, levels));
                sums[0] = _mm512_add_ps(sums[0], _mm512_mul_ps(x, x));
                sums[1] = _mm512_add_ps(sums[1], _mm512_mul_ps(x, q));
                sums[2] = _mm512_add_ps(sums[2], _mm512_mul_ps(q, q));
            }
            *out =
                totals(sums.map(|sums| _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums))));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    pub(super) fn moments_avx512(bytes: &[u8], float: Float, codes: &[u8], blocksize: usize, out: &mut [Moments]) {
        // SAFETY, of all loads: the groups are of the vector's size.
        match float {
            Float::BF16 => blocks_avx512(bytes, codes, blocksize, out, |group: &[u8; 32]| {
                let words = unsafe { _mm256_loadu_si256(group.as_ptr().cast()) };
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
            }),
            Float::F16 => blocks_avx512(bytes, codes, blocksize, out, |group: &[u8; 32]| {
                _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(group.as_ptr().cast()) })
            }),
            Float::F32 => blocks_avx512(bytes, codes, blocksize, out, |group: &[u8; 64]| unsafe {
                _mm512_loadu_ps(group.as_ptr().cast())
            }),
        }
    }
}
