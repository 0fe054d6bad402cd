//! MXFP4 weights, as of gpt-oss: groups of 32 E2M1 codes with one E8M0 scale (`*_blocks` and `*_scales`).
//!
//! ```text
//! blocks  U8 (.., out_features, in_features / 32, 16)    two codes a byte, the first in the LOW nibble
//! scales  U8 (.., out_features, in_features / 32)
//! weight[32 * group + index] = bf16(LEVELS[code] * 2^(scale - 127))      (.., out_features, in_features)
//! ```
//!
//! Format: OCP Microscaling Formats, version 1.0. Values are those of `convert_moe_packed_tensors` of transformers 5.19
//! (`integrations/mxfp4.py`), which then swaps the last two dimensions. It differs for a scale of 255, NaN in the
//! standard: the whole group is NaN here, and there only what overflows is not finite.

use super::bf16;
use super::fp8::exp2;
use crate::isa::compiled_for;
use crate::safetensors::Tensor;
use crate::{Dtype, Isa, Result};

/// Weights that share a scale.
pub const GROUP: usize = 32;

/// Bytes of codes a group.
const GROUP_BYTES: usize = GROUP / 2;

/// The shape of the weight that `blocks` and `scales` encode: (.., `out_features`, `in_features`).
///
/// # Errors
/// [`crate::Error::Malformed`], naming the tensor, what was expected and what was found, if one is not U8 or the shapes
/// do not belong together.
pub fn shape(blocks: Tensor<'_>, scales: Tensor<'_>) -> Result<Vec<u64>> {
    for tensor in [blocks, scales] {
        if tensor.info.dtype != Dtype::U8 {
            return Err(tensor.error(format!("is {}, expected U8", tensor.info.dtype.name())));
        }
    }
    let found = &blocks.info.shape;
    let Some((&16, grouped @ [rows @ .., groups])) = found.split_last().filter(|(_, grouped)| grouped.len() >= 2)
    else {
        return Err(blocks.error(format!("has shape {found:?}, expected [.., out_features, in_features / 32, 16]")));
    };
    if scales.info.shape != grouped {
        let (found, name) = (&scales.info.shape, &blocks.info.name);
        return Err(scales.error(format!("has shape {found:?}, expected {grouped:?} for {name}")));
    }
    Ok([rows, &[groups * GROUP as u64]].concat())
}

/// Decode a run of whole groups to little-endian bfloat16.
///
/// # Panics
/// If the numbers of `blocks`, `scales` and `out` do not match.
pub fn decode(blocks: &[u8], scales: &[u8], out: &mut [u8]) {
    decode_on(Isa::current(), blocks, scales, out);
}

fn decode_on(isa: Isa, blocks: &[u8], scales: &[u8], out: &mut [u8]) {
    assert_eq!(blocks.len(), scales.len() * GROUP_BYTES, "codes and scales differ in number");
    assert_eq!(out.len(), 4 * blocks.len(), "codes and bytes of bfloat16 differ in number");
    compiled_for(
        isa,
        #[inline(always)]
        || {
            let groups = blocks.as_chunks::<GROUP_BYTES>().0.iter().zip(out.as_chunks_mut::<{ 2 * GROUP }>().0);
            for ((codes, out), &scale) in groups.zip(scales) {
                let scale = if scale == 0xff { f32::NAN } else { exp2(scale) };
                for (pair, &byte) in out.as_chunks_mut::<4>().0.iter_mut().zip(codes) {
                    let [low, high] = [byte & 15, byte >> 4].map(|code| u32::from(bf16(e2m1(code) * scale)));
                    *pair = (low | high << 16).to_le_bytes();
                }
            }
        },
    );
}

/// The value of an E2M1 code: sign, two bits of exponent (bias 1), one of fraction.
#[inline(always)]
fn e2m1(code: u8) -> f32 {
    let magnitude = u32::from(code & 7);
    let normal = f32::from_bits((magnitude << 22) + ((127 - 1) << 23));
    let subnormal = magnitude as f32 * 0.5;
    let value = if magnitude < 2 { subnormal } else { normal };
    f32::from_bits(value.to_bits() | u32::from(code & 8) << 28)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Float;

    const LEVELS: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

    /// Every byte under every scale, on every path of this processor: what the standard defines.
    #[test]
    fn every_byte_under_every_scale() {
        let blocks: Vec<u8> = (0..=0xff).cycle().take(256 * 256).collect();
        let scales: Vec<u8> = (0..=0xff).flat_map(|scale| [scale; 16]).collect();
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            let mut out = vec![0; 4 * blocks.len()];
            decode_on(isa, &blocks, &scales, &mut out);
            let mut values = vec![0.0; 2 * blocks.len()];
            Float::BF16.decode(&out, &mut values);
            for (index, [low, high]) in values.as_chunks::<2>().0.iter().enumerate() {
                let (byte, exponent) = (blocks[index], i32::from(scales[index / 16]) - 127);
                for (value, code) in [(low, byte & 15), (high, byte >> 4)] {
                    // Exact in f64; only overflow rounds, to infinity.
                    let expected = (f64::from(LEVELS[usize::from(code)]) * 2_f64.powi(exponent)) as f32;
                    let same = value.to_bits() == expected.to_bits() || (exponent == 128 && value.is_nan());
                    assert!(same && (exponent == 128) == value.is_nan(), "{isa:?} {byte:#x} {exponent}: {value}");
                }
            }
        }
    }
}
