//! Eight floats, or 32 bytes, at a time. Registers of eight floats are permuted and the better of two picked, so tables
//! have sixteen entries.

#![allow(unsafe_code, reason = "vector loads and stores of arrays of the vector's size")]

use std::arch::x86_64::{
    __m128, __m256, __m256i, _CMP_LT_OQ, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehdup_ps,
    _mm_movehl_ps, _mm_movelh_ps, _mm_storeu_ps, _mm_storeu_si128, _mm_unpackhi_ps, _mm_unpacklo_ps, _mm256_abs_epi8,
    _mm256_add_ps, _mm256_adds_epu16, _mm256_and_ps, _mm256_and_si256, _mm256_blendv_epi8, _mm256_blendv_ps,
    _mm256_broadcastsi128_si256, _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cmp_ps,
    _mm256_cvttps_epi32, _mm256_extractf128_ps, _mm256_extracti128_si256, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_maddubs_epi16, _mm256_min_epu8, _mm256_min_ps, _mm256_movemask_ps, _mm256_mul_ps, _mm256_or_si256,
    _mm256_permutevar8x32_ps, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256,
    _mm256_shuffle_epi8, _mm256_slli_epi32, _mm256_slli_epi64, _mm256_srli_epi16, _mm256_srli_epi64,
    _mm256_storeu_si256, _mm256_sub_epi8, _mm256_sub_epi32, _mm256_sub_ps, _mm256_unpackhi_epi8, _mm256_unpacklo_epi8,
};

use super::lanes::{Cells, Lanes};
use super::rank::{Errors, Rows, Table};
use crate::nf4::{LEVELS, THRESHOLDS};

/// `|x| * (BEND.0 - BEND.1 * |x|)` spreads the thresholds of either sign over 0 to 8, one to a unit.
const BEND: (f32, f32) = (12.8, 4.81);

/// Eight cells for negative values, then eight for positive ones, ascending.
const CELLS: Cells<16> = Cells::new({
    let mut cell_of = [0; 15];
    let mut code = 0;
    while code < 15 {
        let magnitude = THRESHOLDS[code].abs();
        let cell = (magnitude * (BEND.0 - magnitude * BEND.1)) as usize;
        cell_of[code] = if THRESHOLDS[code] < 0.0 { 7 - cell } else { 8 + cell };
        code += 1;
    }
    cell_of
});

/// The thresholds, and the first codes as the bits of floats, of eight cells by magnitude.
struct Side {
    thresholds: [f32; 8],
    firsts: [f32; 8],
}

static POSITIVE: Side = side(true);
static NEGATIVE: Side = side(false);

const fn side(positive: bool) -> Side {
    let mut side = Side { thresholds: [0.0; 8], firsts: [0.0; 8] };
    let mut cell = 0;
    while cell < 8 {
        let place = if positive { 8 + cell } else { 7 - cell };
        side.thresholds[cell] = CELLS.threshold[place];
        side.firsts[cell] = f32::from_bits(CELLS.first[place]);
        cell += 1;
    }
    side
}

/// Made only where the processor has AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

impl Lanes for Avx2 {
    type Floats = [__m256; 2];

    #[inline(always)]
    fn load(self, values: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: as on `Avx2`, here and below; the pointers are to eight floats each.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())] }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm256_set1_ps(value), _mm256_set1_ps(value)] }
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
    fn mul(self, left: [__m256; 2], right: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `load`.
        unsafe { [_mm256_mul_ps(left[0], right[0]), _mm256_mul_ps(left[1], right[1])] }
    }

    #[inline(always)]
    fn sum(self, lanes: [__m256; 2]) -> f32 {
        // SAFETY: see `load`.
        unsafe { sum(lanes) }
    }

    #[inline(always)]
    fn sums(self, lanes: [[__m256; 2]; 4]) -> [f32; 4] {
        // SAFETY: see `load`.
        unsafe { sums(lanes) }
    }

    #[inline(always)]
    fn below(self, sixteen: &[f32; 16], value: f32) -> usize {
        // SAFETY: see `load`.
        unsafe { below(self.load(sixteen), value) }
    }

    #[inline(always)]
    fn levels(self, scaled: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `load`.
        unsafe { [levels(scaled[0]), levels(scaled[1])] }
    }

    #[inline(always)]
    fn codes(self, scaled: [__m256; 2]) -> [u8; 8] {
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
#[target_feature(enable = "avx2")]
fn fourths(lanes: [__m256; 2]) -> __m128 {
    let eight = _mm256_add_ps(lanes[0], lanes[1]);
    _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight))
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum(lanes: [__m256; 2]) -> f32 {
    let four = fourths(lanes);
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Four sums at once, turned on their side.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sums_of_fourths([a, b, c, d]: [__m128; 4]) -> [f32; 4] {
    let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    let total = _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
    let mut sums = [0.0; 4];
    // SAFETY: `sums` is four floats.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), total) };
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn sums(lanes: [[__m256; 2]; 4]) -> [f32; 4] {
    sums_of_fourths(lanes.map(|lanes| fourths(lanes)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn below(sixteen: [__m256; 2], value: f32) -> usize {
    let value = _mm256_set1_ps(value);
    let [low, high] = sixteen.map(|eight| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(eight, value)));
    (low | high << 8).count_ones() as usize
}

/// The code of each lane.
#[inline]
#[target_feature(enable = "avx2")]
fn codes(scaled: __m256) -> __m256i {
    let magnitude = _mm256_and_ps(scaled, _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX)));
    let magnitude = _mm256_min_ps(magnitude, _mm256_set1_ps(1.0));
    let slope = _mm256_sub_ps(_mm256_set1_ps(BEND.0), _mm256_mul_ps(magnitude, _mm256_set1_ps(BEND.1)));
    let cell = _mm256_cvttps_epi32(_mm256_mul_ps(magnitude, slope));
    let threshold = lookup(&POSITIVE.thresholds, &NEGATIVE.thresholds, cell, scaled);
    let first = _mm256_castps_si256(lookup(&POSITIVE.firsts, &NEGATIVE.firsts, cell, scaled));
    let above = _mm256_cmp_ps::<_CMP_LT_OQ>(threshold, scaled);
    _mm256_sub_epi32(first, _mm256_castps_si256(above))
}

#[inline]
#[target_feature(enable = "avx2")]
fn levels(scaled: __m256) -> __m256 {
    let code = codes(scaled);
    let [low, high] = LEVELS.as_chunks::<8>().0 else { unreachable!("sixteen levels") };
    lookup(low, high, code, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn packed(scaled: [__m256; 2]) -> [u8; 8] {
    let mut bytes = [0_u64; 8];
    for (bytes, scaled) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(scaled) {
        // A pair is 64 bits, its first code in the lower half.
        let pairs = codes(scaled);
        let packed = _mm256_or_si256(_mm256_slli_epi64::<4>(pairs), _mm256_srli_epi64::<32>(pairs));
        // SAFETY: `bytes` is four elements of eight bytes.
        unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), packed) };
    }
    bytes.map(|byte| byte as u8)
}

/// The entries of `low`, or of `high` where `pick` has its sign bit, at the low three bits of `index`.
#[inline]
#[target_feature(enable = "avx2")]
fn lookup(low: &[f32; 8], high: &[f32; 8], index: __m256i, pick: __m256) -> __m256 {
    // SAFETY: both pointers are to eight floats.
    let (low, high) = unsafe { (_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())) };
    _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), pick)
}

#[inline]
#[target_feature(enable = "avx2")]
fn rank(rows: &Rows, table: &Table) -> [Errors; 2] {
    // SAFETY: a table is sixteen bytes.
    let load = |table: &[u8; 16]| _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let [[positive_lower, positive_upper], [negative_lower, negative_upper]] = &table.sides;
    let (positive_lower, positive_upper) = (load(positive_lower), load(positive_upper));
    let (negative_lower, negative_upper) = (load(negative_lower), load(negative_upper));

    // How far the values of half a row are from their levels, at the ratio and at its negative.
    let distances = |row: &[i8; 32]| -> [__m256i; 2] {
        // SAFETY: half a row is 32 bytes.
        let value = unsafe { _mm256_loadu_si256(row.as_ptr().cast()) };
        let magnitude = _mm256_abs_epi8(value);
        let cell = _mm256_and_si256(_mm256_srli_epi16::<3>(magnitude), _mm256_set1_epi8(15));
        let to = |levels| _mm256_abs_epi8(_mm256_sub_epi8(magnitude, _mm256_shuffle_epi8(levels, cell)));
        let positive = _mm256_min_epu8(to(positive_lower), to(positive_upper));
        let negative = _mm256_min_epu8(to(negative_lower), to(negative_upper));
        [_mm256_blendv_epi8(positive, negative, value), _mm256_blendv_epi8(negative, positive, value)]
    };
    let mut errors = [[0; 64]; 2];
    for half in 0..2 {
        // For each sign the lower and the upper eight of every sixteen lanes.
        let mut sums = [[_mm256_setzero_si256(); 2]; 2];
        for [even, odd] in rows.as_chunks::<2>().0 {
            let [even, odd] = [even, odd].map(|row| &row.as_chunks::<32>().0[half]);
            let (even, odd) = (distances(even), distances(odd));
            for sign in 0..2 {
                let lower = _mm256_unpacklo_epi8(even[sign], odd[sign]);
                let upper = _mm256_unpackhi_epi8(even[sign], odd[sign]);
                sums[sign][0] = _mm256_adds_epu16(sums[sign][0], _mm256_maddubs_epi16(lower, lower));
                sums[sign][1] = _mm256_adds_epu16(sums[sign][1], _mm256_maddubs_epi16(upper, upper));
            }
        }
        for (errors, [lower, upper]) in errors.iter_mut().zip(sums) {
            let sixteens = errors.as_chunks_mut::<16>().0[2 * half..].iter_mut();
            let lower = [_mm256_extracti128_si256::<0>(lower), _mm256_extracti128_si256::<1>(lower)];
            let upper = [_mm256_extracti128_si256::<0>(upper), _mm256_extracti128_si256::<1>(upper)];
            for ((errors, lower), upper) in sixteens.zip(lower).zip(upper) {
                // SAFETY: `errors` is sixteen elements of two bytes.
                unsafe {
                    _mm_storeu_si128(errors.as_mut_ptr().cast(), lower);
                    _mm_storeu_si128(errors[8..].as_mut_ptr().cast(), upper);
                }
            }
        }
    }
    errors
}
