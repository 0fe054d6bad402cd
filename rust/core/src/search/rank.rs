//! A quick, approximate ranking of many candidate scales by integers.
//!
//! Values are divided by the block's absmax and rounded to a grid of [`GRID`] steps. A candidate scale is a ratio to
//! absmax, so the levels that it makes lie on the same grid for every block, and the error of a value follows from
//! tables of sixteen bytes: `magnitude / 8` is its cell, each cell knows the two levels that are nearest at its ends, and
//! the nearer of the two is the level. From a ratio of 0.86 on, levels lie wider apart than a cell, so that no third one
//! can be nearer. A ratio and its negative share the work: they swap the two sides of zero.
//!
//! 64 pieces of 64 values are ranked at once, a piece in each byte lane, so that sums need no reduction: the values are
//! transposed first. Sums saturate at 65,535. The grid's rounding costs about 2 % of noise in an error.

use super::lanes::Lanes;
use crate::nf4::LEVELS;

/// Values that a lane sums.
pub(super) const PIECE: usize = 64;

/// Pieces that are ranked at once.
pub(super) const LANES: usize = 64;

/// The magnitude that absmax becomes. Levels up to a ratio of 1.07 still fit in seven bits.
pub(super) const GRID: f32 = 118.0;

/// Grid values: 64 pieces of 64, one after the other.
pub(super) type Grid = [i8; PIECE * LANES];

/// Grid values, transposed: one row per place within a piece, one lane per piece.
pub(super) type Rows = [[i8; LANES]];

/// The error of each lane.
pub(super) type Errors = [u16; LANES];

/// The levels of one ratio on the grid: for positive and for negative values, the level that is nearest at the lower and
/// at the upper end of each cell of eight magnitudes.
#[derive(Debug, Clone)]
pub(super) struct Table {
    pub(super) sides: [[[u8; 16]; 2]; 2],
}

impl Table {
    pub(super) fn new(ratio: f32) -> Self {
        let side = |levels: &mut dyn Iterator<Item = f32>| {
            let levels: Vec<u8> = levels.map(|level| (level.abs() * ratio * GRID).round().min(127.0) as u8).collect();
            let nearest = |magnitude: usize| {
                levels.iter().copied().min_by_key(|&level| usize::from(level).abs_diff(magnitude)).unwrap_or(0)
            };
            [0, 7].map(|end| std::array::from_fn(|cell| nearest(8 * cell + end)))
        };
        Self { sides: [side(&mut LEVELS[7..].iter().copied()), side(&mut LEVELS[..8].iter().copied())] }
    }

    /// The squared error of every grid value, indexed by its bits as a byte.
    pub(super) fn squares(&self) -> [u16; 256] {
        std::array::from_fn(|bits| {
            let value = (bits as u8).cast_signed();
            let magnitude = value.unsigned_abs().min(127);
            let [lower, upper] = &self.sides[usize::from(value < 0)];
            let cell = usize::from(magnitude >> 3);
            let distance = u16::from(magnitude.abs_diff(lower[cell]).min(magnitude.abs_diff(upper[cell])));
            distance * distance
        })
    }
}

/// The candidate of least error for each of up to 64 blocks of `pieces` pieces. Candidate `2 * i` is the ratio of
/// `tables[i]`, `2 * i + 1` its negative; of equals the first wins. `grid` is used up.
#[inline(always)]
pub(super) fn best(lanes: impl Lanes, grid: &mut Grid, pieces: usize, tables: &[Table]) -> [usize; LANES] {
    let mut riffled = [0; PIECE * LANES];
    for _ in 0..PIECE.ilog2() / 2 {
        riffle(grid, &mut riffled);
        riffle(&riffled, grid);
    }
    let rows = grid.as_chunks::<LANES>().0;
    // An error of up to 22 bits above a candidate of eight: their order is that of the pair.
    let mut best = [u32::MAX; LANES];
    for (index, table) in tables.iter().enumerate() {
        for (sign, errors) in lanes.rank(rows, table).iter().enumerate() {
            let mut keys = errors.map(u32::from);
            if pieces > 1 {
                for block in 0..LANES / pieces {
                    keys[block] = keys[block * pieces..(block + 1) * pieces].iter().sum();
                }
            }
            for (key, best) in keys.iter().zip(&mut best) {
                *best = (*best).min(key << 8 | (2 * index + sign) as u32);
            }
        }
    }
    best.map(|key| (key & 255) as usize)
}

/// Interleave the two halves, as cards are. That rotates the bits of an index by one; six times turn rows into columns.
#[inline(always)]
fn riffle(from: &Grid, to: &mut Grid) {
    let (left, right) = from.split_at(from.len() / 2);
    for ((pair, &left), &right) in to.as_chunks_mut::<2>().0.iter_mut().zip(left).zip(right) {
        *pair = [left, right];
    }
}
