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

/// The smallest scale that is divided by; keeps a block of zeros from dividing by zero.
const MIN_SCALE: f32 = 1e-38;

/// Bits of the smallest f32 magnitude that is not finite.
const INFINITY_BITS: u32 = 0x7f80_0000;

/// Number of blocks, and so of scales, for `elements` weights.
pub fn blocks(elements: u64, blocksize: usize) -> u64 {
    elements.div_ceil(blocksize as u64)
}

/// Number of bytes of codes for `elements` weights.
pub fn code_bytes(elements: u64) -> u64 {
    elements.div_ceil(2)
}

/// Quantize `values`, which start at a block boundary and end at one or at the tensor's end.
///
/// `absmax` takes one scale per block, `codes` half a byte per value.
///
/// # Errors
/// The index of the first value that is NaN or infinite; the outputs are then unspecified.
///
/// # Panics
/// If `blocksize` is not one of [`BLOCKSIZES`] or an output has the wrong length.
pub fn quantize(values: &[f32], blocksize: usize, absmax: &mut [f32], codes: &mut [u8]) -> Result<(), usize> {
    check_lengths(values.len(), blocksize, absmax.len(), codes.len());
    let blocks = values.chunks(blocksize).zip(codes.chunks_mut(blocksize / 2)).zip(absmax);
    for (index, ((block, packed), scale)) in blocks.enumerate() {
        let max_bits = block.iter().map(|value| value.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        if max_bits >= INFINITY_BITS {
            let offender = block.iter().position(|value| !value.is_finite()).unwrap_or(0);
            return Err(index * blocksize + offender);
        }
        *scale = f32::from_bits(max_bits);
        if block.len() == blocksize {
            let inverse = 1.0 / scale.max(MIN_SCALE);
            pack_block(block, packed, |value| value * inverse);
        } else {
            let divisor = scale.max(MIN_SCALE);
            *scale = divisor;
            pack_block(block, packed, |value| value / divisor);
        }
    }
    Ok(())
}

/// Decode `out.len()` values, the first of which starts a block: `LEVELS[code] * absmax`, in f32.
///
/// # Panics
/// If `blocksize` is not one of [`BLOCKSIZES`] or an input has the wrong length.
pub fn dequantize(codes: &[u8], absmax: &[f32], blocksize: usize, out: &mut [f32]) {
    check_lengths(out.len(), blocksize, absmax.len(), codes.len());
    for ((block, packed), &scale) in out.chunks_mut(blocksize).zip(codes.chunks(blocksize / 2)).zip(absmax) {
        let table = LEVELS.map(|level| level * scale);
        let (pairs, tail) = block.as_chunks_mut::<2>();
        for (pair, &byte) in pairs.iter_mut().zip(packed) {
            *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
        }
        if let ([last], Some(&byte)) = (tail, packed.last()) {
            *last = table[usize::from(byte >> 4)];
        }
    }
}

fn check_lengths(elements: usize, blocksize: usize, absmax: usize, codes: usize) {
    assert!(BLOCKSIZES.contains(&blocksize), "blocksize {blocksize} is not one of {BLOCKSIZES:?}");
    assert_eq!(absmax, elements.div_ceil(blocksize), "wrong number of scales for {elements} values");
    assert_eq!(codes, elements.div_ceil(2), "wrong number of code bytes for {elements} values");
}

#[inline]
fn pack_block(block: &[f32], packed: &mut [u8], scaled: impl Fn(f32) -> f32) {
    let (pairs, tail) = block.as_chunks::<2>();
    for (byte, &[even, odd]) in packed.iter_mut().zip(pairs) {
        *byte = code(scaled(even)) << 4 | code(scaled(odd));
    }
    if let (&[last], Some(byte)) = (tail, packed.last_mut()) {
        *byte = code(scaled(last)) << 4 | code(0.0);
    }
}

#[inline]
fn code(value: f32) -> u8 {
    THRESHOLDS.iter().map(|&threshold| u8::from(threshold < value)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
