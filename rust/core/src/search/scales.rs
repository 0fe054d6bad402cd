//! The scale of a block: the one, of either sign, that leaves the least squared error.
//!
//! With the values of a block divided by its absmax, a scale is a ratio, and the error of a ratio has many local minima:
//! one for each way in which its values can fall to the levels. The search ranks a few ratios of both signs (by `rank`,
//! approximately; with weights exactly) and improves the best by least squares: given the codes of a scale, the best
//! scale is `sum(x * level) / sum(level^2)`, and the error falls by what that explains. The block's absmax, the scale of
//! `exact` mode, is kept unless the result is clearly better, so that no block is worse. Improving the second best too
//! and the better once more would gain 0.4 % and cost half the time again.
//!
//! All sums run over sixteen lanes in a fixed order, so that every instruction set gives the same scale.

use super::Values;
use super::lanes::{Lanes, Work, run_on};
use super::rank::{GRID, LANES, PIECE, Table, best};
use crate::Isa;
use crate::nf4::{INFINITY_BITS, MIN_SCALE, check_blocksize};

/// Values that are searched at a time: 64 blocks, or as many as they fill.
const TILE: usize = PIECE * LANES;

/// What an error may be off by through rounding, relative to the block's sum of squares.
const ROUNDING: f32 = 1e-5;

/// Ratios of a scale to its block's absmax from which a search starts, each with either sign.
#[derive(Debug, Clone)]
pub struct Candidates {
    ratios: Vec<f32>,
    tables: Vec<Table>,
}

impl Candidates {
    /// Start from these ratios, at most 128. Every one costs time; a gap of 0.04 between neighbours loses little, since
    /// the best are improved. From 1.2 to 1.5 absmax itself falls to the last level but one.
    ///
    /// # Panics
    /// If there are none or more than 128, or one is not positive and finite.
    pub fn new(ratios: &[f32]) -> Self {
        assert!((1..=128).contains(&ratios.len()), "{} ratios, expected 1 to 128", ratios.len());
        assert!(ratios.iter().all(|ratio| ratio.is_normal() && *ratio > 0.0), "a ratio of {ratios:?} is not positive");
        Self { ratios: ratios.to_vec(), tables: ratios.iter().map(|&ratio| Table::new(ratio)).collect() }
    }

    /// The ratio of candidate `index`: every ratio is followed by its negative.
    #[inline(always)]
    fn ratio(&self, index: usize) -> f32 {
        let ratio = self.ratios[index / 2];
        if index.is_multiple_of(2) { ratio } else { -ratio }
    }
}

impl Default for Candidates {
    /// Six ratios about absmax and two that spend the last level on nothing: the best of those measured for their time.
    fn default() -> Self {
        Self::new(&[0.86, 0.9, 0.94, 0.98, 1.02, 1.06, 1.3, 1.4])
    }
}

/// Find the scale of every block of `values`, which start at a block boundary and end at one or at the tensor's end.
///
/// `weights` are what a squared error counts, finite and not negative: one per value, or those of one row of the tensor,
/// which then repeat for every row (`values[i]` has `weights[i % weights.len()]`); they must then be whole blocks.
/// `scales` takes one scale per block. None that the search finds is over `largest`, the largest value of the type that
/// weights are decoded to, so that none of them becomes infinite.
///
/// # Errors
/// The index of the first value that is NaN or infinite; the scales are then unspecified.
///
/// # Panics
/// If `blocksize` is not one of [`BLOCKSIZES`](crate::nf4::BLOCKSIZES) or a length is wrong.
pub fn scales(
    values: Values,
    weights: Option<&[f32]>,
    blocksize: usize,
    candidates: &Candidates,
    largest: f32,
    scales: &mut [f32],
) -> Result<(), usize> {
    scales_on(Isa::current(), values, weights, blocksize, candidates, largest, scales)
}

pub(super) fn scales_on(
    isa: Isa,
    values: Values,
    weights: Option<&[f32]>,
    blocksize: usize,
    candidates: &Candidates,
    largest: f32,
    scales: &mut [f32],
) -> Result<(), usize> {
    check_blocksize(blocksize);
    assert_eq!(scales.len(), values.len().div_ceil(blocksize), "wrong number of scales for {} values", values.len());
    if let Some(weights) = weights {
        check_weights(weights, values.len(), blocksize);
    }
    run_on(isa, Search { values, weights, blocksize, candidates, largest, scales })
}

/// Refuse weights that `weights_of` could not cut into blocks.
pub(super) fn check_weights(weights: &[f32], values: usize, blocksize: usize) {
    let repeats =
        !weights.is_empty() && weights.len().is_multiple_of(blocksize) && values.is_multiple_of(weights.len());
    assert!(weights.len() == values || repeats, "{} weights do not fit {values} values", weights.len());
}

/// The weights of the `length` values from `start` on.
#[inline(always)]
pub(super) fn weights_of(weights: &[f32], start: usize, length: usize) -> &[f32] {
    let start = start % weights.len();
    &weights[start..start + length]
}

struct Search<'a> {
    values: Values<'a>,
    weights: Option<&'a [f32]>,
    blocksize: usize,
    candidates: &'a Candidates,
    largest: f32,
    scales: &'a mut [f32],
}

impl Work for Search<'_> {
    type Result = Result<(), usize>;

    #[inline(always)]
    fn run(self, lanes: impl Lanes) -> Result<(), usize> {
        let Self { values, weights, blocksize, candidates, largest, scales } = self;
        let count = (TILE / blocksize).min(LANES);
        let mut tile = [0.0; TILE];
        let mut weights_tile = [0.0; TILE];
        for (index, scales) in scales.chunks_mut(count).enumerate() {
            let start = index * count * blocksize;
            let length = (count * blocksize).min(values.len() - start);
            values.decode(start, &mut tile[..length]);
            // A short last block is filled up with zeros, which no scale gets wrong.
            let tile = &mut tile[..scales.len() * blocksize];
            tile[length..].fill(0.0);
            for (offset, (block, scale)) in tile.chunks_mut(blocksize).zip(scales.iter_mut()).enumerate() {
                *scale = normalize(block).ok_or_else(|| first_bad(values, start + offset * blocksize))?;
            }
            let weights_tile = weights.map(|weights| {
                for (block, tile) in weights_tile[..length].chunks_mut(blocksize).enumerate() {
                    tile.copy_from_slice(weights_of(weights, start + block * blocksize, tile.len()));
                }
                &weights_tile[..tile.len()]
            });
            let blocks = Blocks { values: tile, weights: weights_tile, blocksize };
            let starts = match weights_tile {
                None => ranked(lanes, tile, blocksize, candidates),
                Some(_) => weighed(lanes, blocks, candidates),
            };
            improve(lanes, blocks, starts, scales, largest);
        }
        Ok(())
    }
}

/// Blocks that are searched together, divided by their absmax.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    values: &'a [f32],
    weights: Option<&'a [f32]>,
    blocksize: usize,
}

impl<'a> Blocks<'a> {
    #[inline(always)]
    fn len(self) -> usize {
        self.values.len() / self.blocksize
    }

    /// The values of one block, and their weights.
    #[inline(always)]
    fn get(self, number: usize) -> (&'a [f32], Option<&'a [f32]>) {
        let range = number * self.blocksize..(number + 1) * self.blocksize;
        (&self.values[range.clone()], self.weights.map(|weights| &weights[range]))
    }
}

/// Divide a block by its absmax and return that; none if a value is not finite.
#[inline(always)]
fn normalize(block: &mut [f32]) -> Option<f32> {
    let max_bits = block.iter().map(|value| value.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    if max_bits >= INFINITY_BITS {
        return None;
    }
    let absmax = f32::from_bits(max_bits);
    let inverse = 1.0 / absmax.max(MIN_SCALE);
    for value in block {
        *value *= inverse;
    }
    Some(absmax)
}

/// The index of the first value from `start` on that is not finite.
#[cold]
fn first_bad(values: Values, start: usize) -> usize {
    let mut value = [0.0];
    let bad = |index: &usize| {
        values.decode(*index, &mut value);
        !value[0].is_finite()
    };
    (start..values.len()).find(bad).unwrap_or(start)
}

/// The best ratio of each block by rank.
#[inline(always)]
fn ranked(lanes: impl Lanes, tile: &[f32], blocksize: usize, candidates: &Candidates) -> [f32; LANES] {
    // Adding this rounds to an integer, in the low bits of the sum.
    const ROUND: f32 = (3 << 22) as f32;
    let mut grid = [0; TILE];
    let pieces = grid.chunks_mut(PIECE).zip(tile.chunks(blocksize.min(PIECE)));
    for (grid, piece) in pieces {
        for (grid, value) in grid.iter_mut().zip(piece) {
            *grid = (value * GRID + ROUND).to_bits() as i8;
        }
    }
    best(lanes, &mut grid, blocksize.div_ceil(PIECE), &candidates.tables).map(|index| candidates.ratio(index))
}

/// The best ratio of each block by weighted error.
#[inline(always)]
fn weighed(lanes: impl Lanes, blocks: Blocks, candidates: &Candidates) -> [f32; LANES] {
    let mut best = [(f32::INFINITY, 1.0); LANES];
    for index in 0..2 * candidates.ratios.len() {
        let ratio = candidates.ratio(index);
        for (number, best) in best[..blocks.len()].iter_mut().enumerate() {
            let (block, weights) = blocks.get(number);
            let error = ratio * ratio * deviation(lanes, block, weights, ratio.recip());
            if error < best.0 {
                *best = (error, ratio);
            }
        }
    }
    best.map(|(_, ratio)| ratio)
}

/// Improve the start of each block and multiply its scale, the absmax, by the ratio that is found, if that is better than
/// 1 and makes no scale over `largest`.
#[inline(always)]
fn improve(lanes: impl Lanes, blocks: Blocks, starts: [f32; LANES], scales: &mut [f32], largest: f32) {
    for (number, (start, scale)) in starts.iter().zip(scales).enumerate() {
        let (block, weights) = blocks.get(number);
        let inverse = lanes.splat(start.recip());
        let mut sums = [lanes.splat(0.0); 4];
        for (index, values) in block.as_chunks::<16>().0.iter().enumerate() {
            let values = lanes.load(values);
            let levels = lanes.levels(lanes.mul(values, inverse));
            let counted = weighted(lanes, levels, weights, index);
            let distance = lanes.sub(values, lanes.levels(values));
            sums = [
                lanes.add(sums[0], lanes.mul(counted, values)),
                lanes.add(sums[1], lanes.mul(counted, levels)),
                lanes.add(sums[2], weighted(lanes, lanes.mul(values, values), weights, index)),
                lanes.add(sums[3], weighted(lanes, lanes.mul(distance, distance), weights, index)),
            ];
        }
        let [product, square, squares, error_of_absmax] = lanes.sums(sums);
        // NaN, and so not better, if all that counts has the code of zero.
        let error = squares - product * product / square;
        let found = *scale * (product / square);
        let better = error + squares * ROUNDING < error_of_absmax;
        if better && *scale >= MIN_SCALE && found.abs() <= largest {
            *scale = found;
        }
    }
}

/// The squared distance of the values, multiplied by `inverse`, to their levels.
#[inline(always)]
pub(super) fn deviation(lanes: impl Lanes, block: &[f32], weights: Option<&[f32]>, inverse: f32) -> f32 {
    let inverse = lanes.splat(inverse);
    let mut sum = lanes.splat(0.0);
    for (index, values) in block.as_chunks::<16>().0.iter().enumerate() {
        let scaled = lanes.mul(lanes.load(values), inverse);
        let distance = lanes.sub(scaled, lanes.levels(scaled));
        sum = lanes.add(sum, weighted(lanes, lanes.mul(distance, distance), weights, index));
    }
    lanes.sum(sum)
}

/// The sixteen `terms` of chunk `index`, times their weights.
#[inline(always)]
fn weighted<L: Lanes>(lanes: L, terms: L::Floats, weights: Option<&[f32]>, index: usize) -> L::Floats {
    match weights {
        None => terms,
        Some(weights) => lanes.mul(terms, lanes.load(&weights.as_chunks::<16>().0[index])),
    }
}
