//! Scales in 8 bits, by a map of 256 levels that is fitted to them.
//!
//! ```text
//! nested_absmax    = max |scale|                                 over 256 scales
//! nested_quant_map = 256 signed levels of scale / nested_absmax  of least squared error over the tensor (Lloyd)
//! nested_offset    = 0
//! scale'           = nested_quant_map[code] * nested_absmax
//! ```
//!
//! A reader honours both numbers, so that nothing but the fit is new. Against levels of the scales themselves
//! (`nested_absmax = 1`) these are finer wherever blocks differ in size along a tensor: they keep what
//! free scales gain on Student-t5 weights, the others lose a twentieth of it. The error of a block grows with the square of its scale's, so a
//! scale counts the square of its `nested_absmax`, and the sum of its squared levels besides: that last factor, nearly the
//! same in all blocks, changes nothing measurable and is left to callers with unequal weights.
//!
//! S. P. Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory 28 (1982). The start follows
//! its asymptotic law: levels as dense as the cube root of what they have to represent.

use super::Values;
use super::codes::{TILE, pick, whole_blocks};
use super::lanes::{Lanes, Work, run_on};
use crate::Isa;
use crate::nested::BLOCKSIZE;
use crate::nf4::check_lengths;

/// Cells of equal width over -1 to 1, in which scales are summed before the fit. A fitted level stands for over a hundred.
const CELLS: usize = 1 << 16;

/// Neighbouring cells that are smoothed to one for the start.
const SMOOTHED: usize = 64;

/// Scales that levels are fitted to, five hundred a level: a quarter of them would do as well, as far as can be measured,
/// and a packer need not have seen all of a tensor before it knows its levels.
pub const SAMPLE: usize = 1 << 17;

/// What scales beyond the sample count against it, spread over all ratios: they may lie where none of the sample does.
/// Where they do not, that costs 0.05 % of the error at most; where they do, it saves up to 15 %.
const UNSEEN: f64 = 0.1;

/// More rounds than a fit takes; one is 256 steps.
const ROUNDS: usize = 1000;

/// The levels by which the scales of one tensor are stored in 8 bits: ascending, a checkpoint's `nested_quant_map`.
#[derive(Debug, Clone, PartialEq)]
pub struct Map(pub [f32; 256]);

/// The largest magnitude of every 256 scales, a checkpoint's `nested_absmax`.
pub fn absmax(scales: &[f32]) -> Vec<f32> {
    let groups = scales.chunks(BLOCKSIZE);
    groups.map(|group| group.iter().fold(0.0, |max: f32, scale| max.max(scale.abs()))).collect()
}

impl Map {
    /// Fit the map to the scales of a tensor, in order; of more than [`SAMPLE`] to the first ones, which have to be known. `weights`, one per scale, is
    /// what its squared error counts, finite and not negative: the sum of weight times squared level over the block, up to
    /// a constant.
    ///
    /// # Panics
    /// If `weights` are not as many as `scales`.
    pub fn fit(scales: &[f32], weights: Option<&[f32]>) -> Self {
        assert!(weights.is_none_or(|weights| weights.len() == scales.len()), "not one weight for every scale");
        let (scales, unseen) = scales.split_at(scales.len().min(SAMPLE));
        let absmax = absmax(scales);
        let largest = absmax.iter().copied().fold(0.0, f32::max);

        let mut cells = vec![Mass::default(); CELLS];
        for (group, (scales, &absmax)) in scales.chunks(BLOCKSIZE).zip(&absmax).enumerate() {
            if absmax == 0.0 {
                continue;
            }
            let share = f64::from(absmax / largest).powi(2);
            for (index, &scale) in scales.iter().enumerate() {
                let ratio = scale / absmax;
                let cell = ((f64::from(ratio) + 1.0) * (CELLS / 2) as f64) as usize;
                let weight = weights.map_or(1.0, |weights| f64::from(weights[group * BLOCKSIZE + index]));
                // A scale of zero decodes to zeros under any level.
                cells[cell.min(CELLS - 1)].add(if scale == 0.0 { 0.0 } else { share * weight }, ratio);
            }
        }
        if !unseen.is_empty() {
            let share = UNSEEN * cells.iter().map(|cell| cell.weight).sum::<f64>() / CELLS as f64;
            for (index, cell) in cells.iter_mut().enumerate() {
                cell.add(share, ((index as f64 + 0.5) / (CELLS / 2) as f64 - 1.0) as f32);
            }
        }
        Self(lloyd(&cells).map(|level| level as f32))
    }

    /// Replace every free scale by the nearest one that can be decoded, and pick the codes under that. (The better of the
    /// two levels about it, by the error of both, would gain 0.01 %.)
    ///
    /// `values` are as for [`scales`](super::scales()), and `absmax` is that of the group of the first block and of those
    /// that follow; that block is number `first` in its group. Scales become what a reader decodes, `nested` takes the
    /// 8-bit code of each, `codes` the codes of the values as [`codes`](super::codes()) picks them.
    ///
    /// # Panics
    /// If `blocksize` is not one of [`BLOCKSIZES`](crate::nf4::BLOCKSIZES), a length is wrong, or blocks have no `absmax`.
    #[allow(clippy::too_many_arguments, reason = "what is packed, how, and three outputs of one pass")]
    pub fn snap(
        &self,
        values: Values,
        blocksize: usize,
        first: usize,
        absmax: &[f32],
        scales: &mut [f32],
        nested: &mut [u8],
        codes: &mut [u8],
    ) {
        self.snap_on(Isa::current(), values, blocksize, first, absmax, scales, nested, codes);
    }

    #[allow(clippy::too_many_arguments, reason = "as above")]
    pub(super) fn snap_on(
        &self,
        isa: Isa,
        values: Values,
        blocksize: usize,
        first: usize,
        absmax: &[f32],
        scales: &mut [f32],
        nested: &mut [u8],
        codes: &mut [u8],
    ) {
        check_lengths(values.len(), blocksize, scales.len(), codes.len());
        assert_eq!(nested.len(), scales.len(), "not one nested code for every scale");
        assert!(first + scales.len() <= absmax.len() * BLOCKSIZE, "more blocks than there is an absmax for");
        run_on(isa, Snap { map: self, values, blocksize, first, absmax, scales, nested, codes });
    }

    /// The code of the level nearest to `scale`. `lasts` are the last of every sixteen levels.
    #[inline(always)]
    fn nearest(&self, lanes: impl Lanes, lasts: &[f32; 16], scale: f32, absmax: f32) -> u8 {
        let ratio = if absmax == 0.0 { 0.0 } else { scale / absmax };
        // Sixteen comparisons find the run of sixteen levels, sixteen more the place in it.
        let run = lanes.below(lasts, ratio).min(15);
        let above = (16 * run + lanes.below(&self.0.as_chunks::<16>().0[run], ratio)).clamp(1, 255);
        let (to_below, to_above) = (ratio - self.0[above - 1], self.0[above] - ratio);
        (above - usize::from(to_below <= to_above)) as u8
    }
}

struct Snap<'a> {
    map: &'a Map,
    values: Values<'a>,
    blocksize: usize,
    first: usize,
    absmax: &'a [f32],
    scales: &'a mut [f32],
    nested: &'a mut [u8],
    codes: &'a mut [u8],
}

impl Work for Snap<'_> {
    type Result = ();

    #[inline(always)]
    fn run(self, lanes: impl Lanes) {
        let Self { map, values, blocksize, first, absmax, scales, nested, codes } = self;
        let mut tile = [0.0; TILE];
        let blocks = TILE / blocksize;
        let lasts = std::array::from_fn(|run| map.0[16 * run + 15]);
        let tiles = scales.chunks_mut(blocks).zip(nested.chunks_mut(blocks)).zip(codes.chunks_mut(TILE / 2));
        for (index, ((scales, nested), codes)) in tiles.enumerate() {
            let tile = whole_blocks(values, index * TILE, blocksize, &mut tile);
            // First for all blocks, since no level depends on another.
            for (offset, (scale, nested)) in scales.iter_mut().zip(&mut *nested).enumerate() {
                let absmax = absmax[(first + index * blocks + offset) / BLOCKSIZE];
                *nested = map.nearest(lanes, &lasts, *scale, absmax);
                *scale = map.0[usize::from(*nested)] * absmax + 0.0;
            }
            for ((block, scale), codes) in tile.chunks(blocksize).zip(scales).zip(codes.chunks_mut(blocksize / 2)) {
                pick(lanes, block, *scale, codes);
            }
        }
    }
}

/// Scales of a cell: their weight, and the sum of weight times ratio.
#[derive(Debug, Clone, Copy, Default)]
struct Mass {
    weight: f64,
    moment: f64,
}

impl Mass {
    fn add(&mut self, weight: f64, ratio: f32) {
        self.weight += weight;
        self.moment += weight * f64::from(ratio);
    }
}

/// The 256 levels of least weighted squared distance to the masses, ascending.
fn lloyd(cells: &[Mass]) -> [f64; 256] {
    let occupied: Vec<&Mass> = cells.iter().filter(|cell| cell.weight > 0.0).collect();
    if occupied.len() <= 256 {
        // Each its own; the rest repeat the last.
        return std::array::from_fn(|index| {
            occupied.get(index).or(occupied.last()).map_or(0.0, |mass| mass.moment / mass.weight)
        });
    }
    // Sums of all cells below each.
    let mut below = vec![Mass::default()];
    for cell in cells {
        let last = below[below.len() - 1];
        below.push(Mass { weight: last.weight + cell.weight, moment: last.moment + cell.moment });
    }
    let position = |cell: f64| cell / (CELLS / 2) as f64 - 1.0;
    let mut levels = start(cells).map(position);
    let mut cuts = [0; 257];
    for _ in 0..ROUNDS {
        let mut moved = [0; 257];
        moved[256] = CELLS;
        for (cut, pair) in moved[1..].iter_mut().zip(levels.windows(2)) {
            *cut = ((f64::midpoint(pair[0], pair[1]) + 1.0) * (CELLS / 2) as f64).round() as usize;
        }
        if moved == cuts {
            break;
        }
        cuts = moved;
        for (level, cut) in levels.iter_mut().zip(cuts.windows(2)) {
            let (low, high) = (&below[cut[0]], &below[cut[1]]);
            let weight = high.weight - low.weight;
            if weight > 0.0 {
                // Where differences of large sums are mostly rounding, the level stays in its cells at least.
                let mean = (high.moment - low.moment) / weight;
                *level = mean.clamp(position(cut[0] as f64), position(cut[1] as f64));
            }
        }
    }
    levels
}

/// Where the levels start, in cells: as dense as the cube root of the weight, smoothed.
fn start(cells: &[Mass]) -> [f64; 256] {
    let density = |cells: &[Mass]| cells.iter().map(|cell| cell.weight).sum::<f64>().cbrt();
    let densities: Vec<f64> = cells.chunks(SMOOTHED).map(density).collect();
    let step = densities.iter().sum::<f64>() / 256.0;
    let mut levels = [cells.len() as f64; 256];
    let (mut next, mut passed) = (0, 0.0);
    for (index, density) in densities.iter().enumerate() {
        while next < 256 && passed + density >= (next as f64 + 0.5) * step {
            levels[next] = (index as f64 + ((next as f64 + 0.5) * step - passed) / density) * SMOOTHED as f64;
            next += 1;
        }
        passed += density;
    }
    levels
}
