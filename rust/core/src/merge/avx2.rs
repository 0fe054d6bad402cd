//! Halves of strips: 16 floats in two registers of eight.

#![allow(unsafe_code, reason = "vector loads and stores of arrays of the vector's size")]

use std::arch::x86_64::{
    __m256, __m256i, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_cvtsi64_si128, _mm_movemask_epi8, _mm_packs_epi16,
    _mm_prefetch, _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_blend_epi16, _mm256_blendv_ps,
    _mm256_castpd_ps, _mm256_castps_pd, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_castsi256_si128,
    _mm256_cmpeq_epi16, _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32, _mm256_cvtps_ph, _mm256_extracti128_si256,
    _mm256_fmadd_ps, _mm256_load_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_permute4x64_pd,
    _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_shuffle_ps, _mm256_slli_epi32,
    _mm256_srli_epi32, _mm256_storeu_si256, _mm256_sub_ps,
};

use super::factors::{STRIP, Strip};
use super::lanes::{HALF, Lanes};
use crate::nf4::LEVELS;

/// Of pairs of 16-bit values, the second ones.
const SECOND: i32 = 0xaa;

/// Made only where the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

impl Lanes for Avx2 {
    type Floats = [__m256; 2];
    const WIDTH: usize = 16;

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: every x86-64 has it, and any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }

    #[inline(always)]
    fn part(self, strip: &Strip, part: usize) -> [__m256; 2] {
        let (even, odd) = strip.0.split_at(STRIP / 2);
        let (even, odd) = (even[part * 8..][..8].as_ptr(), odd[part * 8..][..8].as_ptr());
        // SAFETY: the processor has AVX2, here and below; there are eight floats, aligned to 32 bytes as the strip is to 64.
        unsafe { [_mm256_load_ps(even), _mm256_load_ps(odd)] }
    }

    #[inline(always)]
    fn apart(self, values: &[f32]) -> [__m256; 2] {
        let values = values[..16].as_ptr();
        // SAFETY: see `part`; there are 16 floats.
        unsafe {
            let (first, second) = (_mm256_loadu_ps(values), _mm256_loadu_ps(values.add(8)));
            // Pairs of the first and of the second in turns.
            let (even, odd) = (_mm256_shuffle_ps::<0x88>(first, second), _mm256_shuffle_ps::<0xdd>(first, second));
            [in_order_256(even), in_order_256(odd)]
        }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: see `part`.
        let value = unsafe { _mm256_set1_ps(value) };
        [value, value]
    }

    #[inline(always)]
    fn add(self, left: [__m256; 2], right: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `part`.
        unsafe { [_mm256_add_ps(left[0], right[0]), _mm256_add_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn sub(self, left: [__m256; 2], right: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `part`.
        unsafe { [_mm256_sub_ps(left[0], right[0]), _mm256_sub_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn abs(self, values: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `part`.
        unsafe {
            let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
            [_mm256_and_ps(values[0], magnitude), _mm256_and_ps(values[1], magnitude)]
        }
    }

    #[inline(always)]
    fn mul_add(self, left: [__m256; 2], right: [__m256; 2], sum: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `part`.
        unsafe { [_mm256_fmadd_ps(left[0], right[0], sum[0]), _mm256_fmadd_ps(left[1], right[1], sum[1])] }
    }

    #[inline(always)]
    fn levels(self, codes: &[u8], scale: f32) -> [__m256; 2] {
        let codes = i64::from_le_bytes(codes.as_chunks().0[0]);
        // SAFETY: see `part`; there are 16 levels.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let low = _mm256_mul_ps(_mm256_loadu_ps(LEVELS.as_ptr()), scale);
            let high = _mm256_mul_ps(_mm256_loadu_ps(LEVELS[8..].as_ptr()), scale);
            let odd = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(codes));
            let even = _mm256_srli_epi32::<4>(odd);
            [look_up_256(low, high, even), look_up_256(low, high, odd)]
        }
    }

    #[inline(always)]
    fn round<const BF16: bool>(self, low: [__m256; 2], high: [__m256; 2], out: &mut [[u8; 2]]) -> u32 {
        let out = out[..16].as_mut_ptr();
        // SAFETY: see `part`; `out` has 32 bytes.
        unsafe {
            let (low, high) = if BF16 { (bf16_256(low), bf16_256(high)) } else { (f16_256(low), f16_256(high)) };
            _mm256_storeu_si256(out.cast(), low);
            let same = _mm256_cmpeq_epi16(low, high);
            let same = _mm_packs_epi16(_mm256_castsi256_si128(same), _mm256_extracti128_si256::<1>(same));
            !_mm_movemask_epi8(same).cast_unsigned() & 0xffff
        }
    }
}

/// Eight floats in the order 0 1 4 5 2 3 6 7, put in order.
#[inline(always)]
unsafe fn in_order_256(values: __m256) -> __m256 {
    // SAFETY: the processor has AVX2.
    unsafe { _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(values))) }
}

/// Entries of a table in two halves, by the lower four bits of indices.
#[inline(always)]
unsafe fn look_up_256(low: __m256, high: __m256, indices: __m256i) -> __m256 {
    // SAFETY: the processor has AVX2.
    unsafe {
        let top_bit = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
        let (low, high) = (_mm256_permutevar8x32_ps(low, indices), _mm256_permutevar8x32_ps(high, indices));
        _mm256_blendv_ps(low, high, top_bit)
    }
}

/// As [`bf16_512`].
#[inline(always)]
unsafe fn bf16_256([even, odd]: [__m256; 2]) -> __m256i {
    // SAFETY: the processor has AVX2.
    unsafe {
        let half = _mm256_set1_epi32(HALF);
        let even = _mm256_add_epi32(_mm256_castps_si256(even), half);
        let odd = _mm256_add_epi32(_mm256_castps_si256(odd), half);
        _mm256_blend_epi16::<SECOND>(_mm256_srli_epi32::<16>(even), odd)
    }
}

/// Pairs of f16.
#[inline(always)]
unsafe fn f16_256([even, odd]: [__m256; 2]) -> __m256i {
    // SAFETY: the processor has AVX2.
    unsafe {
        let even = _mm256_cvtepu16_epi32(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(even));
        let odd = _mm256_cvtepu16_epi32(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(odd));
        _mm256_or_si256(even, _mm256_slli_epi32::<16>(odd))
    }
}
