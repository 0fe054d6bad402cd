//! Strips of 32 floats in two registers.

#![allow(unsafe_code, reason = "vector loads and stores of arrays of the vector's size")]

use std::arch::x86_64::{
    __m128i, __m512, __m512i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_loadl_epi64, _mm256_cmpneq_epi16_mask,
    _mm256_storeu_si256, _mm512_abs_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_cmpneq_epi16_mask,
    _mm512_cvtepu8_epi64, _mm512_cvtps_ph, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_or_si512, _mm512_permutex2var_epi16, _mm512_permutexvar_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_si512, _mm512_sub_ps,
};

use super::lanes::{HALF, Lanes};
use crate::nf4::LEVELS;

const ROUNDED: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Made only where the processor has AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// The upper halves of 32 numbers of 32 bits, in order.
static UPPER: [u16; 32] = {
    let mut words = [0; 32];
    let mut word = 0;
    while word < 32 {
        words[word] = 2 * word as u16 + 1;
        word += 1;
    }
    words
};

impl Lanes for Avx512 {
    type Floats = [__m512; 2];
    const WIDTH: usize = 32;

    #[inline(always)]
    fn load(self, values: &[f32]) -> [__m512; 2] {
        let values = values[..32].as_ptr();
        // SAFETY: the processor has AVX-512, here and below; there are 32 floats.
        unsafe { [_mm512_loadu_ps(values), _mm512_loadu_ps(values.add(16))] }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [__m512; 2] {
        // SAFETY: see `load`.
        let value = unsafe { _mm512_set1_ps(value) };
        [value, value]
    }

    #[inline(always)]
    fn add(self, left: [__m512; 2], right: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm512_add_ps(left[0], right[0]), _mm512_add_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn sub(self, left: [__m512; 2], right: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm512_sub_ps(left[0], right[0]), _mm512_sub_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn abs(self, values: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm512_abs_ps(values[0]), _mm512_abs_ps(values[1])] }
    }

    #[inline(always)]
    fn mul_add(self, left: [__m512; 2], right: [__m512; 2], sum: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm512_fmadd_ps(left[0], right[0], sum[0]), _mm512_fmadd_ps(left[1], right[1], sum[1])] }
    }

    #[inline(always)]
    fn levels(self, codes: &[u8], scale: f32) -> [__m512; 2] {
        let codes = codes[..16].as_ptr();
        // SAFETY: see `load`; there are 16 bytes, and 16 levels.
        unsafe {
            let table = _mm512_mul_ps(_mm512_loadu_ps(LEVELS.as_ptr()), _mm512_set1_ps(scale));
            let first = indices_512(_mm_loadl_epi64(codes.cast()));
            let second = indices_512(_mm_loadl_epi64(codes.add(8).cast()));
            [_mm512_permutexvar_ps(first, table), _mm512_permutexvar_ps(second, table)]
        }
    }

    #[inline(always)]
    fn round<const BF16: bool>(self, low: [__m512; 2], high: [__m512; 2], out: &mut [[u8; 2]]) -> u32 {
        let out = out[..32].as_mut_ptr();
        // SAFETY: see `load`; `out` has 64 bytes.
        unsafe {
            if !BF16 {
                let (first, second) = (_mm512_cvtps_ph::<ROUNDED>(low[0]), _mm512_cvtps_ph::<ROUNDED>(low[1]));
                _mm256_storeu_si256(out.cast(), first);
                _mm256_storeu_si256(out.add(16).cast(), second);
                let first = _mm256_cmpneq_epi16_mask(first, _mm512_cvtps_ph::<ROUNDED>(high[0]));
                let second = _mm256_cmpneq_epi16_mask(second, _mm512_cvtps_ph::<ROUNDED>(high[1]));
                return u32::from(first) | u32::from(second) << 16;
            }
            let low = upper_512(half_up_512(low[0]), half_up_512(low[1]));
            let high = upper_512(half_up_512(high[0]), half_up_512(high[1]));
            _mm512_storeu_si512(out.cast(), low);
            _mm512_cmpneq_epi16_mask(low, high)
        }
    }
}

/// The upper halves of two times 16 numbers.
#[inline(always)]
unsafe fn upper_512(first: __m512i, second: __m512i) -> __m512i {
    // SAFETY: the processor has AVX-512; there are 32 words.
    unsafe { _mm512_permutex2var_epi16(first, _mm512_loadu_si512(UPPER.as_ptr().cast()), second) }
}

/// The codes of eight bytes, each high half first, in the low bits of 16 numbers.
#[inline(always)]
unsafe fn indices_512(bytes: __m128i) -> __m512i {
    // SAFETY: the processor has AVX-512.
    unsafe {
        let bytes = _mm512_cvtepu8_epi64(bytes);
        _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes))
    }
}

/// Bits of f32 whose upper halves are rounded half away from zero: no bound is a tie unless its value is in doubt.
#[inline(always)]
unsafe fn half_up_512(values: __m512) -> __m512i {
    // SAFETY: the processor has AVX-512.
    unsafe { _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(HALF)) }
}
