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
//! (`nested_absmax = 1`) these are finer wherever blocks differ in size along a tensor: of the 15.8 % that free scales gain
//! on Student-t5 weights they keep 15.6, the others 15.2. The error of a block grows with the square of its scale's, so a
//! scale counts the square of its `nested_absmax`, and the sum of its squared levels besides: that last factor, nearly the
//! same in all blocks, changes nothing measurable and is left to callers with unequal weights.
//!
//! S. P. Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory 28 (1982). The start follows
//! its asymptotic law: levels as dense as the cube root of what they have to represent.

use super::Values;
use super::codes::{TILE, inverse, pick, whole_blocks};
use super::lanes::{Lanes, Work, run_on};
use super::scales::{check_weights, deviation, weights_of};
use crate::Isa;
use crate::nested::BLOCKSIZE;
use crate::nf4::{BLOCKSIZES, check_lengths};

/// Cells of equal width over -1 to 1, in which scales are summed before the fit. A fitted level stands for over a hundred.
const CELLS: usize = 1 << 16;

/// Neighbouring cells that are smoothed to one for the start.
const SMOOTHED: usize = 64;

/// More rounds than a fit takes; one is 256 steps.
const ROUNDS: usize = 1000;

/// How the scales of one tensor are stored in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Map {
    /// Ascending; a checkpoint's `nested_quant_map`.
    pub levels: [f32; 256],
    /// One for every 256 scales; a checkpoint's `nested_absmax`.
    pub absmax: Vec<f32>,
}

impl Map {
    /// Fit the map to all scales of a tensor, in order. `weights`, one per scale, is what its squared error counts, finite
    /// and not negative: the sum of weight times squared level over the block, up to a constant.
    ///
    /// # Panics
    /// If `weights` are not as many as `scales`.
    pub fn fit(scales: &[f32], weights: Option<&[f32]>) -> Self {
        assert!(weights.is_none_or(|weights| weights.len() == scales.len()), "not one weight for every scale");
        let groups = scales.chunks(BLOCKSIZE);
        let absmax: Vec<f32> =
            groups.map(|group| group.iter().fold(0.0, |max: f32, scale| max.max(scale.abs()))).collect();
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
        Self { levels: lloyd(&cells).map(|level| level as f32), absmax }
    }

    /// Choose the scale of every block among the decodable ones: of the two levels about `scales[i]`, the free scale, the
    /// one of least (weighted) squared error with its own codes.
    ///
    /// `first_block` is the index of the first of these blocks in its tensor; `values` and `weights` are as for
    /// [`scales`](super::scales()). Scales become what a reader decodes, `nested` takes the 8-bit code of each, `codes` the
    /// codes of the values as [`codes`](super::codes()) picks them.
    ///
    /// # Panics
    /// If `blocksize` is not one of [`BLOCKSIZES`](crate::nf4::BLOCKSIZES), a length is wrong, or the map has no scale for
    /// these blocks.
    #[allow(clippy::too_many_arguments, reason = "three inputs and three outputs of one pass")]
    pub fn snap(
        &self,
        values: Values,
        weights: Option<&[f32]>,
        blocksize: usize,
        first_block: usize,
        scales: &mut [f32],
        nested: &mut [u8],
        codes: &mut [u8],
    ) {
        self.snap_on(Isa::current(), values, weights, blocksize, first_block, scales, nested, codes);
    }

    #[allow(clippy::too_many_arguments, reason = "as above")]
    pub(super) fn snap_on(
        &self,
        isa: Isa,
        values: Values,
        weights: Option<&[f32]>,
        blocksize: usize,
        first_block: usize,
        scales: &mut [f32],
        nested: &mut [u8],
        codes: &mut [u8],
    ) {
        check_lengths(values.len(), blocksize, scales.len(), codes.len());
        assert_eq!(nested.len(), scales.len(), "not one nested code for every scale");
        assert!(first_block + scales.len() <= self.absmax.len() * BLOCKSIZE, "more blocks than the map was fitted to");
        if let Some(weights) = weights {
            check_weights(weights, values.len(), blocksize);
        }
        run_on(isa, Snap { map: self, values, weights, blocksize, first_block, scales, nested, codes });
    }

    /// The code of the level nearest to `scale`, and of its neighbour on the other side if that is a rival: not zero, and at
    /// most twice as far. (Weighing all neighbours would gain 0.02 %.) `lasts` are the last of every sixteen levels.
    #[inline(always)]
    fn about(&self, lasts: &[f32; 16], scale: f32, absmax: f32) -> (u8, Option<u8>) {
        let ratio = if absmax == 0.0 { 0.0 } else { scale / absmax };
        // Sixteen comparisons find the run of sixteen levels, sixteen more the place in it: one vector each.
        let count = |levels: &[f32; 16]| levels.iter().map(|&level| u32::from(level < ratio)).sum::<u32>() as usize;
        let run = count(lasts).min(15);
        let above = (16 * run + count(&self.levels.as_chunks::<16>().0[run])).clamp(1, 255);
        let below = above - 1;
        let (to_below, to_above) = (ratio - self.levels[below], self.levels[above] - ratio);
        let is_rival = to_below < 2.0 * to_above && to_above < 2.0 * to_below;
        let (nearer, other) = if to_below <= to_above { (below, above) } else { (above, below) };
        (nearer as u8, (is_rival && self.levels[other] != 0.0).then_some(other as u8))
    }
}

/// The error under `scale`, in units of the free scale so that nothing overflows.
#[inline(always)]
fn error(lanes: impl Lanes, block: &[f32], weights: Option<&[f32]>, free: f32, scale: f32) -> f32 {
    let ratio = scale / free;
    ratio * ratio * deviation(lanes, block, weights, inverse(scale))
}

struct Snap<'a> {
    map: &'a Map,
    values: Values<'a>,
    weights: Option<&'a [f32]>,
    blocksize: usize,
    first_block: usize,
    scales: &'a mut [f32],
    nested: &'a mut [u8],
    codes: &'a mut [u8],
}

impl Work for Snap<'_> {
    type Result = ();

    #[inline(always)]
    fn run(self, lanes: impl Lanes) {
        let Self { map, values, weights, blocksize, first_block, scales, nested, codes } = self;
        let mut tile = [0.0; TILE];
        let mut weights_tile = [0.0; TILE];
        let blocks = TILE / blocksize;
        let lasts = std::array::from_fn(|run| map.levels[16 * run + 15]);
        let tiles = scales.chunks_mut(blocks).zip(nested.chunks_mut(blocks)).zip(codes.chunks_mut(TILE / 2));
        for (index, ((scales, nested), codes)) in tiles.enumerate() {
            let start = index * TILE;
            let tile = whole_blocks(values, start, blocksize, &mut tile);
            // First for all blocks, since no place depends on another.
            let mut places = [(0, None); TILE / BLOCKSIZES[0]];
            for (offset, (place, &scale)) in places.iter_mut().zip(scales.iter()).enumerate() {
                *place = map.about(&lasts, scale, map.absmax[(first_block + index * blocks + offset) / BLOCKSIZE]);
            }
            let outputs = scales.iter_mut().zip(nested).zip(codes.chunks_mut(blocksize / 2));
            for (offset, (block, ((scale, nested), codes))) in tile.chunks(blocksize).zip(outputs).enumerate() {
                let weights = weights.map(|weights| {
                    let at = start + offset * blocksize;
                    let weights = weights_of(weights, at, blocksize.min(values.len() - at));
                    weights_tile[..weights.len()].copy_from_slice(weights);
                    &weights_tile[..blocksize]
                });
                let absmax = map.absmax[(first_block + index * blocks + offset) / BLOCKSIZE];
                let decoded = |code: u8| map.levels[usize::from(code)] * absmax + 0.0;
                let (mut code, rival) = places[offset];
                if let Some(rival) = rival {
                    let error_of_rival = error(lanes, block, weights, *scale, decoded(rival));
                    if error_of_rival < error(lanes, block, weights, *scale, decoded(code)) {
                        code = rival;
                    }
                }
                (*nested, *scale) = (code, decoded(code));
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
