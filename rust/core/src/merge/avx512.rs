//! Strips of 32 floats in two registers of sixteen.

#![allow(unsafe_code, reason = "vector loads and stores of arrays of the vector's size")]

use std::arch::x86_64::{
    __m512, __m512i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch,
    _mm512_abs_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_cmpneq_epi16_mask,
    _mm512_cvtepu8_epi32, _mm512_cvtepu16_epi32, _mm512_cvtps_ph, _mm512_fmadd_ps, _mm512_load_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512, _mm512_permutex2var_ps, _mm512_permutexvar_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_sub_ps,
    _mm512_ternarylogic_epi32,
};

use super::factors::Strip;
use super::lanes::{HALF, Lanes};
use crate::nf4::LEVELS;

const ROUNDED: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Made only where the processor has AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// The even ones of 32 numbers; the odd ones are those behind them.
static EVEN: [u32; 16] = {
    let mut numbers = [0; 16];
    let mut number = 0;
    while number < 16 {
        numbers[number] = 2 * number as u32;
        number += 1;
    }
    numbers
};

/// Of pairs of 16-bit values, the second ones.
const SECOND: i32 = 0xffff_0000_u32.cast_signed();

impl Lanes for Avx512 {
    type Floats = [__m512; 2];
    const WIDTH: usize = 32;

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: every x86-64 has it, and any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }

    #[inline(always)]
    fn part(self, strip: &Strip, _: usize) -> [__m512; 2] {
        let values = strip.0.as_ptr();
        // SAFETY: the processor has AVX-512, here and below; there are 32 floats, aligned to 64 bytes.
        unsafe { [_mm512_load_ps(values), _mm512_load_ps(values.add(16))] }
    }

    #[inline(always)]
    fn apart(self, values: &[f32]) -> [__m512; 2] {
        let values = values[..32].as_ptr();
        // SAFETY: see `part`; there are 32 floats, and 16 numbers.
        unsafe {
            let (first, second) = (_mm512_loadu_ps(values), _mm512_loadu_ps(values.add(16)));
            let even = _mm512_loadu_si512(EVEN.as_ptr().cast());
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            [_mm512_permutex2var_ps(first, even, second), _mm512_permutex2var_ps(first, odd, second)]
        }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [__m512; 2] {
        // SAFETY: see `part`.
        let value = unsafe { _mm512_set1_ps(value) };
        [value, value]
    }

    #[inline(always)]
    fn add(self, left: [__m512; 2], right: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `part`.
        unsafe { [_mm512_add_ps(left[0], right[0]), _mm512_add_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn sub(self, left: [__m512; 2], right: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `part`.
        unsafe { [_mm512_sub_ps(left[0], right[0]), _mm512_sub_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn abs(self, values: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `part`.
        unsafe { [_mm512_abs_ps(values[0]), _mm512_abs_ps(values[1])] }
    }

    #[inline(always)]
    fn mul_add(self, left: [__m512; 2], right: [__m512; 2], sum: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see `part`.
        unsafe { [_mm512_fmadd_ps(left[0], right[0], sum[0]), _mm512_fmadd_ps(left[1], right[1], sum[1])] }
    }

    #[inline(always)]
    fn levels(self, codes: &[u8], scale: f32) -> [__m512; 2] {
        let codes = codes[..16].as_ptr();
        // SAFETY: see `part`; there are 16 bytes, and 16 levels.
        unsafe {
            let table = _mm512_mul_ps(_mm512_loadu_ps(LEVELS.as_ptr()), _mm512_set1_ps(scale));
            // Only the lower four bits of an index count.
            let odd = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
            let even = _mm512_srli_epi32::<4>(odd);
            [_mm512_permutexvar_ps(even, table), _mm512_permutexvar_ps(odd, table)]
        }
    }

    #[inline(always)]
    fn round<const BF16: bool>(self, low: [__m512; 2], high: [__m512; 2], out: &mut [[u8; 2]]) -> u32 {
        let out = out[..32].as_mut_ptr();
        // SAFETY: see `part`; `out` has 64 bytes.
        unsafe {
            let (low, high) = if BF16 { (bf16_512(low), bf16_512(high)) } else { (f16_512(low), f16_512(high)) };
            _mm512_storeu_si512(out.cast(), low);
            _mm512_cmpneq_epi16_mask(low, high)
        }
    }
}

/// Pairs of bfloat16, rounded half away from zero: no bound is a tie unless its value is in doubt.
#[inline(always)]
unsafe fn bf16_512([even, odd]: [__m512; 2]) -> __m512i {
    // SAFETY: the processor has AVX-512.
    unsafe {
        let half = _mm512_set1_epi32(HALF);
        let even = _mm512_add_epi32(_mm512_castps_si512(even), half);
        let odd = _mm512_add_epi32(_mm512_castps_si512(odd), half);
        // even >> 16 | odd & SECOND
        _mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(even), odd, _mm512_set1_epi32(SECOND))
    }
}

/// Pairs of f16.
#[inline(always)]
unsafe fn f16_512([even, odd]: [__m512; 2]) -> __m512i {
    // SAFETY: the processor has AVX-512.
    unsafe {
        let even = _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<ROUNDED>(even));
        let odd = _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<ROUNDED>(odd));
        _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
    }
}
