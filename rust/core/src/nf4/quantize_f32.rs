//! Quantizing f32, and f16 converted to it.
//!
//! The product with the inverse of absmax is taken as the rule says, in f32. What differs is how its code is found:
//!
//! - AVX-512 rounds `15 v` to one of 31 cells, by adding a number so large that the fraction falls off. A cell is narrower
//!   than the least distance of two thresholds, so it holds one at most: two tables give that threshold and the number of
//!   those in the cells before, and one comparison the rest. It does not matter how `15 v` is rounded, as long as it
//!   ascends with `v` and the thresholds are put into cells in the same way.
//! - AVX2 halves the thresholds four times; in each step a table gives the middle one for the bits found so far.
//! - Portable code counts all fifteen.

#[cfg(target_arch = "x86_64")]
use super::THRESHOLDS;
use super::{MAX_BLOCKSIZE, quantize_block};
use crate::{Float, Isa};

/// Quantize whole blocks of `float`, which is f16 or f32.
///
/// # Errors
/// The index of the first block that has a value that is not finite.
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
pub(super) fn quantize(
    isa: Isa,
    float: Float,
    bytes: &[u8],
    blocksize: usize,
    absmax: &mut [f32],
    codes: &mut [u8],
) -> Result<(), usize> {
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::quantize_avx512(float, bytes, blocksize, absmax, codes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::quantize_avx2(float, bytes, blocksize, absmax, codes) },
        _ => quantize_portable(float, bytes, blocksize, absmax, codes),
    }
}

fn quantize_portable(
    float: Float,
    bytes: &[u8],
    blocksize: usize,
    absmax: &mut [f32],
    codes: &mut [u8],
) -> Result<(), usize> {
    let mut values = [0.0; MAX_BLOCKSIZE];
    let values = &mut values[..blocksize];
    let blocks = bytes.chunks_exact(blocksize * float.size()).zip(codes.chunks_exact_mut(blocksize / 2)).zip(absmax);
    for (index, ((bytes, codes), scale)) in blocks.enumerate() {
        float.decode(bytes, values);
        *scale = quantize_block(values, codes);
        if !scale.is_finite() {
            return Err(index);
        }
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector loads from and stores to arrays of the vector's size")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _CMP_GT_OQ, _mm_loadu_si128, _mm_setr_epi8, _mm_shuffle_epi8, _mm_storeu_si128,
        _mm_unpacklo_epi16, _mm256_abs_epi8, _mm256_add_epi32, _mm256_and_si256, _mm256_blendv_ps, _mm256_castps_si256,
        _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtph_ps, _mm256_extracti128_si256, _mm256_loadu_ps,
        _mm256_loadu_si256, _mm256_maddubs_epi16, _mm256_max_epi32, _mm256_mul_ps, _mm256_packs_epi16,
        _mm256_packs_epi32, _mm256_packus_epi16, _mm256_permutevar8x32_ps, _mm256_set1_epi16, _mm256_set1_epi32,
        _mm256_set1_ps, _mm256_setzero_si256, _mm256_storeu_si256, _mm512_and_si512, _mm512_castps_si512,
        _mm512_cmp_ps_mask, _mm512_cvtepi64_epi16, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_mask_add_epi32, _mm512_max_epu32, _mm512_mul_ps, _mm512_or_si512,
        _mm512_permutex2var_epi32, _mm512_permutex2var_ps, _mm512_reduce_max_epu32, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_si512, _mm512_slli_epi32, _mm512_slli_epi64, _mm512_srli_epi64,
    };
    use std::sync::LazyLock;

    use super::{Float, THRESHOLDS};
    use crate::nf4::tiles::{self, prefetch_ahead};
    use crate::nf4::{GROUP, MIN_SCALE};

    const CELLS: f32 = 15.0;

    /// 1.5 * 2^23, whose neighbours are integers apart, and CELLS, so that the lowest cell of -1 to 1 is 0.
    const ROUND: f32 = 12_582_912.0 + CELLS;

    fn cell(value: f32) -> usize {
        (value.mul_add(CELLS, ROUND).to_bits() & 31) as usize
    }

    /// The threshold in each cell, or one that nothing exceeds; and the number of thresholds in the cells before.
    static GRID: LazyLock<([f32; 32], [u32; 32])> = LazyLock::new(|| {
        let inside = |index| THRESHOLDS.into_iter().find(|&threshold| cell(threshold) == index);
        let before = |index| THRESHOLDS.into_iter().filter(|&threshold| cell(threshold) < index).count();
        (
            std::array::from_fn(|index| inside(index).unwrap_or(f32::INFINITY)),
            std::array::from_fn(|index| before(index) as u32),
        )
    });

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn quantize_avx2(
        float: Float,
        bytes: &[u8],
        blocksize: usize,
        absmax: &mut [f32],
        codes: &mut [u8],
    ) -> Result<(), usize> {
        if float == Float::F16 {
            let load = |group: &[u8; 64]| {
                let halves = group.as_chunks::<16>().0;
                // SAFETY: a chunk is 16 bytes.
                std::array::from_fn(|index| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(halves[index].as_ptr().cast())) })
            };
            quantize_blocks_avx2(bytes, blocksize, absmax, codes, load)
        } else {
            let load = |group: &[u8; 128]| {
                let floats = group.as_chunks::<32>().0;
                // SAFETY: a chunk is 32 bytes.
                std::array::from_fn(|index| unsafe { _mm256_loadu_ps(floats[index].as_ptr().cast()) })
            };
            quantize_blocks_avx2(bytes, blocksize, absmax, codes, load)
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn quantize_blocks_avx2<const N: usize>(
        bytes: &[u8],
        blocksize: usize,
        absmax: &mut [f32],
        codes: &mut [u8],
        load: impl Fn(&[u8; N]) -> [__m256; 4],
    ) -> Result<(), usize> {
        let largest = |block: &[[u8; N]]| {
            let mut top = _mm256_setzero_si256();
            for group in block {
                for values in load(group) {
                    let magnitude = _mm256_and_si256(_mm256_castps_si256(values), _mm256_set1_epi32(0x7fff_ffff));
                    top = _mm256_max_epi32(top, magnitude);
                }
            }
            let mut lanes = [0_u32; 8];
            // SAFETY: `lanes` is 32 bytes.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), top) };
            f32::from_bits(lanes.into_iter().fold(0, u32::max))
        };
        // Comparisons that hold are -1, so the bits found so far make an index of 0, -1, -2 ..: the tables, whose indices
        // are taken modulo 8, are written backwards.
        let table = |thresholds: [usize; 8]| {
            let table = thresholds.map(|index| THRESHOLDS[index]);
            // SAFETY: `table` is eight floats.
            unsafe { _mm256_loadu_ps(table.as_ptr()) }
        };
        let middle = _mm256_set1_ps(THRESHOLDS[7]);
        let (quarter, three_quarters) = (_mm256_set1_ps(THRESHOLDS[3]), _mm256_set1_ps(THRESHOLDS[11]));
        let eighths = table([1, 1, 1, 1, 1, 13, 9, 5]);
        let sixteenths = table([0, 14, 12, 10, 8, 6, 4, 2]);
        let encode = |absmax: f32, block: &[[u8; N]], codes: &mut [[u8; GROUP / 2]]| {
            let inverse = _mm256_set1_ps(1.0 / absmax.max(MIN_SCALE));
            for (group, codes) in block.iter().zip(codes) {
                prefetch_ahead(group);
                let [a, b, c, d] = load(group).map(|values| {
                    let values = _mm256_mul_ps(values, inverse);
                    let first = _mm256_cmp_ps::<_CMP_GT_OQ>(values, middle);
                    let second = _mm256_cmp_ps::<_CMP_GT_OQ>(values, _mm256_blendv_ps(quarter, three_quarters, first));
                    let found = _mm256_castps_si256(first);
                    let found = _mm256_add_epi32(_mm256_add_epi32(found, found), _mm256_castps_si256(second));
                    let third = _mm256_cmp_ps::<_CMP_GT_OQ>(values, _mm256_permutevar8x32_ps(eighths, found));
                    let found = _mm256_add_epi32(_mm256_add_epi32(found, found), _mm256_castps_si256(third));
                    let fourth = _mm256_cmp_ps::<_CMP_GT_OQ>(values, _mm256_permutevar8x32_ps(sixteenths, found));
                    _mm256_add_epi32(_mm256_add_epi32(found, found), _mm256_castps_si256(fourth))
                });
                // Within 128-bit halves: four codes of each vector; then in pairs, two bytes of each.
                let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(bytes), _mm256_set1_epi16(0x0110));
                let pairs = _mm256_packus_epi16(pairs, pairs);
                let (low, high) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
                // SAFETY: `codes` is 16 bytes.
                unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm_unpacklo_epi16(low, high)) };
            }
        };
        tiles::quantize(bytes, blocksize, absmax, codes, largest, encode)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    pub(super) fn quantize_avx512(
        float: Float,
        bytes: &[u8],
        blocksize: usize,
        absmax: &mut [f32],
        codes: &mut [u8],
    ) -> Result<(), usize> {
        if float == Float::F16 {
            let load = |group: &[u8; 64]| {
                let halves = group.as_chunks::<32>().0;
                // SAFETY: a chunk is 32 bytes.
                std::array::from_fn(|index| {
                    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves[index].as_ptr().cast()) })
                })
            };
            quantize_blocks_avx512(bytes, blocksize, absmax, codes, load)
        } else {
            let load = |group: &[u8; 128]| {
                let floats = group.as_chunks::<64>().0;
                // SAFETY: a chunk is 64 bytes.
                std::array::from_fn(|index| unsafe { _mm512_loadu_ps(floats[index].as_ptr().cast()) })
            };
            quantize_blocks_avx512(bytes, blocksize, absmax, codes, load)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    fn quantize_blocks_avx512<const N: usize>(
        bytes: &[u8],
        blocksize: usize,
        absmax: &mut [f32],
        codes: &mut [u8],
        load: impl Fn(&[u8; N]) -> [__m512; 2],
    ) -> Result<(), usize> {
        let (thresholds, before) = &*GRID;
        // SAFETY: the pointers are to sixteen values of 32 bits.
        let (thresholds, before) = unsafe {
            (
                [_mm512_loadu_ps(thresholds.as_ptr()), _mm512_loadu_ps(thresholds[16..].as_ptr())],
                [_mm512_loadu_si512(before.as_ptr().cast()), _mm512_loadu_si512(before[16..].as_ptr().cast())],
            )
        };
        let largest = |block: &[[u8; N]]| {
            let mut top = _mm512_setzero_si512();
            for group in block {
                for values in load(group) {
                    let magnitude = _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7fff_ffff));
                    top = _mm512_max_epu32(top, magnitude);
                }
            }
            f32::from_bits(_mm512_reduce_max_epu32(top))
        };
        let encode = |absmax: f32, block: &[[u8; N]], codes: &mut [[u8; GROUP / 2]]| {
            let inverse = _mm512_set1_ps(1.0 / absmax.max(MIN_SCALE));
            for (group, codes) in block.iter().zip(codes) {
                prefetch_ahead(group);
                let [first, second] = load(group).map(|values| {
                    let values = _mm512_mul_ps(values, inverse);
                    let cell = _mm512_fmadd_ps(values, _mm512_set1_ps(CELLS), _mm512_set1_ps(ROUND));
                    let cell = _mm512_castps_si512(cell);
                    let threshold = _mm512_permutex2var_ps(thresholds[0], cell, thresholds[1]);
                    let code = _mm512_permutex2var_epi32(before[0], cell, before[1]);
                    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(values, threshold);
                    _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1))
                });
                // In each 64 bits an even and an odd element of the first vector, and above them of the second: two bytes.
                let both = _mm512_or_si512(first, _mm512_slli_epi32::<8>(second));
                let pair = _mm512_or_si512(_mm512_slli_epi64::<4>(both), _mm512_srli_epi64::<32>(both));
                let pairs = _mm512_cvtepi64_epi16(pair);
                let apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
                // SAFETY: `codes` is 16 bytes.
                unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm_shuffle_epi8(pairs, apart)) };
            }
        };
        tiles::quantize(bytes, blocksize, absmax, codes, largest, encode)
    }
}
