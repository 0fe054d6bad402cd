//! Looking up codes in a table of sixteen floats, by permuting vector registers.
//!
//! Compilers make no vector code out of `table[code]`. AVX-512 permutes sixteen floats by sixteen indices at once; AVX2
//! eight, so there both halves of the table are permuted and the code's top bit picks one. Either way a byte is first
//! spread over 64 bits, its high half in the lower 32: the even element comes first, as in memory.

#![allow(unsafe_code, reason = "vector stores to arrays of the vector's size")]

use std::arch::x86_64::{
    _mm_cvtsi32_si128, _mm_cvtsi64_si128, _mm256_and_si256, _mm256_blendv_ps, _mm256_castsi256_ps,
    _mm256_cvtepu8_epi64, _mm256_loadu_ps, _mm256_or_si256, _mm256_permutevar8x32_ps, _mm256_set1_epi64x,
    _mm256_slli_epi32, _mm256_slli_epi64, _mm256_srli_epi64, _mm256_storeu_ps, _mm512_and_si512, _mm512_cvtepu8_epi64,
    _mm512_loadu_ps, _mm512_or_si512, _mm512_permutexvar_ps, _mm512_set1_epi64, _mm512_slli_epi64, _mm512_srli_epi64,
    _mm512_storeu_ps,
};

use super::{dequantize_blocks, lookup};

/// `dequantize_blocks` with eight lookups at a time.
#[target_feature(enable = "avx2")]
pub(super) fn dequantize_avx2(codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    dequantize_blocks(codes, absmax, blocksize, out, |table, codes, out| {
        let (chunks, tail) = out.as_chunks_mut::<8>();
        let (bytes, tail_bytes) = codes.split_at(4 * chunks.len());
        // SAFETY: both pointers are to eight floats.
        let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table[8..].as_ptr())) };
        for (out, bytes) in chunks.iter_mut().zip(bytes.as_chunks::<4>().0) {
            let byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(i32::from_le_bytes(*bytes)));
            let odd = _mm256_slli_epi64::<32>(_mm256_and_si256(byte, _mm256_set1_epi64x(15)));
            let codes = _mm256_or_si256(_mm256_srli_epi64::<4>(byte), odd);
            let top_bit = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let (low, high) = (_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes));
            // SAFETY: `out` is eight floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_blendv_ps(low, high, top_bit)) };
        }
        lookup(table, tail_bytes, tail);
    });
}

/// `dequantize_blocks` with sixteen lookups at a time.
#[target_feature(enable = "avx512f")]
pub(super) fn dequantize_avx512(codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    dequantize_blocks(codes, absmax, blocksize, out, |table, codes, out| {
        let (chunks, tail) = out.as_chunks_mut::<16>();
        let (bytes, tail_bytes) = codes.split_at(8 * chunks.len());
        // SAFETY: the pointer is to sixteen floats.
        let levels = unsafe { _mm512_loadu_ps(table.as_ptr()) };
        for (out, bytes) in chunks.iter_mut().zip(bytes.as_chunks::<8>().0) {
            let byte = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes)));
            let odd = _mm512_slli_epi64::<32>(_mm512_and_si512(byte, _mm512_set1_epi64(15)));
            let codes = _mm512_or_si512(_mm512_srli_epi64::<4>(byte), odd);
            // SAFETY: `out` is sixteen floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(codes, levels)) };
        }
        lookup(table, tail_bytes, tail);
    });
}
