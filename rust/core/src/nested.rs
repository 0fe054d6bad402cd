//! Double quantization: the block scales of NF4, themselves stored in 8 bits.
//!
//! ```text
//! offset        = mean(absmax)                        in f64, rounded to f32 once
//! nested_absmax = max |absmax - offset|               over 256 scales
//! code          = TABLE[trunc((v + 1) / 2 * 65535 + 0.5)],  v = (absmax - offset) * (1 / nested_absmax)
//! absmax'       = quant_map[code] * nested_absmax + offset
//! ```
//!
//! The codes are those of bitsandbytes 0.50 on a CPU (`csrc/cpu_ops.cpp`), which looks them up in a table of 65,536
//! cells, each holding the level nearest to its centre; the CUDA kernel searches midpoints and differs in 0.09 to
//! 0.18 % of the codes at equal error. bitsandbytes takes the mean in f32, in an order that depends on the number of
//! threads; f64 makes it the same everywhere. `QLoRA`, arXiv 2305.14314, section 3; map: arXiv 1511.04561.

use std::sync::LazyLock;

use crate::isa::vectorized;

/// Scales per second-level scale. bitsandbytes' kernels accept no other value.
pub const BLOCKSIZE: usize = 256;

/// The signed dynamic map, ascending: bitsandbytes' `create_dynamic_map()`.
pub static QUANT_MAP: LazyLock<[f32; 256]> = LazyLock::new(dynamic_map);

static TABLE: LazyLock<Box<[u8; 65536]>> = LazyLock::new(|| {
    let midpoints: Vec<f32> = QUANT_MAP.windows(2).map(|pair| f32::midpoint(pair[0], pair[1])).collect();
    let centre = |cell: u32| cell as f32 / 65535.0 * 2.0 - 1.0;
    let code = |cell: usize| midpoints.partition_point(|&midpoint| midpoint < centre(cell as u32)) as u8;
    Box::new(std::array::from_fn(code))
});

/// Block scales in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    /// One code per block scale.
    pub codes: Vec<u8>,
    /// One second-level scale per [`BLOCKSIZE`] codes.
    pub absmax: Vec<f32>,
    /// What was subtracted from every block scale.
    pub offset: f32,
}

/// Number of second-level scales for `scales` block scales.
pub fn blocks(scales: u64) -> u64 {
    scales.div_ceil(BLOCKSIZE as u64)
}

/// The mean of `absmax`, summed in f64; 0 if there are none.
///
/// Sixteen partial sums, the i-th of the scales i, i + 16, i + 32 .., are added in order: the same bits on every
/// processor.
pub fn offset(absmax: &[f32]) -> f32 {
    let (groups, rest) = absmax.as_chunks::<16>();
    let mut sums = [0.0_f64; 16];
    vectorized(
        #[inline(always)]
        || {
            for group in groups {
                for (sum, &scale) in sums.iter_mut().zip(group) {
                    *sum += f64::from(scale);
                }
            }
        },
    );
    for (sum, &scale) in sums.iter_mut().zip(rest) {
        *sum += f64::from(scale);
    }
    (sums.into_iter().sum::<f64>() / absmax.len().max(1) as f64) as f32
}

/// Quantize `absmax` around `offset`.
pub fn quantize(absmax: &[f32], offset: f32) -> Nested {
    let mut codes = vec![0; absmax.len()];
    let mut nested_absmax = vec![0.0; absmax.len().div_ceil(BLOCKSIZE)];
    let table = &**TABLE;
    vectorized(
        #[inline(always)]
        || {
            let blocks = absmax.chunks(BLOCKSIZE).zip(codes.chunks_mut(BLOCKSIZE)).zip(&mut nested_absmax);
            for ((block, codes), scale) in blocks {
                // As integers, whose largest is found by vector instructions.
                let magnitude = |&value: &f32| (value - offset).to_bits() & 0x7fff_ffff;
                *scale = f32::from_bits(block.iter().map(magnitude).fold(0, u32::max));
                if *scale == 0.0 {
                    continue;
                }
                let inverse = 1.0 / *scale;
                // Two loops, of which the first becomes vector code.
                let mut cells = [0; BLOCKSIZE];
                for (cell, &value) in cells.iter_mut().zip(block) {
                    *cell = cell_of((value - offset) * inverse);
                }
                for (code, cell) in codes.iter_mut().zip(cells) {
                    *code = table[usize::from(cell)];
                }
            }
        },
    );
    Nested { codes, absmax: nested_absmax, offset }
}

/// The block scales that a reader of the checkpoint sees, with the map that the checkpoint carries.
///
/// # Panics
/// If `nested_absmax` has the wrong length.
pub fn dequantize(codes: &[u8], nested_absmax: &[f32], quant_map: &[f32; 256], offset: f32) -> Vec<f32> {
    let mut absmax = vec![0.0; codes.len()];
    dequantize_into(codes, nested_absmax, quant_map, offset, &mut absmax);
    absmax
}

/// The same into `absmax`.
///
/// # Panics
/// If `nested_absmax` or `absmax` has the wrong length.
pub fn dequantize_into(codes: &[u8], nested_absmax: &[f32], quant_map: &[f32; 256], offset: f32, absmax: &mut [f32]) {
    assert_eq!(nested_absmax.len(), codes.len().div_ceil(BLOCKSIZE), "wrong number of second-level scales");
    assert_eq!(absmax.len(), codes.len(), "wrong number of scales");
    vectorized(
        #[inline(always)]
        || {
            let blocks = absmax.chunks_mut(BLOCKSIZE).zip(codes.chunks(BLOCKSIZE)).zip(nested_absmax);
            for ((block, codes), &scale) in blocks {
                for (value, &code) in block.iter_mut().zip(codes) {
                    *value = quant_map[usize::from(code)] * scale + offset;
                }
            }
        },
    );
}

/// The cell of `TABLE` that a scaled value falls into.
#[inline(always)]
fn cell_of(value: f32) -> u16 {
    ((value.clamp(-1.0, 1.0) + 1.0) * 0.5 * 65535.0 + 0.5) as i32 as u16
}

/// Seven decades of linear fractions for each sign (2 to the decade's number of them), zero, and one.
fn dynamic_map() -> [f32; 256] {
    let mut levels = vec![0.0, 1.0];
    for decade in 0..7 {
        let count = 1_u16 << decade;
        let magnitude = 10_f64.powi(decade - 6) as f32;
        let boundary = |index: u16| linspace(0.1, 1.0, count + 1, index);
        for index in 0..count {
            let level = magnitude * f32::midpoint(boundary(index), boundary(index + 1));
            levels.extend([level, -level]);
        }
    }
    levels.sort_by(f32::total_cmp);
    levels.try_into().unwrap_or_else(|levels: Vec<f32>| unreachable!("{} levels", levels.len()))
}

/// `torch.linspace(start, end, steps)[index]` in f32: counted from the nearer end, product and sum rounded once, as
/// torch does with AVX2 and AVX-512. (Without them torch rounds twice, and 42 levels are one ulp off.)
fn linspace(start: f32, end: f32, steps: u16, index: u16) -> f32 {
    let step = (end - start) / f32::from(steps - 1);
    if index < steps / 2 {
        step.mul_add(f32::from(index), start)
    } else {
        (-step).mul_add(f32::from(steps - 1 - index), end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scales_are_stored_exactly() {
        let nested = quantize(&[0.25; 300], offset(&[0.25; 300]));
        assert_eq!((nested.offset, nested.absmax.as_slice()), (0.25, &[0.0, 0.0][..]));
        assert_eq!(dequantize(&nested.codes, &nested.absmax, &QUANT_MAP, nested.offset), [0.25; 300]);
    }

    #[test]
    fn the_map_ascends_from_its_largest_fraction_to_one() {
        assert!(QUANT_MAP.is_sorted());
        assert_eq!((QUANT_MAP[0], QUANT_MAP[127], QUANT_MAP[255]), (-0.992_968_74, 0.0, 1.0));
    }
}
