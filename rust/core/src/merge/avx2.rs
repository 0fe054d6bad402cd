//! Strips of 16 floats in two registers.

#![allow(unsafe_code, reason = "vector loads and stores of arrays of the vector's size")]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_FROUND_TO_NEAREST_INT, _mm_cmpeq_epi16, _mm_cvtsi32_si128, _mm_movemask_epi8,
    _mm_packs_epi16, _mm_storeu_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_and_si256,
    _mm256_blendv_ps, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmpeq_epi32, _mm256_cvtepu8_epi64,
    _mm256_cvtps_ph, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_movemask_ps, _mm256_mul_ps, _mm256_or_si256,
    _mm256_packus_epi32, _mm256_permute4x64_epi64, _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_set1_epi64x,
    _mm256_set1_ps, _mm256_setzero_si256, _mm256_slli_epi32, _mm256_slli_epi64, _mm256_srli_epi32, _mm256_srli_epi64,
    _mm256_storeu_si256, _mm256_sub_ps, _mm256_xor_si256,
};

use super::lanes::{HALF, KEPT, Lanes};
use crate::nf4::LEVELS;

/// Made only where the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

impl Lanes for Avx2 {
    type Floats = [__m256; 2];
    const WIDTH: usize = 16;

    #[inline(always)]
    fn load(self, values: &[f32]) -> [__m256; 2] {
        let values = values[..16].as_ptr();
        // SAFETY: the processor has AVX2, here and below; there are 16 floats.
        unsafe { [_mm256_loadu_ps(values), _mm256_loadu_ps(values.add(8))] }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: see `load`.
        let value = unsafe { _mm256_set1_ps(value) };
        [value, value]
    }

    #[inline(always)]
    fn add(self, left: [__m256; 2], right: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm256_add_ps(left[0], right[0]), _mm256_add_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn sub(self, left: [__m256; 2], right: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm256_sub_ps(left[0], right[0]), _mm256_sub_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn abs(self, values: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `load`.
        unsafe {
            let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
            [_mm256_and_ps(values[0], magnitude), _mm256_and_ps(values[1], magnitude)]
        }
    }

    #[inline(always)]
    fn mul_add(self, left: [__m256; 2], right: [__m256; 2], sum: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm256_fmadd_ps(left[0], right[0], sum[0]), _mm256_fmadd_ps(left[1], right[1], sum[1])] }
    }

    #[inline(always)]
    fn levels(self, codes: &[u8], scale: f32) -> [__m256; 2] {
        let (first, second) = (codes[..4].as_chunks::<4>().0[0], codes[4..8].as_chunks::<4>().0[0]);
        // SAFETY: see `load`; there are 16 levels.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let low = _mm256_mul_ps(_mm256_loadu_ps(LEVELS.as_ptr()), scale);
            let high = _mm256_mul_ps(_mm256_loadu_ps(LEVELS[8..].as_ptr()), scale);
            let first = indices_256(_mm_cvtsi32_si128(i32::from_le_bytes(first)));
            let second = indices_256(_mm_cvtsi32_si128(i32::from_le_bytes(second)));
            [look_up_256(low, high, first), look_up_256(low, high, second)]
        }
    }

    #[inline(always)]
    fn round<const BF16: bool>(self, low: [__m256; 2], high: [__m256; 2], out: &mut [[u8; 2]]) -> u32 {
        let out = out[..16].as_mut_ptr();
        // SAFETY: see `load`; `out` has 32 bytes.
        unsafe {
            if !BF16 {
                let (first, second) = (
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low[0]),
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low[1]),
                );
                _mm_storeu_si128(out.cast(), first);
                _mm_storeu_si128(out.add(8).cast(), second);
                let first = _mm_cmpeq_epi16(first, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high[0]));
                let second = _mm_cmpeq_epi16(second, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high[1]));
                return !_mm_movemask_epi8(_mm_packs_epi16(first, second)).cast_unsigned() & 0xffff;
            }
            let (first, second) = (half_up_256(low[0]), half_up_256(low[1]));
            let upper = _mm256_packus_epi32(_mm256_srli_epi32::<16>(first), _mm256_srli_epi32::<16>(second));
            _mm256_storeu_si256(out.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(upper));
            let (first, second) =
                (_mm256_xor_si256(first, half_up_256(high[0])), _mm256_xor_si256(second, half_up_256(high[1])));
            let (first, second) = (same_upper_256(first), same_upper_256(second));
            !(first | second << 8).cast_unsigned() & 0xffff
        }
    }
}

/// The codes of four bytes, each high half first, as eight numbers.
#[inline(always)]
unsafe fn indices_256(bytes: __m128i) -> __m256i {
    // SAFETY: the processor has AVX2.
    unsafe {
        let bytes = _mm256_cvtepu8_epi64(bytes);
        let odd = _mm256_slli_epi64::<32>(_mm256_and_si256(bytes, _mm256_set1_epi64x(15)));
        _mm256_or_si256(_mm256_srli_epi64::<4>(bytes), odd)
    }
}

/// Entries of a table in two halves.
#[inline(always)]
unsafe fn look_up_256(low: __m256, high: __m256, indices: __m256i) -> __m256 {
    // SAFETY: the processor has AVX2.
    unsafe {
        let top_bit = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
        let (low, high) = (_mm256_permutevar8x32_ps(low, indices), _mm256_permutevar8x32_ps(high, indices));
        _mm256_blendv_ps(low, high, top_bit)
    }
}

/// As [`half_up_512`].
#[inline(always)]
unsafe fn half_up_256(values: __m256) -> __m256i {
    // SAFETY: the processor has AVX2.
    unsafe { _mm256_add_epi32(_mm256_castps_si256(values), _mm256_set1_epi32(HALF)) }
}

/// Which of eight numbers have no bit set in their upper half.
#[inline(always)]
unsafe fn same_upper_256(differ: __m256i) -> i32 {
    // SAFETY: the processor has AVX2.
    unsafe {
        let upper = _mm256_and_si256(differ, _mm256_set1_epi32(KEPT));
        _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(upper, _mm256_setzero_si256())))
    }
}
