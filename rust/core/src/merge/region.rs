//! Runs of a weight's elements, and the rectangles of rows and columns that they are made of.

use std::ops::Range;

use crate::Float;

/// Columns that are computed at a time: with 16 ranks of a segment they stay in the first-level cache.
pub(super) const TILE: usize = 512;

/// Rows that are best computed together.
pub(crate) const ROWS: usize = 8;

/// Sums of squares are taken in this many lanes, whatever the processor has.
const LANES: usize = 16;

/// A run of a weight's elements that can be decoded.
pub(crate) trait Values {
    /// Number of the first element in the weight.
    fn first(&self) -> u64;

    /// How many elements there are.
    fn len(&self) -> usize;

    /// Decode elements to f32, from that of number `at` in the run on.
    fn decode(&self, at: usize, out: &mut [f32]);

    /// The codes and scales that are decoded, where the run is of such and starts a block.
    fn codes(&self) -> Option<Codes<'_>> {
        None
    }
}

/// Packed elements, the first of which starts a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Codes<'c> {
    /// Two a byte, the first in the high half.
    pub(crate) packed: &'c [u8],
    /// One a block.
    pub(crate) scales: &'c [f32],
    pub(crate) blocksize: usize,
}

/// Some rows of a run, all of them from the same column to the same one, and where they go.
pub(super) struct Region<'r, V> {
    pub(super) values: &'r V,
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
    /// Columns of the weight.
    pub(super) width: usize,
    pub(super) to: Float,
    /// The whole run, as bytes of type `to`.
    pub(super) out: &'r mut [u8],
}

impl<V: Values> Region<'_, V> {
    /// Number of an element in the run.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, column: usize) -> usize {
        row * self.width + column - self.values.first() as usize
    }
}

/// The rows and columns of `len` elements from number `first` on, in a weight of `width` columns: a row that is cut, whole
/// rows, and a row that is cut again, as far as there are such.
pub(super) fn rectangles(first: usize, len: usize, width: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let end = first + len;
    let (row, column) = (first / width, first % width);
    let (end_row, end_column) = (end / width, end % width);
    let head = if row == end_row { column..end_column } else { column..width };
    let cut_head = (row..row + 1, if column > 0 { head } else { 0..0 });
    let whole = (row + usize::from(column > 0)..end_row, 0..width);
    let cut_tail = (end_row..end_row + 1, if row < end_row || column == 0 { 0..end_column } else { 0..0 });
    [cut_head, whole, cut_tail].into_iter().filter(|(rows, columns)| !rows.is_empty() && !columns.is_empty())
}

/// The sum of squares of some f64.
#[inline(always)]
pub(super) fn squares(values: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    for values in values.chunks(LANES) {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += value * value;
        }
    }
    lanes.iter().sum()
}

/// The sum of squares of a tile of weights, as f32 that are added up in f64: infinite from 1e38 on.
#[inline(always)]
pub(super) fn squares_of_weights(weights: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = weights.as_chunks::<LANES>();
    for weights in whole {
        for (lane, weight) in lanes.iter_mut().zip(weights) {
            *lane += weight * weight;
        }
    }
    for (lane, weight) in lanes.iter_mut().zip(rest) {
        *lane += weight * weight;
    }
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_cover_a_run_in_order() {
        for width in 1..6 {
            for first in 0..12 {
                for len in 1..20 {
                    let elements: Vec<usize> = rectangles(first, len, width)
                        .flat_map(|(rows, columns)| {
                            rows.flat_map(move |row| columns.clone().map(move |column| row * width + column))
                        })
                        .collect();
                    assert_eq!(elements, (first..first + len).collect::<Vec<_>>());
                }
            }
        }
    }
}
