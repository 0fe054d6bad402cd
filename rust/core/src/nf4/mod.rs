//! 4-bit `NormalFloat` (NF4): sixteen levels, one f32 scale per block of weights, two codes a byte.
//!
//! The rule is that of bitsandbytes 0.50 on a CPU (`backends/default/ops.py`, `quantize_4bit`), bit for bit:
//!
//! ```text
//! absmax = max |x| over the block
//! v      = x * (1 / max(absmax, 1e-38))      in a full block
//! v      = x / max(absmax, 1e-38)            in a shorter last block, which also stores max(absmax, 1e-38)
//! code   = number of THRESHOLDS strictly below v
//! byte   = code of the even element << 4 | code of the odd element; an odd tail is padded with the code of 0.0
//! ```
//!
//! Blocks run over the row-major flattened tensor. Levels: Dettmers et al., "`QLoRA`", arXiv 2305.14314, appendix E.
//! Not done here: other codebooks (bitsandbytes ignores a stored `quant_map`), non-finite weights (refused).

#[cfg(target_arch = "x86_64")]
mod permute;

use crate::isa::{compiled_for, vectorized};
use crate::{Float, Isa};

/// The sixteen NF4 levels, ascending.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Midpoints between neighbouring levels, in f32 as bitsandbytes computes them.
pub const THRESHOLDS: [f32; 15] = {
    let mut midpoints = [0.0; 15];
    let mut index = 0;
    while index < 15 {
        midpoints[index] = f32::midpoint(LEVELS[index], LEVELS[index + 1]);
        index += 1;
    }
    midpoints
};

/// The blocksizes that bitsandbytes accepts.
pub const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The code of 0.0, with which an odd tail is padded.
pub(crate) const ZERO_CODE: u8 = 7;

/// The smallest scale that is divided by; keeps a block of zeros from dividing by zero.
pub(crate) const MIN_SCALE: f32 = 1e-38;

/// Values that are decoded, scaled and packed at a time: 16 kB of f32, which stay in the first-level cache.
const TILE: usize = 4096;

/// Bits of the smallest f32 magnitude that is not finite.
pub(crate) const INFINITY_BITS: u32 = 0x7f80_0000;

/// Number of blocks, and so of scales, for `elements` weights.
pub fn blocks(elements: u64, blocksize: usize) -> u64 {
    elements.div_ceil(blocksize as u64)
}

/// Number of bytes of codes for `elements` weights.
pub fn code_bytes(elements: u64) -> u64 {
    elements.div_ceil(2)
}

/// Quantize the weights in `bytes`, little-endian values of type `float`, which start at a block boundary and end at one
/// or at the tensor's end.
///
/// `absmax` takes one scale per block, `codes` half a byte per value.
///
/// # Errors
/// The index of the first value that is NaN or infinite; the outputs are then unspecified.
///
/// # Panics
/// If `blocksize` is not one of [`BLOCKSIZES`] or an output has the wrong length.
pub fn quantize(
    bytes: &[u8],
    float: Float,
    blocksize: usize,
    absmax: &mut [f32],
    codes: &mut [u8],
) -> Result<(), usize> {
    quantize_on(Isa::current(), bytes, float, blocksize, absmax, codes)
}

fn quantize_on(
    isa: Isa,
    bytes: &[u8],
    float: Float,
    blocksize: usize,
    absmax: &mut [f32],
    codes: &mut [u8],
) -> Result<(), usize> {
    check_lengths(bytes.len() / float.size(), blocksize, absmax.len(), codes.len());
    compiled_for(
        isa,
        #[inline(always)]
        || {
            let mut tile = [0.0; TILE];
            let tiles = bytes.chunks(TILE * float.size());
            let tiles = tiles.zip(absmax.chunks_mut(TILE / blocksize)).zip(codes.chunks_mut(TILE / 2));
            for (index, ((bytes, absmax), codes)) in tiles.enumerate() {
                let values = &mut tile[..bytes.len() / float.size()];
                float.decode(bytes, values);
                quantize_tile(values, blocksize, absmax, codes).map_err(|offender| index * TILE + offender)?;
            }
            Ok(())
        },
    )
}

/// Decode `out.len()` values, the first of which starts a block: `LEVELS[code] * absmax`, in f32.
///
/// # Panics
/// If `blocksize` is not one of [`BLOCKSIZES`] or an input has the wrong length.
pub fn dequantize(codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    dequantize_on(Isa::current(), codes, absmax, blocksize, out);
}

#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
fn dequantize_on(isa: Isa, codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    check_lengths(out.len(), blocksize, absmax.len(), codes.len());
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { permute::dequantize_avx512(codes, absmax, blocksize, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { permute::dequantize_avx2(codes, absmax, blocksize, out) },
        _ => dequantize_blocks(codes, absmax, blocksize, out, lookup),
    }
}

/// Decode the weights of `codes` as [`dequantize`] does and write them to `bytes` as little-endian values of type
/// `float`, rounded once.
///
/// # Panics
/// As [`dequantize`].
pub fn dequantize_to(float: Float, codes: &[u8], absmax: &[f32], blocksize: usize, bytes: &mut [u8]) {
    check_lengths(bytes.len() / float.size(), blocksize, absmax.len(), codes.len());
    let mut tile = [0.0; TILE];
    let tiles = bytes.chunks_mut(TILE * float.size());
    for ((bytes, codes), absmax) in tiles.zip(codes.chunks(TILE / 2)).zip(absmax.chunks(TILE / blocksize)) {
        let values = &mut tile[..bytes.len() / float.size()];
        dequantize(codes, absmax, blocksize, values);
        vectorized(
            #[inline(always)]
            || float.encode(values, bytes),
        );
    }
}

#[inline(always)]
fn quantize_tile(values: &[f32], blocksize: usize, absmax: &mut [f32], codes: &mut [u8]) -> Result<(), usize> {
    // Plain loops over blocks and then over pairs, each of which becomes vector code.
    let mut unpacked = [ZERO_CODE; TILE];
    let blocks = values.chunks(blocksize).zip(unpacked.chunks_mut(blocksize)).zip(absmax);
    for (index, ((block, unpacked), scale)) in blocks.enumerate() {
        let max_bits = block.iter().map(|value| value.to_bits() & 0x7fff_ffff).fold(0, u32::max);
        if max_bits >= INFINITY_BITS {
            let offender = block.iter().position(|value| !value.is_finite()).unwrap_or(0);
            return Err(index * blocksize + offender);
        }
        *scale = f32::from_bits(max_bits);
        if block.len() == blocksize {
            let inverse = 1.0 / scale.max(MIN_SCALE);
            for (code, &value) in unpacked.iter_mut().zip(block) {
                *code = nearest(value * inverse);
            }
        } else {
            *scale = scale.max(MIN_SCALE);
            for (code, &value) in unpacked.iter_mut().zip(block) {
                *code = nearest(value / *scale);
            }
        }
    }
    for (byte, [even, odd]) in codes.iter_mut().zip(unpacked.as_chunks::<2>().0) {
        *byte = even << 4 | odd;
    }
    Ok(())
}

/// Look the codes of every block up in its table of scaled levels, by `lookup(table, codes, values)`.
#[inline(always)]
fn dequantize_blocks(
    codes: &[u8],
    absmax: &[f32],
    blocksize: usize,
    out: &mut [f32],
    lookup: impl Fn(&[f32; 16], &[u8], &mut [f32]),
) {
    for ((block, packed), &scale) in out.chunks_mut(blocksize).zip(codes.chunks(blocksize / 2)).zip(absmax) {
        lookup(&LEVELS.map(|level| level * scale), packed, block);
    }
}

#[inline(always)]
fn lookup(table: &[f32; 16], codes: &[u8], values: &mut [f32]) {
    let (pairs, tail) = values.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(codes) {
        *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
    }
    if let ([last], Some(&byte)) = (tail, codes.last()) {
        *last = table[usize::from(byte >> 4)];
    }
}

pub(crate) fn check_blocksize(blocksize: usize) {
    assert!(BLOCKSIZES.contains(&blocksize), "blocksize {blocksize} is not one of {BLOCKSIZES:?}");
}

pub(crate) fn check_lengths(elements: usize, blocksize: usize, absmax: usize, codes: usize) {
    check_blocksize(blocksize);
    assert_eq!(absmax, elements.div_ceil(blocksize), "wrong number of scales for {elements} values");
    assert_eq!(codes, elements.div_ceil(2), "wrong number of code bytes for {elements} values");
}

/// The code of a scaled value: the number of thresholds strictly below it.
#[inline(always)]
pub(crate) fn nearest(value: f32) -> u8 {
    THRESHOLDS.iter().map(|&threshold| u32::from(threshold < value)).sum::<u32>() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantize(values: &[f32], blocksize: usize, absmax: &mut [f32], codes: &mut [u8]) -> Result<(), usize> {
        let mut bytes = vec![0; 4 * values.len()];
        Float::F32.encode(values, &mut bytes);
        super::quantize(&bytes, Float::F32, blocksize, absmax, codes)
    }

    #[test]
    fn a_zero_block_is_seven_seven_and_decodes_to_zero() {
        let (mut absmax, mut codes) = ([1.0], [0; 32]);
        quantize(&[0.0; 64], 64, &mut absmax, &mut codes).unwrap();
        assert_eq!((absmax, codes), ([0.0], [0x77; 32]));
        let mut out = [1.0; 64];
        dequantize(&codes, &absmax, 64, &mut out);
        assert_eq!(out, [0.0; 64]);
    }

    #[test]
    fn every_level_is_its_own_code_and_ties_go_down() {
        let mut values = [0.0; 32];
        values[..16].copy_from_slice(&LEVELS);
        values[16..31].copy_from_slice(&THRESHOLDS);
        let (mut absmax, mut codes) = ([0.0], [0; 16]);
        quantize(&values, 32, &mut absmax, &mut codes).unwrap();
        assert_eq!(codes[..8], [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        assert_eq!(codes[8..], [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xe7]);
    }

    #[test]
    fn an_odd_tail_is_padded_with_the_code_of_zero() {
        let (mut absmax, mut codes) = ([0.0], [0; 2]);
        quantize(&[1.0, -1.0, 1.0], 32, &mut absmax, &mut codes).unwrap();
        assert_eq!(codes, [0xf0, 0xf7]);
        let mut out = [0.0; 3];
        dequantize(&codes, &absmax, 32, &mut out);
        assert_eq!(out, [1.0, -1.0, 1.0]);
    }

    #[test]
    fn non_finite_values_are_refused_by_index() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [0.5; 100];
            values[70] = bad;
            assert_eq!(quantize(&values, 64, &mut [0.0; 2], &mut [0; 50]), Err(70));
        }
    }

    /// Every path of this processor gives the same bytes, on 16 million values of each type: any finite bit pattern.
    #[test]
    fn all_instruction_sets_agree() {
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        };
        for float in [Float::BF16, Float::F16, Float::F32] {
            for blocksize in BLOCKSIZES {
                // An odd tail, longer than a block of the smaller sizes.
                let elements = 2_000_000 + 33;
                let mut bytes: Vec<u8> =
                    (0..elements * float.size() / 2).flat_map(|_| (random() as u16).to_le_bytes()).collect();
                let mut values = vec![0.0; elements];
                float.decode(&bytes, &mut values);
                for (raw, value) in bytes.chunks_exact_mut(float.size()).zip(&values) {
                    if !value.is_finite() {
                        raw.fill(0);
                    }
                }
                let on = |isa| {
                    let mut absmax = vec![0.0; elements.div_ceil(blocksize)];
                    let mut codes = vec![0; elements.div_ceil(2)];
                    quantize_on(isa, &bytes, float, blocksize, &mut absmax, &mut codes).unwrap();
                    (absmax, codes)
                };
                let portable = on(Isa::Portable);
                assert!(on(Isa::Avx2) == portable, "AVX2 differs: {float:?}, blocksize {blocksize}");
                assert!(on(Isa::Avx512) == portable, "AVX-512 differs: {float:?}, blocksize {blocksize}");

                let (absmax, codes) = portable;
                let decoded = |isa| {
                    let mut values = vec![0.0; elements];
                    dequantize_on(isa, &codes, &absmax, blocksize, &mut values);
                    values
                };
                let portable = decoded(Isa::Portable);
                assert!(decoded(Isa::Avx2) == portable, "AVX2 decodes differently: blocksize {blocksize}");
                assert!(decoded(Isa::Avx512) == portable, "AVX-512 decodes differently: blocksize {blocksize}");
            }
        }
    }
}
