//! Sixteen floats, or 64 bytes, at a time. Registers of 16 floats are permuted in pairs, so tables have 32 entries.

#![allow(unsafe_code, reason = "vector loads and stores of arrays of the vector's size")]

use std::arch::x86_64::{
    __m128, __m512, __m512i, _CMP_LT_OQ, _mm_add_ps, _mm_add_ss, _mm_cvtsi128_si64, _mm_cvtss_f32, _mm_loadu_si128,
    _mm_movehdup_ps, _mm_movehl_ps, _mm_storeu_si128, _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
    _mm512_abs_epi8, _mm512_add_ps, _mm512_adds_epu16, _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castps_si512,
    _mm512_castps512_ps256, _mm512_cmp_ps_mask, _mm512_cvtepi64_epi8, _mm512_extractf32x8_ps,
    _mm512_extracti32x4_epi32, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maddubs_epi16, _mm512_mask_add_epi32,
    _mm512_mask_blend_epi8, _mm512_max_ps, _mm512_min_epu8, _mm512_min_ps, _mm512_movepi8_mask, _mm512_mul_ps,
    _mm512_or_si512, _mm512_permutex2var_epi32, _mm512_permutex2var_ps, _mm512_permutexvar_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi64, _mm512_srli_epi16,
    _mm512_srli_epi64, _mm512_sub_epi8, _mm512_sub_ps, _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
};

use super::avx2::sums_of_fourths;
use super::lanes::{Cells, Lanes};
use super::rank::{Errors, Rows, Table};
use crate::nf4::{LEVELS, THRESHOLDS};

/// Cells a unit: 31 of equal width from -1 to 1. Neighbouring thresholds are 0.0805 apart at least.
const CELLS_A_UNIT: f32 = 15.49;

/// Adding this leaves a cell's number in the low bits of the sum.
const ROUND: f32 = (3 << 22) as f32 + 16.0;

static CELLS: Cells<32> = Cells::new({
    let mut cell_of = [0; 15];
    let mut code = 0;
    while code < 15 {
        cell_of[code] = (THRESHOLDS[code] * CELLS_A_UNIT + ROUND).to_bits() as usize & 31;
        code += 1;
    }
    cell_of
});

/// Made only where the processor has AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

impl Lanes for Avx512 {
    type Floats = __m512;

    #[inline(always)]
    fn load(self, values: &[f32; 16]) -> __m512 {
        // SAFETY: as on `Avx512`, here and below; the pointer is to sixteen floats.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see `load`.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, left: __m512, right: __m512) -> __m512 {
        // SAFETY: see `load`.
        unsafe { _mm512_add_ps(left, right) }
    }

    #[inline(always)]
    fn sub(self, left: __m512, right: __m512) -> __m512 {
        // SAFETY: see `load`.
        unsafe { _mm512_sub_ps(left, right) }
    }

    #[inline(always)]
    fn mul(self, left: __m512, right: __m512) -> __m512 {
        // SAFETY: see `load`.
        unsafe { _mm512_mul_ps(left, right) }
    }

    #[inline(always)]
    fn sum(self, lanes: __m512) -> f32 {
        // SAFETY: see `load`.
        unsafe { sum(lanes) }
    }

    #[inline(always)]
    fn sums(self, lanes: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see `load`.
        unsafe { sums(lanes) }
    }

    #[inline(always)]
    fn below(self, sixteen: &[f32; 16], value: f32) -> usize {
        // SAFETY: see `load`.
        unsafe { below(self.load(sixteen), value) }
    }

    #[inline(always)]
    fn levels(self, scaled: __m512) -> __m512 {
        // SAFETY: see `load`.
        unsafe { levels(scaled) }
    }

    #[inline(always)]
    fn codes(self, scaled: __m512) -> [u8; 8] {
        // SAFETY: see `load`.
        unsafe { packed(scaled) }
    }

    #[inline(always)]
    fn rank(self, rows: &Rows, table: &Table) -> [Errors; 2] {
        // SAFETY: see `load`.
        unsafe { rank(rows, table) }
    }
}

/// The sums of every fourth lane.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn fourths(lanes: __m512) -> __m128 {
    let eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
    _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn sum(lanes: __m512) -> f32 {
    let four = fourths(lanes);
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn sums(lanes: [__m512; 4]) -> [f32; 4] {
    sums_of_fourths(lanes.map(|lanes| fourths(lanes)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn below(sixteen: __m512, value: f32) -> usize {
    _mm512_cmp_ps_mask::<_CMP_LT_OQ>(sixteen, _mm512_set1_ps(value)).count_ones() as usize
}

/// The code of each lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes(scaled: __m512) -> __m512i {
    // SAFETY: all pointers are to sixteen elements of four bytes.
    let (low_thresholds, high_thresholds, low_firsts, high_firsts) = unsafe {
        (
            _mm512_loadu_ps(CELLS.threshold.as_ptr()),
            _mm512_loadu_ps(CELLS.threshold[16..].as_ptr()),
            _mm512_loadu_si512(CELLS.first.as_ptr().cast()),
            _mm512_loadu_si512(CELLS.first[16..].as_ptr().cast()),
        )
    };
    let clamped = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(-1.0)), _mm512_set1_ps(1.0));
    let cell = _mm512_add_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(CELLS_A_UNIT)), _mm512_set1_ps(ROUND));
    let cell = _mm512_castps_si512(cell);
    let threshold = _mm512_permutex2var_ps(low_thresholds, cell, high_thresholds);
    let first = _mm512_permutex2var_epi32(low_firsts, cell, high_firsts);
    let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(threshold, scaled);
    _mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn levels(scaled: __m512) -> __m512 {
    // SAFETY: the pointer is to sixteen floats.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    _mm512_permutexvar_ps(codes(scaled), levels)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn packed(scaled: __m512) -> [u8; 8] {
    // A pair is 64 bits, its first code in the lower half.
    let pairs = codes(scaled);
    let bytes = _mm512_or_si512(_mm512_slli_epi64::<4>(pairs), _mm512_srli_epi64::<32>(pairs));
    _mm_cvtsi128_si64(_mm512_cvtepi64_epi8(bytes)).to_le_bytes()
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn rank(rows: &Rows, table: &Table) -> [Errors; 2] {
    // SAFETY: a table is sixteen bytes.
    let load = |table: &[u8; 16]| _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let [[positive_lower, positive_upper], [negative_lower, negative_upper]] = &table.sides;
    let (positive_lower, positive_upper) = (load(positive_lower), load(positive_upper));
    let (negative_lower, negative_upper) = (load(negative_lower), load(negative_upper));

    // How far the values of a row are from their levels, at the ratio and at its negative.
    let distances = |row: &[i8; 64]| -> [__m512i; 2] {
        // SAFETY: a row is 64 bytes.
        let value = unsafe { _mm512_loadu_si512(row.as_ptr().cast()) };
        let magnitude = _mm512_abs_epi8(value);
        let cell = _mm512_and_si512(_mm512_srli_epi16::<3>(magnitude), _mm512_set1_epi8(15));
        let to = |levels| _mm512_abs_epi8(_mm512_sub_epi8(magnitude, _mm512_shuffle_epi8(levels, cell)));
        let positive = _mm512_min_epu8(to(positive_lower), to(positive_upper));
        let negative = _mm512_min_epu8(to(negative_lower), to(negative_upper));
        let below_zero = _mm512_movepi8_mask(value);
        let same = _mm512_mask_blend_epi8(below_zero, positive, negative);
        [same, _mm512_mask_blend_epi8(below_zero, negative, positive)]
    };
    // For each sign the lower and the upper eight of every sixteen lanes.
    let mut sums = [[_mm512_setzero_si512(); 2]; 2];
    for [even, odd] in rows.as_chunks::<2>().0 {
        let (even, odd) = (distances(even), distances(odd));
        for sign in 0..2 {
            let lower = _mm512_unpacklo_epi8(even[sign], odd[sign]);
            let upper = _mm512_unpackhi_epi8(even[sign], odd[sign]);
            sums[sign][0] = _mm512_adds_epu16(sums[sign][0], _mm512_maddubs_epi16(lower, lower));
            sums[sign][1] = _mm512_adds_epu16(sums[sign][1], _mm512_maddubs_epi16(upper, upper));
        }
    }
    let mut errors = [[0; 64]; 2];
    for (errors, sums) in errors.iter_mut().zip(sums) {
        for (half, sums) in sums.into_iter().enumerate() {
            let eights = [
                _mm512_extracti32x4_epi32::<0>(sums),
                _mm512_extracti32x4_epi32::<1>(sums),
                _mm512_extracti32x4_epi32::<2>(sums),
                _mm512_extracti32x4_epi32::<3>(sums),
            ];
            for (errors, eight) in errors.as_chunks_mut::<16>().0.iter_mut().zip(eights) {
                let errors = &mut errors.as_chunks_mut::<8>().0[half];
                // SAFETY: `errors` is eight elements of two bytes.
                unsafe { _mm_storeu_si128(errors.as_mut_ptr().cast(), eight) };
            }
        }
    }
    errors
}
