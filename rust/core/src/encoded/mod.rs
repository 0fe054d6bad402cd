//! Weights that a checkpoint stores encoded, decoded to bfloat16 as transformers 5.19 does when it dequantizes them.
//!
//! [`fp8`] and [`mxfp4`] are plain loops over runs of whole rows or groups, compiled for the processor's vector
//! instructions; every one gives the same bits. What is not a number in the source is not finite in the result, where
//! quantizing finds and refuses it.

pub mod fp8;
pub mod mxfp4;

use crate::dtype::bf16_bits;

/// `value` as bfloat16, with a single NaN: which one a product of two NaN gives is left to the compiler.
#[inline(always)]
fn bf16(value: f32) -> u16 {
    if value.is_nan() { 0x7fc0 } else { bf16_bits(value) }
}
