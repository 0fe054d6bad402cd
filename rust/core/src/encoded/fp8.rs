//! FP8 weights: E4M3 codes with one scale per block of rows and columns (`weight_scale_inv`).
//!
//! ```text
//! weight[row, column] = bf16(f32(code[row, column]) * f32(scale[row / block rows, column / block columns]))
//! ```
//!
//! one f32 product and one rounding to nearest even, as `Fp8Dequantize` of transformers 5.19
//! (`integrations/finegrained_fp8.py`) computes it for a bfloat16 model. E4M3 is the variant without infinities
//! (Micikevicius et al., arXiv 2209.05433): 0x7f and 0xff are NaN. Scales are floats, or E8M0 exponents (also stored as
//! U8), which stand for `2^(exponent - 127)`.
//!
//! The block is the config's `weight_block_size`, and blocks at the lower and right edges may be cut off, as `DeepSeek`
//! defines the format (`weight_dequant`). transformers instead divides the weight evenly by the number of scales, which
//! comes to the same where nothing is cut off; elsewhere it stops or, if the division comes out even, is wrong.

use super::bf16;
use crate::isa::compiled_for;
use crate::safetensors::Tensor;
use crate::{Dtype, Float, Isa};

/// An encoded weight and its scales in their files, dtypes and shapes checked.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    scales: Tensor<'a>,
    grid: Grid,
}

/// The scales of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    values: Vec<f32>, // (matrices, grid.rows(), grid.columns())
    grid: Grid,
}

/// Where the blocks of a weight lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    out_features: usize,
    in_features: usize,
    matrices: usize,
    /// Rows and columns a block.
    block: [usize; 2],
}

impl Grid {
    /// The blocks of a weight of shape `shape`, (.., `out_features`, `in_features`); without `block`, one scale is for
    /// all.
    ///
    /// # Errors
    /// One line, if the weight has fewer than two dimensions or no elements, or a block none.
    pub fn new(shape: &[u64], block: Option<[u64; 2]>) -> Result<Self, String> {
        let &[ref matrices @ .., out_features, in_features] = shape else {
            return Err(format!("has shape {shape:?}, expected at least two dimensions"));
        };
        let matrices = matrices.iter().product::<u64>();
        // One scale for all: a single matrix of all rows, and as large a block.
        let (matrices, out_features) =
            if block.is_some() { (matrices, out_features) } else { (1, matrices * out_features) };
        let block = block.unwrap_or([out_features, in_features]);
        if shape.contains(&0) || block.contains(&0) {
            return Err(format!("has shape {shape:?} in blocks of {block:?}, expected no dimension of 0"));
        }
        let [out_features, in_features, matrices] = [out_features, in_features, matrices].map(|size| size as usize);
        Ok(Self { out_features, in_features, matrices, block: block.map(|size| size as usize) })
    }

    /// Rows of scales of one matrix.
    fn rows(self) -> usize {
        self.out_features.div_ceil(self.block[0])
    }

    /// Scales a row.
    fn columns(self) -> usize {
        self.in_features.div_ceil(self.block[1])
    }

    /// Scales of the whole weight.
    fn scales(self) -> usize {
        self.matrices * self.rows() * self.columns()
    }
}

impl<'a> Weight<'a> {
    /// The encoded weight `codes` with its `scales`; `block` is the config's `weight_block_size`, None where that is
    /// null (one scale a tensor).
    ///
    /// # Errors
    /// [`crate::Error::Malformed`], naming the tensor, what was expected and what was found, if the codes are not
    /// `F8_E4M3`, the scales are no type of scale, or the shapes do not belong together.
    pub fn open(codes: Tensor<'a>, scales: Tensor<'a>, block: Option<[u64; 2]>) -> crate::Result<Self> {
        if codes.info.dtype != Dtype::F8E4M3 {
            return Err(codes.error(format!("is {}, expected F8_E4M3", codes.info.dtype.name())));
        }
        let grid = Grid::new(&codes.info.shape, block).map_err(|reason| codes.error(reason))?;
        if !is_scale(scales.info.dtype) {
            let found = scales.info.dtype.name();
            return Err(scales.error(format!("is {found}, expected F32, BF16, F16, F8_E8M0 or U8")));
        }
        let (found, weight) = (&scales.info.shape, &codes.info.name);
        if block.is_none() && scales.info.elements() != 1 {
            return Err(scales.error(format!("has shape {found:?}, expected a single scale for {weight}")));
        }
        let mut expected = codes.info.shape.clone();
        if let (Some(block), [.., rows, columns]) = (block, &mut expected[..]) {
            [*rows, *columns] = [grid.rows() as u64, grid.columns() as u64];
            if *found != expected {
                let (shape, [rows, columns]) = (&codes.info.shape, block);
                let blocks = format!("blocks of {rows}x{columns} of {weight} of shape {shape:?}");
                return Err(scales.error(format!("has shape {found:?}, expected {expected:?} for {blocks}")));
            }
        }
        Ok(Self { scales, grid })
    }

    /// Read the scales.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn read_scales(&self) -> crate::Result<Scales> {
        Scales::new(&self.scales.read()?, self.scales.info.dtype, self.grid).map_err(|reason| self.scales.error(reason))
    }
}

impl Scales {
    /// The scales in `bytes`, little-endian values of type `dtype`.
    ///
    /// # Errors
    /// One line, if `dtype` is no type of scale or the number of scales is not that of `grid`.
    pub fn new(bytes: &[u8], dtype: Dtype, grid: Grid) -> Result<Self, String> {
        if !is_scale(dtype) {
            return Err(format!("scales are {}, expected F32, BF16, F16, F8_E8M0 or U8", dtype.name()));
        }
        if bytes.len() as u64 != grid.scales() as u64 * dtype.size() {
            return Err(format!("{} bytes are not {} scales of {}", bytes.len(), grid.scales(), dtype.name()));
        }
        let mut values = vec![0.0; grid.scales()];
        if let Some(float) = Float::from_dtype(dtype) {
            float.decode(bytes, &mut values);
        } else {
            for (value, &exponent) in values.iter_mut().zip(bytes) {
                *value = exp2(exponent);
                // E8M0's NaN; read as U8, it overflows to infinity.
                if exponent == 0xff && dtype == Dtype::F8E8M0 {
                    *value = f32::NAN;
                }
            }
        }
        Ok(Self { values, grid })
    }

    /// Decode whole rows of the weight, the first of which is row `first_row` (counted through all its matrices), to
    /// little-endian bfloat16.
    ///
    /// # Panics
    /// If `codes` are no whole rows of the weight, or `out` is not twice as long.
    pub fn decode_rows(&self, codes: &[u8], first_row: usize, out: &mut [u8]) {
        self.decode_rows_on(Isa::current(), codes, first_row, out);
    }

    fn decode_rows_on(&self, isa: Isa, codes: &[u8], first_row: usize, out: &mut [u8]) {
        let Grid { out_features, in_features, block: [block_rows, block_columns], .. } = self.grid;
        assert!(codes.len().is_multiple_of(in_features), "{} codes are no rows of {in_features}", codes.len());
        assert_eq!(out.len(), 2 * codes.len(), "codes and bytes of bfloat16 differ in number");
        compiled_for(
            isa,
            #[inline(always)]
            || {
                let rows = codes.chunks_exact(in_features).zip(out.chunks_exact_mut(2 * in_features));
                for (row, (codes, out)) in (first_row..).zip(rows) {
                    let scale_row = row / out_features * self.grid.rows() + row % out_features / block_rows;
                    let scales = &self.values[scale_row * self.grid.columns()..][..self.grid.columns()];
                    let blocks = codes.chunks(block_columns).zip(out.chunks_mut(2 * block_columns));
                    for ((codes, out), &scale) in blocks.zip(scales) {
                        for (raw, &code) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                            *raw = bf16(e4m3(code) * scale).to_le_bytes();
                        }
                    }
                }
            },
        );
    }
}

fn is_scale(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F8E8M0 | Dtype::U8)
}

/// `2^(exponent - 127)`, infinite for 255.
pub(super) fn exp2(exponent: u8) -> f32 {
    // An f32 with this exponent and no fraction; the smallest one is subnormal.
    f32::from_bits(if exponent == 0 { 1 << 22 } else { u32::from(exponent) << 23 })
}

/// The value of an E4M3 code: sign, four bits of exponent (bias 7), three of fraction.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let normal = f32::from_bits((magnitude << 20) + ((127 - 7) << 23));
    let subnormal = magnitude as f32 * (1.0 / 512.0);
    let value = if magnitude < 8 { subnormal } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_the_value_that_the_paper_defines() {
        for code in 0..=0xff_u8 {
            let (sign, exponent, fraction) = (code >> 7, i32::from(code >> 3 & 15), f64::from(code & 7));
            let magnitude = match exponent {
                0 => fraction / 8.0 * 2_f64.powi(-6),
                15 if code & 7 == 7 => f64::NAN,
                _ => (1.0 + fraction / 8.0) * 2_f64.powi(exponent - 7),
            };
            let expected = if sign == 1 { -magnitude } else { magnitude };
            let found = f64::from(e4m3(code));
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{code:#x}: {found} {expected}");
            assert_eq!(found.is_sign_negative(), sign == 1);
        }
    }

    #[test]
    fn exponents_are_powers_of_two() {
        for exponent in 0..0xff_u8 {
            assert_eq!(f64::from(exp2(exponent)), 2_f64.powi(i32::from(exponent) - 127));
        }
        let grid = Grid::new(&[1, 2], Some([1, 1])).unwrap();
        assert_eq!(Scales::new(&[127, 255], Dtype::U8, grid).unwrap().values, [1.0, f32::INFINITY]);
        assert!(Scales::new(&[127, 255], Dtype::F8E8M0, grid).unwrap().values[1].is_nan());
    }

    /// Every path of this processor gives the same bytes: each of the 256 codes under 65,536 scales, which are all
    /// signs, exponents and upper fractions of f32, NaN and infinity among them.
    #[test]
    fn all_instruction_sets_agree() {
        let codes: Vec<u8> = (0..=0xff).cycle().take(256 * 256).collect();
        let grid = Grid::new(&[256, 256], Some([1, 256])).unwrap();
        for lower in [0_u32, 0x8000] {
            for sign_and_exponent in 0..=0xff_u32 {
                let scales: Vec<u8> = (0..=0xff)
                    .flat_map(|fraction: u32| (sign_and_exponent << 24 | fraction << 16 | lower).to_le_bytes())
                    .collect();
                let scales = Scales::new(&scales, Dtype::F32, grid).unwrap();
                let on = |isa| {
                    let mut out = vec![0; 2 * codes.len()];
                    scales.decode_rows_on(isa, &codes, 0, &mut out);
                    out
                };
                let portable = on(Isa::Portable);
                assert!(on(Isa::Avx2) == portable, "AVX2 differs: {sign_and_exponent:#x}");
                assert!(on(Isa::Avx512) == portable, "AVX-512 differs: {sign_and_exponent:#x}");
            }
        }
    }

    #[test]
    fn a_run_of_rows_is_that_part_of_the_whole() {
        // Two matrices of 5x7 in blocks of 2x3: both edges are cut off.
        let grid = Grid::new(&[2, 5, 7], Some([2, 3])).unwrap();
        let scales: Vec<u8> = (0..18_u8).flat_map(|index| f32::from(index + 1).to_le_bytes()).collect();
        let scales = Scales::new(&scales, Dtype::F32, grid).unwrap();
        let codes = [0x38; 70]; // 1.0
        let mut whole = [0; 140];
        scales.decode_rows(&codes, 0, &mut whole);
        let mut values = [0.0; 70];
        Float::BF16.decode(&whole, &mut values);
        for (index, value) in values.into_iter().enumerate() {
            let (matrix, row, column) = (index / 35, index / 7 % 5, index % 7);
            assert_eq!(value, (matrix * 9 + row / 2 * 3 + column / 3 + 1) as f32);
        }
        for first in 0..10 {
            let mut run = vec![0; 14 * (10 - first)];
            scales.decode_rows(&codes[7 * first..], first, &mut run);
            assert_eq!(run, whole[14 * first..]);
        }
    }

    #[test]
    fn one_scale_is_for_all_matrices() {
        let grid = Grid::new(&[2, 3, 4], None).unwrap();
        let scales = Scales::new(&2.0_f32.to_le_bytes(), Dtype::F32, grid).unwrap();
        let mut out = [0; 48];
        scales.decode_rows(&[0x38; 24], 0, &mut out);
        assert_eq!(out.as_chunks::<2>().0, [[0x00, 0x40]; 24]);
    }
}
