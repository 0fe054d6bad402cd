//! Decoding: a table of the sixteen scaled levels for each block, in the output's type, looked up by permuting registers.
//!
//! Compilers make no vector code out of `table[code]`. The table is scaled and rounded once a block, so the lookups are of
//! 16 bits for bfloat16 and f16, of 32 for f32:
//!
//! - AVX-512 permutes 32 values of 16 bits, or sixteen of 32, by indices in the lanes that they are for. Only the lower
//!   bits of an index count, so two shifts spread a byte, its high half first: the even element comes first in memory.
//! - AVX2 permutes eight floats, so there both halves of the table are permuted and the code's top bit picks one. For 16
//!   bits it looks up lower and upper bytes apart, by sixteen, and interleaves them.
//!
//! An output larger than the caches is written past them, which saves reading it first.

use super::LEVELS;
use crate::{Float, Isa};

/// Decode `codes` to f32: whole blocks, and at the end possibly a shorter one.
pub(super) fn dequantize(isa: Isa, codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    if isa.min(Isa::detect()) == Isa::Portable {
        portable(codes, absmax, blocksize, out, |levels| levels);
    } else {
        dequantize_to(isa, Float::F32, codes, absmax, blocksize, bytes_of(out));
    }
}

/// The same in type `float`, as little-endian bytes.
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
pub(super) fn dequantize_to(isa: Isa, float: Float, codes: &[u8], absmax: &[f32], blocksize: usize, bytes: &mut [u8]) {
    let isa = isa.min(Isa::detect());
    let whole = if isa == Isa::Portable { 0 } else { bytes.len() / (blocksize * float.size()) };
    let (bytes, rest) = bytes.split_at_mut(whole * blocksize * float.size());
    let (rest_codes, rest_absmax) = (&codes[whole * blocksize / 2..], &absmax[whole..]);
    match isa {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::dequantize_avx512(float, codes, absmax, blocksize, bytes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::dequantize_avx2(float, codes, absmax, blocksize, bytes) },
        _ => {}
    }
    if float == Float::F32 {
        let rest = rest.as_chunks_mut::<4>().0;
        portable(rest_codes, rest_absmax, blocksize, rest, |levels| levels.map(f32::to_le_bytes));
    } else {
        let rest = rest.as_chunks_mut::<2>().0;
        portable(rest_codes, rest_absmax, blocksize, rest, |levels| {
            let mut table = [[0; 2]; 16];
            float.encode(&levels, table.as_flattened_mut());
            table
        });
    }
}

/// Decode by indexing `table(scaled levels)`.
fn portable<T: Copy>(
    codes: &[u8],
    absmax: &[f32],
    blocksize: usize,
    out: &mut [T],
    table: impl Fn([f32; 16]) -> [T; 16],
) {
    for ((block, codes), &scale) in out.chunks_mut(blocksize).zip(codes.chunks(blocksize / 2)).zip(absmax) {
        let table = table(LEVELS.map(|level| level * scale));
        let (pairs, tail) = block.as_chunks_mut::<2>();
        for (pair, &byte) in pairs.iter_mut().zip(codes) {
            *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
        }
        if let ([last], Some(&byte)) = (tail, codes.last()) {
            *last = table[usize::from(byte >> 4)];
        }
    }
}

#[allow(unsafe_code, reason = "floats seen as bytes")]
fn bytes_of(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: the same memory; any four bytes are a float.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector loads from and stores to arrays of the vector's size")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m256i, __m512i, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_and_si128,
        _mm_cvtsi32_si128, _mm_cvtsi64_si128, _mm_loadu_si128, _mm_set1_epi8, _mm_sfence, _mm_srli_epi16,
        _mm_unpackhi_epi8, _mm_unpacklo_epi8, _mm256_add_epi32, _mm256_and_si256, _mm256_blendv_ps,
        _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtepu8_epi64, _mm256_cvtps_ph,
        _mm256_loadu_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_packus_epi16, _mm256_packus_epi32,
        _mm256_permute2x128_si256, _mm256_permute4x64_epi64, _mm256_permutevar8x32_ps, _mm256_set_m128i,
        _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_set1_ps, _mm256_shuffle_epi8,
        _mm256_slli_epi32, _mm256_slli_epi64, _mm256_srli_epi16, _mm256_srli_epi32, _mm256_srli_epi64,
        _mm256_storeu_si256, _mm256_stream_si256, _mm256_unpackhi_epi8, _mm256_unpacklo_epi8, _mm512_add_epi32,
        _mm512_and_si512, _mm512_broadcast_i64x4, _mm512_castps_si512, _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16,
        _mm512_cvtepu8_epi32, _mm512_cvtepu8_epi64, _mm512_cvtps_ph, _mm512_loadu_ps, _mm512_mask_or_epi32,
        _mm512_mul_ps, _mm512_or_si512, _mm512_permutexvar_epi16, _mm512_permutexvar_epi32, _mm512_set1_epi32,
        _mm512_set1_ps, _mm512_slli_epi32, _mm512_slli_epi64, _mm512_srli_epi32, _mm512_srli_epi64,
        _mm512_storeu_si512, _mm512_stream_si512,
    };

    use super::{Float, LEVELS};

    /// Bytes of output from which it is written past the caches.
    const STREAMED: usize = 8 << 20;

    const ROUNDED: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    /// Decode whole blocks: `table(scale)` makes a block's table, `group(table, codes)` the values of `CODES` bytes of
    /// codes, and `store(out, values, streamed)` writes them to their `N` bytes.
    #[inline(always)]
    fn dequantize_blocks<Table: Copy, Values, const CODES: usize, const N: usize>(
        codes: &[u8],
        absmax: &[f32],
        groups: usize,
        bytes: &mut [u8],
        table: impl Fn(f32) -> Table,
        group: impl Fn(Table, &[u8; CODES]) -> Values,
        store: impl Fn(&mut [u8; N], Values, bool),
    ) {
        let streamed = bytes.len() >= STREAMED && bytes.as_ptr().addr().is_multiple_of(N);
        let (codes, out) = (codes.as_chunks().0, bytes.as_chunks_mut().0);
        for ((out, codes), &scale) in out.chunks_exact_mut(groups).zip(codes.chunks_exact(groups)).zip(absmax) {
            let table = table(scale);
            for (out, codes) in out.iter_mut().zip(codes) {
                store(out, group(table, codes), streamed);
            }
        }
        if streamed {
            // SAFETY: every x86-64 has it.
            unsafe { _mm_sfence() };
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn dequantize_avx2(float: Float, codes: &[u8], absmax: &[f32], blocksize: usize, bytes: &mut [u8]) {
        let scaled = |scale: f32| {
            let scale = _mm256_set1_ps(scale);
            // SAFETY: both pointers are to eight floats.
            let levels = unsafe { [_mm256_loadu_ps(LEVELS.as_ptr()), _mm256_loadu_ps(LEVELS[8..].as_ptr())] };
            levels.map(|levels| _mm256_mul_ps(levels, scale))
        };
        let write = |out: *mut __m256i, values: __m256i, streamed: bool| {
            // SAFETY: `out` is 32 bytes, aligned so if `streamed`.
            unsafe { if streamed { _mm256_stream_si256(out, values) } else { _mm256_storeu_si256(out, values) } }
        };
        if float == Float::F32 {
            let group = |[low, high]: [_; 2], codes: &[u8; 4]| {
                let byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(i32::from_le_bytes(*codes)));
                let odd = _mm256_slli_epi64::<32>(_mm256_and_si256(byte, _mm256_set1_epi64x(15)));
                let codes = _mm256_or_si256(_mm256_srli_epi64::<4>(byte), odd);
                let top_bit = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                let (low, high) = (_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes));
                _mm256_castps_si256(_mm256_blendv_ps(low, high, top_bit))
            };
            let store = |out: &mut [u8; 32], values, streamed| write(out.as_mut_ptr().cast(), values, streamed);
            return dequantize_blocks(codes, absmax, blocksize / 8, bytes, scaled, group, store);
        }
        // Lower and upper bytes of the table, each in both halves.
        let table = |scale: f32| {
            let words = if float == Float::F16 {
                let [low, high] = scaled(scale).map(|levels| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(levels));
                _mm256_set_m128i(high, low)
            } else {
                let [low, high] = scaled(scale).map(|levels| bf16_avx2(levels));
                _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high))
            };
            let (low, high) = (_mm256_and_si256(words, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(words));
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(low, high));
            [_mm256_permute2x128_si256::<0x00>(bytes, bytes), _mm256_permute2x128_si256::<0x11>(bytes, bytes)]
        };
        let group = |[low, high]: [__m256i; 2], codes: &[u8; 16]| {
            // SAFETY: `codes` is 16 bytes.
            let byte = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
            let nibble = _mm_set1_epi8(15);
            let (even, odd) = (_mm_and_si128(_mm_srli_epi16::<4>(byte), nibble), _mm_and_si128(byte, nibble));
            let codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
            let (low, high) = (_mm256_shuffle_epi8(low, codes), _mm256_shuffle_epi8(high, codes));
            // Values 0 to 7 and 16 to 23; 8 to 15 and 24 to 31.
            let (outer, inner) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
            [_mm256_permute2x128_si256::<0x20>(outer, inner), _mm256_permute2x128_si256::<0x31>(outer, inner)]
        };
        let store = |out: &mut [u8; 64], [first, second]: [__m256i; 2], streamed| {
            let (low, high) = out.split_at_mut(32);
            write(low.as_mut_ptr().cast(), first, streamed);
            write(high.as_mut_ptr().cast(), second, streamed);
        };
        dequantize_blocks(codes, absmax, blocksize / 32, bytes, table, group, store);
    }

    /// Eight floats rounded to bfloat16, to nearest with ties to even, each in 32 bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn bf16_avx2(values: __m256) -> __m256i {
        let bits = _mm256_castps_si256(values);
        let upper = _mm256_srli_epi32::<16>(bits);
        let to_even = _mm256_add_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, to_even));
        let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
        let rounded = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
        _mm256_castps_si256(rounded)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    pub(super) fn dequantize_avx512(float: Float, codes: &[u8], absmax: &[f32], blocksize: usize, bytes: &mut [u8]) {
        // SAFETY: the pointer is to sixteen floats.
        let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
        let scaled = |scale: f32| _mm512_mul_ps(levels, _mm512_set1_ps(scale));
        let store = |out: &mut [u8; 64], values: __m512i, streamed: bool| {
            let out = out.as_mut_ptr().cast();
            // SAFETY: `out` is 64 bytes, aligned so if `streamed`.
            unsafe { if streamed { _mm512_stream_si512(out, values) } else { _mm512_storeu_si512(out, values) } }
        };
        if float == Float::F32 {
            let table = |scale: f32| _mm512_castps_si512(scaled(scale));
            let group = |table: __m512i, codes: &[u8; 8]| {
                let byte = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*codes)));
                let codes = _mm512_or_si512(_mm512_srli_epi64::<4>(byte), _mm512_slli_epi64::<32>(byte));
                _mm512_permutexvar_epi32(codes, table)
            };
            return dequantize_blocks(codes, absmax, blocksize / 16, bytes, table, group, store);
        }
        // Twice in a row: the index of an odd element has a bit of the even one's code above its own four.
        let table = |scale: f32| {
            let levels = scaled(scale);
            let words = if float == Float::F16 {
                _mm512_cvtps_ph::<ROUNDED>(levels)
            } else {
                let bits = _mm512_castps_si512(levels);
                let upper = _mm512_srli_epi32::<16>(bits);
                let to_even =
                    _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
                let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, to_even));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(levels, levels);
                let rounded = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
                _mm512_cvtepi32_epi16(rounded)
            };
            _mm512_broadcast_i64x4(words)
        };
        let group = |table: __m512i, codes: &[u8; 16]| {
            // SAFETY: `codes` is 16 bytes.
            let byte = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
            let codes = _mm512_or_si512(_mm512_srli_epi32::<4>(byte), _mm512_slli_epi32::<16>(byte));
            _mm512_permutexvar_epi16(codes, table)
        };
        dequantize_blocks(codes, absmax, blocksize / 32, bytes, table, group, store);
    }
}
