//! Quantizing bfloat16 in 16-bit integers, without a division or a float.
//!
//! `x * (1 / absmax) > threshold` does not change when `x` and `absmax` are both multiplied by a power of two. So only the
//! 7 bits of the mantissa of `absmax` matter, and the place of `x` relative to its exponent. With the bits of both as
//! integers:
//!
//! ```text
//! base = (exponent of absmax - 5) << 7
//! s    = max(|x|, base) - base            0 to 767: six powers of two, in steps of 1/128 each
//! s    = -1 - s                           if x is negative: s ascends with x
//! code = number of the 15 integers THRESHOLDS[mantissa of absmax] below s
//! ```
//!
//! `s` is 0 or -1, and the code 7, up to 1/32 of the exponent of `absmax`: the innermost levels' thresholds are further
//! out. Three ways to count:
//!
//! - AVX-512: each 32 values of `s` hold at most one threshold, so an entry of a table of 64, found with `s >> 5`, has code
//!   and threshold both: added to `s` it gives the code in the bits above the lowest five.
//! - AVX2 halves the thresholds four times; in each step a table gives the middle one for the bits found so far.
//! - Portable code makes fifteen comparisons.
//!
//! Both factors must keep all their bits: an `absmax` whose inverse is not a normal number, or whose 1/32 is not, goes the
//! slow way, through f32.

#![allow(clippy::cast_possible_wrap, reason = "bits are seen as signed and unsigned in turn")]

use std::sync::LazyLock;

use super::{GROUP, MAX_BLOCKSIZE, THRESHOLDS as LEVEL_THRESHOLDS, quantize_block, tiles};
use crate::{Float, Isa};

/// Mantissa bits of a bfloat16.
const MANTISSA: u32 = 7;

/// Exponents below that of the absmax in which a code can differ from that of zero.
const BINADES: u16 = 5;

/// Values of `s` for each sign.
const STEPS: i16 = (BINADES as i16 + 1) << MANTISSA;

type Group = [u8; 2 * GROUP];

/// For each mantissa of an absmax, the largest `s` that is not above each of the levels' thresholds.
static THRESHOLDS: LazyLock<[[i16; 15]; 128]> = LazyLock::new(|| {
    std::array::from_fn(|mantissa| {
        let absmax = bf16(0x3f80 + mantissa as u16);
        let base = 0x3f80 - (BINADES << MANTISSA);
        let scaled = |s: i16| {
            let magnitude = bf16(base + (s ^ (s >> 15)) as u16);
            (if s < 0 { -magnitude } else { magnitude }) * (1.0 / absmax)
        };
        let steps: Vec<i16> = (-STEPS..STEPS).collect();
        LEVEL_THRESHOLDS.map(|threshold| steps[steps.partition_point(|&s| scaled(s) <= threshold) - 1])
    })
});

fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Quantize whole blocks of bfloat16 bits.
///
/// # Errors
/// The index of the first block that has a value that is not finite.
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
pub(super) fn quantize(
    isa: Isa,
    bytes: &[u8],
    blocksize: usize,
    absmax: &mut [f32],
    codes: &mut [u8],
) -> Result<(), usize> {
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::quantize_avx512(bytes, blocksize, absmax, codes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::quantize_avx2(bytes, blocksize, absmax, codes) },
        _ => quantize_portable(bytes, blocksize, absmax, codes),
    }
}

/// The mantissa and base for this absmax, if it is not one that goes the slow way.
#[inline(always)]
fn row(absmax: f32) -> Option<(usize, u16)> {
    let bits = (absmax.to_bits() >> 16) as u16;
    let exponent = bits >> MANTISSA;
    // Down to 2^-121, above the least normal number by BINADES; up to 2^126, whose inverse is that number.
    let plain = (BINADES + 1..253).contains(&exponent);
    plain.then(|| (usize::from(bits & 0x7f), (exponent - BINADES) << MANTISSA))
}

#[cold]
fn quantize_exotic(block: &[Group], codes: &mut [[u8; GROUP / 2]]) {
    let mut values = [0.0; MAX_BLOCKSIZE];
    let values = &mut values[..GROUP * block.len()];
    Float::BF16.decode(block.as_flattened(), values);
    quantize_block(values, codes.as_flattened_mut());
}

fn quantize_portable(bytes: &[u8], blocksize: usize, absmax: &mut [f32], codes: &mut [u8]) -> Result<(), usize> {
    let thresholds = &*THRESHOLDS;
    let words = |group: &Group| -> [u16; GROUP] {
        let values = group.as_chunks::<2>().0;
        std::array::from_fn(|index| u16::from_le_bytes(values[index]))
    };
    let largest = |block: &[Group]| {
        let mut top = [0_i16; GROUP];
        for group in block {
            for (top, word) in top.iter_mut().zip(words(group)) {
                *top = (*top).max((word & 0x7fff) as i16);
            }
        }
        bf16(top.into_iter().fold(0, i16::max) as u16)
    };
    let encode = |absmax: f32, block: &[Group], codes: &mut [[u8; GROUP / 2]]| {
        let Some((mantissa, base)) = row(absmax) else { return quantize_exotic(block, codes) };
        for (group, codes) in block.iter().zip(codes) {
            let s = words(group).map(|word| (word & 0x7fff).saturating_sub(base) as i16 ^ (word as i16 >> 15));
            let mut below = [0_i16; GROUP];
            for threshold in thresholds[mantissa] {
                for (below, s) in below.iter_mut().zip(s) {
                    *below += i16::from(threshold < s);
                }
            }
            for (code, [even, odd]) in codes.iter_mut().zip(below.as_chunks::<2>().0) {
                *code = (even << 4 | odd) as u8;
            }
        }
    };
    tiles::quantize(bytes, blocksize, absmax, codes, largest, encode)
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector loads from and stores to arrays of the vector's size")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _mm_cvtsi128_si32, _mm_loadu_si128, _mm_max_epu16, _mm_minpos_epu16, _mm_set1_epi16,
        _mm_storeu_si128, _mm_unpacklo_epi32, _mm_xor_si128, _mm256_and_si256, _mm256_broadcastsi128_si256,
        _mm256_castsi256_si128, _mm256_cmpgt_epi16, _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_maddubs_epi16,
        _mm256_max_epu16, _mm256_or_si256, _mm256_packus_epi16, _mm256_set1_epi16, _mm256_setzero_si256,
        _mm256_shuffle_epi8, _mm256_srai_epi16, _mm256_sub_epi16, _mm256_subs_epu16, _mm256_xor_si256,
        _mm512_add_epi16, _mm512_and_si512, _mm512_castsi512_si256, _mm512_cvtepi32_epi8, _mm512_extracti64x4_epi64,
        _mm512_loadu_si512, _mm512_max_epu16, _mm512_permutex2var_epi16, _mm512_set1_epi16, _mm512_set1_epi32,
        _mm512_setzero_si512, _mm512_srai_epi16, _mm512_srli_epi16, _mm512_srli_epi32, _mm512_subs_epu16,
        _mm512_ternarylogic_epi32, _mm512_xor_si512,
    };
    use std::sync::LazyLock;

    use super::{GROUP, Group, STEPS, THRESHOLDS, bf16, quantize_exotic, row};
    use crate::nf4::tiles::{self, prefetch_ahead};

    /// For each mantissa of an absmax the thresholds that each of four steps of halving can take, by the three bits of
    /// the code that the steps before it have found: bits not found yet count as 0.
    static HALVINGS: LazyLock<[[[i16; 8]; 4]; 128]> = LazyLock::new(|| {
        THRESHOLDS.map(|thresholds| {
            std::array::from_fn(|step| {
                let half = 8 >> step;
                std::array::from_fn(|found| thresholds[((2 * found) & !(2 * half - 1)) + half - 1])
            })
        })
    });

    /// For each mantissa of an absmax and each `s >> 5`, modulo 64, what is added to `s`.
    static ENTRIES: LazyLock<[[i16; 64]; 128]> = LazyLock::new(|| {
        std::array::from_fn(|mantissa| {
            let thresholds = &THRESHOLDS[mantissa];
            std::array::from_fn(|index| {
                let start = ((index as i16) << 10) >> 5;
                if !(-STEPS..STEPS).contains(&start) {
                    return 0;
                }
                let below = thresholds.partition_point(|&threshold| threshold < start);
                let code = (below as i16) << 5;
                match thresholds.get(below) {
                    Some(&threshold) if threshold < start + 32 => code + 32 - (threshold + 1),
                    _ => code - start,
                }
            })
        })
    });

    #[inline]
    #[target_feature(enable = "sse4.1")]
    fn largest_of(words: __m128i) -> f32 {
        let flip = _mm_set1_epi16(-1);
        bf16(!_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(words, flip))) as u16)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_avx2(group: &Group) -> [__m256i; 2] {
        // SAFETY: `group` is 64 bytes.
        unsafe { [_mm256_loadu_si256(group.as_ptr().cast()), _mm256_loadu_si256(group[32..].as_ptr().cast())] }
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn quantize_avx2(
        bytes: &[u8],
        blocksize: usize,
        absmax: &mut [f32],
        codes: &mut [u8],
    ) -> Result<(), usize> {
        let halvings = &*HALVINGS;
        let magnitude = _mm256_set1_epi16(0x7fff);
        let largest = |block: &[Group]| {
            let mut top = _mm256_setzero_si256();
            for group in block {
                for words in load_avx2(group) {
                    top = _mm256_max_epu16(top, _mm256_and_si256(words, magnitude));
                }
            }
            largest_of(_mm_max_epu16(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top)))
        };
        let encode = |absmax: f32, block: &[Group], codes: &mut [[u8; GROUP / 2]]| {
            let Some((mantissa, base)) = row(absmax) else { return quantize_exotic(block, codes) };
            let base = _mm256_set1_epi16(base as i16);
            // SAFETY: every pointer is to eight values of 16 bits.
            let tables = halvings[mantissa]
                .each_ref()
                .map(|table| _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) }));
            for (group, codes) in block.iter().zip(codes) {
                prefetch_ahead(group);
                let [first, second] = load_avx2(group).map(|words| {
                    let above = _mm256_subs_epu16(_mm256_and_si256(words, magnitude), base);
                    let s = _mm256_xor_si256(above, _mm256_srai_epi16::<15>(words));
                    // Three bits of code in each byte, above one that tells the bytes of a table's word apart.
                    let mut index = _mm256_set1_epi16(0x0100);
                    for (table, bit) in tables.into_iter().zip([0x0808, 0x0404, 0x0202]) {
                        let above = _mm256_cmpgt_epi16(s, _mm256_shuffle_epi8(table, index));
                        index = _mm256_or_si256(index, _mm256_and_si256(above, _mm256_set1_epi16(bit)));
                    }
                    // A comparison that holds is -1.
                    let above = _mm256_cmpgt_epi16(s, _mm256_shuffle_epi8(tables[3], index));
                    _mm256_and_si256(_mm256_sub_epi16(index, above), _mm256_set1_epi16(15))
                });
                // Within 128-bit halves: eight codes of the first vector, eight of the second; then in pairs.
                let bytes = _mm256_packus_epi16(first, second);
                let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
                let pairs = _mm256_packus_epi16(pairs, pairs);
                let (low, high) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
                // SAFETY: `codes` is 16 bytes.
                unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm_unpacklo_epi32(low, high)) };
            }
        };
        tiles::quantize(bytes, blocksize, absmax, codes, largest, encode)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_avx512(group: &Group) -> __m512i {
        // SAFETY: `group` is 64 bytes.
        unsafe { _mm512_loadu_si512(group.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub(super) fn quantize_avx512(
        bytes: &[u8],
        blocksize: usize,
        absmax: &mut [f32],
        codes: &mut [u8],
    ) -> Result<(), usize> {
        let entries = &*ENTRIES;
        let magnitude = _mm512_set1_epi16(0x7fff);
        let largest = |block: &[Group]| {
            let mut top = _mm512_setzero_si512();
            for group in block {
                top = _mm512_max_epu16(top, _mm512_and_si512(load_avx512(group), magnitude));
            }
            let top = _mm256_max_epu16(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64::<1>(top));
            largest_of(_mm_max_epu16(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top)))
        };
        let encode = |absmax: f32, block: &[Group], codes: &mut [[u8; GROUP / 2]]| {
            let Some((mantissa, base)) = row(absmax) else { return quantize_exotic(block, codes) };
            let base = _mm512_set1_epi16(base as i16);
            let entries = &entries[mantissa];
            // SAFETY: both pointers are to 32 entries of 16 bits.
            let (low, high) = unsafe {
                (_mm512_loadu_si512(entries.as_ptr().cast()), _mm512_loadu_si512(entries[32..].as_ptr().cast()))
            };
            for (group, codes) in block.iter().zip(codes) {
                prefetch_ahead(group);
                let words = load_avx512(group);
                let above = _mm512_subs_epu16(_mm512_and_si512(words, magnitude), base);
                let s = _mm512_xor_si512(above, _mm512_srai_epi16::<15>(words));
                let entry = _mm512_permutex2var_epi16(low, _mm512_srli_epi16::<5>(s), high);
                // 16 bits a value: the code in bits 5 to 8, nothing above. In pairs: bits 5 to 8, and from 21 on.
                let pair = _mm512_add_epi16(s, entry);
                let (even, odd) = (_mm512_srli_epi32::<1>(pair), _mm512_srli_epi32::<21>(pair));
                // even & 0xf0 | odd
                let byte = _mm512_ternarylogic_epi32::<0b1110_1010>(even, _mm512_set1_epi32(0xf0), odd);
                // SAFETY: `codes` is 16 bytes.
                unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(byte)) };
            }
        };
        tiles::quantize(bytes, blocksize, absmax, codes, largest, encode)
    }
}
