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
//! out. AVX2 and portable code count comparisons. AVX-512 looks up: each 32 values of `s` hold at most one threshold, so an
//! entry of a table of 64, found with `s >> 5`, has the code and the threshold both: added to `s` it gives the code in
//! the bits above the lowest five.
//!
//! Both factors must keep all their bits: an `absmax` whose inverse is not a normal number, or whose 1/32 is not, goes the
//! slow way, through f32.

use std::sync::LazyLock;

use super::{THRESHOLDS as LEVEL_THRESHOLDS, quantize_block};
use crate::{Float, Isa};

/// Mantissa bits of a bfloat16.
const MANTISSA: u32 = 7;

/// Exponents below that of the absmax in which a code can differ from that of zero.
const BINADES: u16 = 5;

/// Values of `s` for each sign.
const STEPS: i16 = (BINADES as i16 + 1) << MANTISSA;

/// Values a group, which divides all blocksizes.
const GROUP: usize = 32;

/// Bits of the smallest magnitude that is not finite.
const INFINITY_BITS: u16 = 0x7f80;

/// For each mantissa of an absmax, the largest `s` that is not above each of the levels' thresholds. Each is there twice,
/// since 32 bits are the least that AVX2 broadcasts with a load alone; the sixteenth is above every `s`.
static THRESHOLDS: LazyLock<[[[i16; 2]; 16]; 128]> = LazyLock::new(|| {
    std::array::from_fn(|mantissa| {
        let absmax = bf16(0x3f80 + mantissa as u16);
        let base = 0x3f80 - (BINADES << MANTISSA);
        let scaled = |s: i16| {
            let magnitude = bf16(base + (s ^ (s >> 15)) as u16);
            (if s < 0 { -magnitude } else { magnitude }) * (1.0 / absmax)
        };
        let steps: Vec<i16> = (-STEPS..STEPS).collect();
        std::array::from_fn(|index| match LEVEL_THRESHOLDS.get(index) {
            Some(&threshold) => [steps[steps.partition_point(|&s| scaled(s) <= threshold) - 1]; 2],
            None => [i16::MAX; 2],
        })
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

/// Go over the blocks: `top(groups)` finds the largest magnitude, `encode(mantissa, base, group, codes)` writes a group.
#[inline(always)]
fn quantize_blocks(
    bytes: &[u8],
    blocksize: usize,
    absmax: &mut [f32],
    codes: &mut [u8],
    top: impl Fn(&[[u8; 2 * GROUP]]) -> u16,
    encode: impl Fn(usize, u16, &[[u8; 2 * GROUP]], &mut [[u8; GROUP / 2]]),
) -> Result<(), usize> {
    let groups = blocksize / GROUP;
    let (values, codes) = (bytes.as_chunks().0, codes.as_chunks_mut().0);
    let blocks = values.chunks_exact(groups).zip(codes.chunks_exact_mut(groups)).zip(absmax);
    for (index, ((block, codes), scale)) in blocks.enumerate() {
        let top = top(block);
        *scale = bf16(top);
        let exponent = top >> MANTISSA;
        // Down to 2^-121, above the least normal number by BINADES; up to 2^126, whose inverse is that number.
        if (BINADES + 1..253).contains(&exponent) {
            encode(usize::from(top & 0x7f), (exponent - BINADES) << MANTISSA, block, codes);
        } else if top < INFINITY_BITS {
            quantize_exotic(block.as_flattened(), codes.as_flattened_mut());
        } else {
            return Err(index);
        }
    }
    Ok(())
}

#[cold]
fn quantize_exotic(bytes: &[u8], codes: &mut [u8]) {
    let mut values = [0.0; 4096];
    let values = &mut values[..bytes.len() / 2];
    Float::BF16.decode(bytes, values);
    quantize_block(values, codes);
}

fn quantize_portable(bytes: &[u8], blocksize: usize, absmax: &mut [f32], codes: &mut [u8]) -> Result<(), usize> {
    let thresholds = &*THRESHOLDS;
    let words = |group: &[u8; 2 * GROUP]| -> [u16; GROUP] {
        let values = group.as_chunks::<2>().0;
        std::array::from_fn(|index| u16::from_le_bytes(values[index]))
    };
    let top = |block: &[[u8; 2 * GROUP]]| {
        let mut top = [0_i16; GROUP];
        for group in block {
            for (top, word) in top.iter_mut().zip(words(group)) {
                *top = (*top).max((word & 0x7fff) as i16);
            }
        }
        top.into_iter().fold(0, i16::max) as u16
    };
    let encode = |mantissa: usize, base: u16, block: &[[u8; 2 * GROUP]], codes: &mut [[u8; GROUP / 2]]| {
        for (group, codes) in block.iter().zip(codes) {
            let s = words(group).map(|word| (word & 0x7fff).saturating_sub(base) as i16 ^ (word as i16 >> 15));
            let mut below = [0_i16; GROUP];
            for &[threshold, _] in &thresholds[mantissa][..15] {
                for (below, s) in below.iter_mut().zip(s) {
                    *below += i16::from(threshold < s);
                }
            }
            for (code, [even, odd]) in codes.iter_mut().zip(below.as_chunks::<2>().0) {
                *code = (even << 4 | odd) as u8;
            }
        }
    };
    quantize_blocks(bytes, blocksize, absmax, codes, top, encode)
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector loads from and stores to arrays of the vector's size, prefetches")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _MM_HINT_T0, _mm_cvtsi128_si32, _mm_max_epu16, _mm_minpos_epu16, _mm_prefetch,
        _mm_set1_epi16, _mm_storeu_si128, _mm_unpacklo_epi32, _mm_xor_si128, _mm256_abs_epi8, _mm256_add_epi16,
        _mm256_and_si256, _mm256_castsi256_si128, _mm256_cmpgt_epi16, _mm256_extracti128_si256, _mm256_loadu_si256,
        _mm256_maddubs_epi16, _mm256_max_epu16, _mm256_packs_epi16, _mm256_packus_epi16, _mm256_set1_epi16,
        _mm256_set1_epi32, _mm256_setzero_si256, _mm256_srai_epi16, _mm256_subs_epu16, _mm256_xor_si256,
        _mm512_add_epi16, _mm512_and_si512, _mm512_castsi512_si256, _mm512_cvtepi32_epi8, _mm512_extracti64x4_epi64,
        _mm512_loadu_si512, _mm512_max_epu16, _mm512_permutex2var_epi16, _mm512_set1_epi16, _mm512_set1_epi32,
        _mm512_setzero_si512, _mm512_srai_epi16, _mm512_srli_epi16, _mm512_srli_epi32, _mm512_subs_epu16,
        _mm512_ternarylogic_epi32, _mm512_xor_si512,
    };
    use std::sync::LazyLock;

    use super::{GROUP, STEPS, THRESHOLDS, quantize_blocks};

    type Group = [u8; 2 * GROUP];

    /// Bytes that are prefetched ahead; the processor's own prefetcher stops at every page.
    const AHEAD: usize = 6144;

    /// For each mantissa of an absmax and each `s >> 5`, modulo 64, what is added to `s`.
    static ENTRIES: LazyLock<[[i16; 64]; 128]> = LazyLock::new(|| {
        std::array::from_fn(|mantissa| {
            let thresholds = THRESHOLDS[mantissa].map(|[threshold, _]| threshold);
            std::array::from_fn(|index| {
                let start = (index as i16) << 10 >> 5;
                if !(-STEPS..STEPS).contains(&start) {
                    return 0;
                }
                let below = thresholds.partition_point(|&threshold| threshold < start);
                let code = (below as i16) << 5;
                let threshold = thresholds[below];
                if threshold < start + 32 { code + 32 - (threshold + 1) } else { code - start }
            })
        })
    });

    #[inline]
    #[target_feature(enable = "sse4.1")]
    fn largest(words: __m128i) -> u16 {
        let flip = _mm_set1_epi16(-1);
        !_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(words, flip))) as u16
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_avx2(group: &Group) -> [__m256i; 2] {
        // SAFETY: `group` is 64 bytes; a prefetch may be of any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(group.as_ptr().wrapping_add(AHEAD).cast());
            [_mm256_loadu_si256(group.as_ptr().cast()), _mm256_loadu_si256(group[32..].as_ptr().cast())]
        }
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn quantize_avx2(
        bytes: &[u8],
        blocksize: usize,
        absmax: &mut [f32],
        codes: &mut [u8],
    ) -> Result<(), usize> {
        let thresholds = &*THRESHOLDS;
        let magnitude = _mm256_set1_epi16(0x7fff);
        let top = |block: &[Group]| {
            let mut top = _mm256_setzero_si256();
            for group in block {
                for words in load_avx2(group) {
                    top = _mm256_max_epu16(top, _mm256_and_si256(words, magnitude));
                }
            }
            largest(_mm_max_epu16(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top)))
        };
        let encode = |mantissa: usize, base: u16, block: &[Group], codes: &mut [[u8; GROUP / 2]]| {
            let base = _mm256_set1_epi16(base as i16);
            for (group, codes) in block.iter().zip(codes) {
                let s = load_avx2(group).map(|words| {
                    let above = _mm256_subs_epu16(_mm256_and_si256(words, magnitude), base);
                    _mm256_xor_si256(above, _mm256_srai_epi16::<15>(words))
                });
                // A comparison that holds is -1.
                let mut below = [_mm256_setzero_si256(); 2];
                for &[low, high] in &thresholds[mantissa][..15] {
                    let threshold = _mm256_set1_epi32(i32::from(low) & 0xffff | i32::from(high) << 16);
                    below[0] = _mm256_add_epi16(below[0], _mm256_cmpgt_epi16(s[0], threshold));
                    below[1] = _mm256_add_epi16(below[1], _mm256_cmpgt_epi16(s[1], threshold));
                }
                // Within 128-bit halves: eight codes of the first vector, eight of the second; then in pairs.
                let bytes = _mm256_abs_epi8(_mm256_packs_epi16(below[0], below[1]));
                let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
                let pairs = _mm256_packus_epi16(pairs, pairs);
                let (low, high) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
                // SAFETY: `codes` is 16 bytes.
                unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm_unpacklo_epi32(low, high)) };
            }
        };
        quantize_blocks(bytes, blocksize, absmax, codes, top, encode)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_avx512(group: &Group) -> __m512i {
        // SAFETY: `group` is 64 bytes; a prefetch may be of any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(group.as_ptr().wrapping_add(AHEAD).cast());
            _mm512_loadu_si512(group.as_ptr().cast())
        }
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
        let top = |block: &[Group]| {
            let mut top = _mm512_setzero_si512();
            for group in block {
                top = _mm512_max_epu16(top, _mm512_and_si512(load_avx512(group), magnitude));
            }
            let top = _mm256_max_epu16(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64::<1>(top));
            largest(_mm_max_epu16(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top)))
        };
        let encode = |mantissa: usize, base: u16, block: &[Group], codes: &mut [[u8; GROUP / 2]]| {
            let base = _mm512_set1_epi16(base as i16);
            let entries = &entries[mantissa];
            // SAFETY: both pointers are to 32 entries of 16 bits.
            let (low, high) = unsafe {
                (_mm512_loadu_si512(entries.as_ptr().cast()), _mm512_loadu_si512(entries[32..].as_ptr().cast()))
            };
            for (group, codes) in block.iter().zip(codes) {
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
        quantize_blocks(bytes, blocksize, absmax, codes, top, encode)
    }
}
