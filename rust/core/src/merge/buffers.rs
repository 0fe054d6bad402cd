//! The arithmetic of merging on buffers, for one who has codes and factors at hand.

use super::apply::Applied;
use super::factors::Segment;
use super::region::{Codes, ROWS, Values};
use crate::stream::CHUNK;
use crate::{Float, Isa, nf4, packed};

/// A change by `scale * left @ right`.
#[derive(Debug, Clone, Copy)]
pub struct Factors<'f> {
    /// (rows, r)
    pub left: &'f [f32],
    /// (r, columns)
    pub right: &'f [f32],
    /// Columns of `left` and rows of `right`.
    pub r: usize,
    /// What the product is multiplied by.
    pub scale: f64,
}

/// Write a packed weight, changed by `factors`, to `out` as little-endian values of type `to`: the sum of decoded f32 and
/// change in f64, rounded once.
///
/// # Panics
/// If `blocksize` is not one of [`nf4::BLOCKSIZES`] or a length is wrong.
pub fn merge_nf4(codes: &[u8], absmax: &[f32], blocksize: usize, factors: Factors<'_>, to: Float, out: &mut [u8]) {
    merge_nf4_on(Isa::current(), codes, absmax, blocksize, factors, to, out);
}

fn merge_nf4_on(
    isa: Isa,
    codes: &[u8],
    absmax: &[f32],
    blocksize: usize,
    factors: Factors<'_>,
    to: Float,
    out: &mut [u8],
) {
    let Factors { left, right, r, scale } = factors;
    let size @ [rows, columns] = [left.len() / r, right.len() / r];
    nf4::check_lengths(rows * columns, blocksize, absmax.len(), codes.len());
    assert_eq!(out.len(), rows * columns * to.size(), "wrong number of bytes for {rows} x {columns} values");
    let segment = Segment::new(0..rows, columns, left.to_vec(), right.to_vec(), vec![(r, scale)]);
    let change = Applied::sum(String::new(), vec![segment], size, None, false);
    let bounded = absmax.iter().all(|scale| scale.abs() < 1e15);
    let rows_a_run = (CHUNK / columns / ROWS).max(1) * ROWS;
    for (run, out) in out.chunks_mut(rows_a_run * columns * to.size()).enumerate() {
        let (first, len) = (run * rows_a_run * columns, out.len() / to.size());
        let codes = Codes { packed: codes, scales: absmax, blocksize };
        change.apply_on(isa, &Rows { codes, first, len }, bounded, to, out);
    }
}

/// Rows of a packed weight.
struct Rows<'c> {
    codes: Codes<'c>,
    first: usize,
    len: usize,
}

impl Values for Rows<'_> {
    fn first(&self) -> u64 {
        self.first as u64
    }

    fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn decode(&self, at: usize, out: &mut [f32]) {
        let Codes { packed, scales, blocksize } = self.codes;
        packed::decode(packed, scales, blocksize, self.first + at, out);
    }

    fn codes(&self) -> Option<Codes<'_>> {
        let Codes { packed, scales, blocksize } = self.codes;
        let (block, skip) = (self.first / blocksize, self.first % blocksize);
        (skip == 0).then(|| Codes { packed: &packed[self.first / 2..], scales: &scales[block..], blocksize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::round;

    /// Codes looked up in registers, and those of rows that are no whole blocks, give the sums of the decoded weights.
    #[test]
    fn codes_are_merged_as_what_they_decode_to() {
        let ramp = |count: usize, step: f32| (0..count).map(move |index| ((index * 7919) % 1009) as f32 * step - 0.5);
        for (rows, columns, blocksize, r) in [(21, 192, 64, 3), (13, 96, 64, 2), (9, 4096, 4096, 1), (5, 33, 32, 4)] {
            let elements = rows * columns;
            let source: Vec<u8> = ramp(elements, 0.001).flat_map(f32::to_le_bytes).collect();
            let mut absmax = vec![0.0; elements.div_ceil(blocksize)];
            let mut codes = vec![0; elements.div_ceil(2)];
            nf4::quantize(&source, Float::F32, blocksize, &mut absmax, &mut codes).unwrap();
            let mut weights = vec![0.0; elements];
            nf4::dequantize(&codes, &absmax, blocksize, &mut weights);
            let (left, right): (Vec<_>, Vec<_>) =
                (ramp(rows * r, 0.0003).collect(), ramp(r * columns, 0.0007).collect());
            let factors = Factors { left: &left, right: &right, r, scale: 0.7 };
            let exact = |index: usize| {
                let (row, column) = (index / columns, index % columns);
                let product = |rank| f64::from(left[row * r + rank]) * f64::from(right[rank * columns + column]);
                f64::from(weights[index]) + 0.7 * (0..r).map(product).fold(0.0, |sum, product| sum + product)
            };
            let exact: Vec<f64> = (0..elements).map(exact).collect();
            for to in [Float::BF16, Float::F16, Float::F32] {
                let mut expected = vec![0; elements * to.size()];
                round::encode(to, &exact, &mut vec![0.0; elements], &mut expected);
                for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                    let mut found = vec![0; expected.len()];
                    merge_nf4_on(isa, &codes, &absmax, blocksize, factors, to, &mut found);
                    assert!(found == expected, "{isa:?} {to:?} {rows} x {columns}");
                }
            }
        }
    }
}
