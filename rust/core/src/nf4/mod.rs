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
//! This file has the rule as plain code, which also takes what is rare: shorter last blocks and, of bfloat16, the ends of
//! the range. The files beside it do the same, bit for bit, with the processor's vector instructions.
//! Not done here: other codebooks (bitsandbytes ignores a stored `quant_map`), non-finite weights (refused).

mod dequantize;
mod moments;
mod quantize_bf16;
mod quantize_f32;
mod tiles;

pub use self::moments::{Moments, moments};

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

/// Values that the kernels take at a time, which divides all of [`BLOCKSIZES`].
const GROUP: usize = 32;

/// The largest of [`BLOCKSIZES`]: 16 kB of f32, which stay in the first-level cache.
const MAX_BLOCKSIZE: usize = 4096;

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
    let elements = bytes.len() / float.size();
    check_lengths(elements, blocksize, absmax.len(), codes.len());
    let whole = elements / blocksize;
    let (bytes, tail) = bytes.split_at(whole * blocksize * float.size());
    let (absmax, tail_absmax) = absmax.split_at_mut(whole);
    let (codes, tail_codes) = codes.split_at_mut(whole * blocksize / 2);
    let quantized = match float {
        Float::BF16 => quantize_bf16::quantize(isa, bytes, blocksize, absmax, codes),
        Float::F16 | Float::F32 => quantize_f32::quantize(isa, float, bytes, blocksize, absmax, codes),
    };
    quantized.map_err(|block| {
        let first = block * blocksize;
        first + offender(&bytes[first * float.size()..][..blocksize * float.size()], float)
    })?;
    if let [scale] = tail_absmax {
        let mut values = [0.0; MAX_BLOCKSIZE];
        let values = &mut values[..elements % blocksize];
        float.decode(tail, values);
        *scale = quantize_tail(values, tail_codes);
        if !scale.is_finite() {
            return Err(whole * blocksize + offender(tail, float));
        }
    }
    Ok(())
}

/// Decode `out.len()` values, the first of which starts a block: `LEVELS[code] * absmax`, in f32.
///
/// # Panics
/// If `blocksize` is not one of [`BLOCKSIZES`] or an input has the wrong length.
pub fn dequantize(codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    dequantize_on(Isa::current(), codes, absmax, blocksize, out);
}

fn dequantize_on(isa: Isa, codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    check_lengths(out.len(), blocksize, absmax.len(), codes.len());
    dequantize::dequantize(isa, codes, absmax, blocksize, out);
}

/// Decode the weights of `codes` as [`dequantize`] does and write them to `bytes` as little-endian values of type
/// `float`, rounded once.
///
/// # Panics
/// As [`dequantize`].
pub fn dequantize_to(float: Float, codes: &[u8], absmax: &[f32], blocksize: usize, bytes: &mut [u8]) {
    dequantize_to_on(Isa::current(), float, codes, absmax, blocksize, bytes);
}

fn dequantize_to_on(isa: Isa, float: Float, codes: &[u8], absmax: &[f32], blocksize: usize, bytes: &mut [u8]) {
    check_lengths(bytes.len() / float.size(), blocksize, absmax.len(), codes.len());
    dequantize::dequantize_to(isa, float, codes, absmax, blocksize, bytes);
}

/// Quantize one full block by the rule as it stands above and return its absmax; what has NaN or infinity in it returns
/// something that is not finite, its codes unspecified.
fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    let absmax = largest(values);
    let inverse = 1.0 / absmax.max(MIN_SCALE);
    pack(values, codes, |value| nearest(value * inverse));
    absmax
}

/// The same for a shorter last block.
fn quantize_tail(values: &[f32], codes: &mut [u8]) -> f32 {
    let absmax = largest(values);
    let scale = absmax.max(MIN_SCALE);
    pack(values, codes, |value| nearest(value / scale));
    if absmax.is_finite() { scale } else { absmax }
}

/// The largest magnitude, found as an integer: NaN is above all others.
fn largest(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().map(|value| value.to_bits() & 0x7fff_ffff).fold(0, u32::max))
}

/// Two codes a byte: plain loops, one over values and one over pairs, each of which becomes vector code.
#[inline(always)]
fn pack(values: &[f32], codes: &mut [u8], code: impl Fn(f32) -> u8) {
    for (values, codes) in values.chunks(GROUP).zip(codes.chunks_mut(GROUP / 2)) {
        let mut unpacked = [ZERO_CODE; GROUP];
        for (unpacked, &value) in unpacked.iter_mut().zip(values) {
            *unpacked = code(value);
        }
        for (byte, [even, odd]) in codes.iter_mut().zip(unpacked.as_chunks::<2>().0) {
            *byte = even << 4 | odd;
        }
    }
}

/// The index of the first value that is not finite; 0 if there is none.
fn offender(bytes: &[u8], float: Float) -> usize {
    let mut values = [0.0; MAX_BLOCKSIZE];
    let values = &mut values[..bytes.len() / float.size()];
    float.decode(bytes, values);
    values.iter().position(|value| !value.is_finite()).unwrap_or(0)
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
mod tests;
