//! Sums in f32 that are proven to round as the exact ones do, or are made anew.
//!
//! The `n` ranks are summed in blocks of [`BLOCK`], and the blocks then added. With `u = 2^-24`, and `P[k]` a bound of the sum
//! of magnitudes of a block's products up to rank `k`, the exact sum is within
//!
//! ```text
//! E = 2u |v| + u (sum of P[k]) + u (n / BLOCK + 2) (sum of P[k] of the last ranks of blocks) + underflow
//! ```
//!
//! of the f32 sum `v`: half a last place for adding weight and change, as much for `v - E` and `v + E` themselves, one
//! rounding for each fused product, for each sum of blocks and for the scaled factors (Higham, "Accuracy and stability of
//! numerical algorithms", chapters 3 and 4). By Cauchy and Schwarz `P[k]` is the norm of the row's scaled left factors times
//! the largest norm of a column's right ones. Where both bounds round to the same 16 bits, so does the exact sum. About one
//! value in 3,000 is in doubt and is computed in f64, by [`Segment::exact`]: so the results are those of f64 on every
//! processor, at the speed of f32.

use std::cmp::Ordering;
use std::ops::Range;

use super::factors::{BLOCK, STRIP, Segment, Strip};
use super::lanes::{Lanes, Work};
use super::region::{Codes, Region, TILE, Values};
use super::{lanes, round};
use crate::nf4::LEVELS;
use crate::{Float, Isa};

/// Twice the unit roundoff of f32, and a hundredth for the rounding of the bound itself.
const RELATIVE: f32 = 1.01 / (1 << 23) as f32;

/// Changes under this are bounded without overflow.
const LARGE: f64 = 1e30;

/// Weights whose squares add up to less are so too: none is over 1e15.
pub(super) const LARGE_SQUARES: f64 = 1e30;

/// The rows of one segment, summed and rounded to 16 bits.
struct Sum<'s, W> {
    segment: &'s Segment,
    weights: W,
    rows: Range<usize>,
    /// Number of the first of `weights` and of `out` in the weight.
    first: usize,
    to: Float,
    out: &'s mut [[u8; 2]],
}

/// Sum a region in f32, and say whether that can be done: rows that are cut are few, and left alone. `floats` takes all of
/// the run, if it has to be decoded for that.
pub(super) fn sum(
    isa: Isa,
    region: &mut Region<'_, impl Values>,
    segment: Option<&Segment>,
    floats: &mut Vec<f32>,
) -> bool {
    let Some(segment) = segment.filter(|_| region.columns == (0..region.width)) else { return false };
    let (first, rows, to) = (region.values.first() as usize, region.rows.clone(), region.to);
    let out = region.out.as_chunks_mut::<2>().0;
    if let Some(weights) = region.values.codes().filter(|codes| region.width.is_multiple_of(codes.blocksize)) {
        return lanes::run(isa, Sum { segment, weights, rows, first, to, out });
    }
    if floats.is_empty() {
        floats.resize(region.values.len() + STRIP, 0.0);
        region.values.decode(0, &mut floats[..region.values.len()]);
    }
    lanes::run(isa, Sum { segment, weights: &floats[..], rows, first, to, out })
}

/// Weights that are read a strip at a time.
trait Weights: Copy {
    fn strip<L: Lanes>(self, lanes: L, at: usize) -> L::Floats;
    fn one(self, at: usize) -> f32;

    /// Have a strip in the cache when it is read, if there is one.
    fn prefetch<L: Lanes>(self, lanes: L, at: usize);
}

/// Floats, and room to read one strip behind them.
impl Weights for &[f32] {
    #[inline(always)]
    fn strip<L: Lanes>(self, lanes: L, at: usize) -> L::Floats {
        lanes.apart(&self[at..])
    }

    fn one(self, at: usize) -> f32 {
        self[at]
    }

    /// They have just been decoded.
    fn prefetch<L: Lanes>(self, _: L, _: usize) {}
}

/// Codes, of rows of whole blocks.
impl Weights for Codes<'_> {
    #[inline(always)]
    fn strip<L: Lanes>(self, lanes: L, at: usize) -> L::Floats {
        // A blocksize is a power of two.
        lanes.levels(&self.packed[at / 2..], self.scales[at >> self.blocksize.trailing_zeros()])
    }

    fn one(self, at: usize) -> f32 {
        let code = self.packed[at / 2] >> (4 * ((at + 1) % 2));
        LEVELS[usize::from(code & 15)] * self.scales[at >> self.blocksize.trailing_zeros()]
    }

    #[inline(always)]
    fn prefetch<L: Lanes>(self, lanes: L, at: usize) {
        lanes.prefetch(self.packed.as_ptr().wrapping_add(at / 2));
    }
}

/// The rows of a region that are summed together.
struct Group {
    row: usize,
    rows: usize,
    /// (rank, rows): the left factors, scaled.
    left: Vec<f32>,
    /// Of each row, the bound that does not depend on the value.
    bounds: Vec<f32>,
    /// Whether a bound cannot be told.
    large: bool,
}

impl Group {
    fn new(segment: &Segment, row: usize, rows: usize) -> Self {
        let mut group = Self { row, rows, left: vec![0.0; segment.rank * rows], bounds: vec![0.0; rows], large: false };
        let (rank, blocks) = (segment.rank as f64, segment.rank.div_ceil(BLOCK) as f64);
        for index in 0..rows {
            let factors = segment.left_of(row + index);
            let (mut squares, mut products, mut totals, mut underflow) = (0.0, 0.0, 0.0, 0.0);
            for (column, (&factor, scale)) in factors.iter().zip(&segment.scales).enumerate() {
                let scaled = (scale * f64::from(factor)) as f32;
                group.left[column * rows + index] = scaled;
                let before = if column % BLOCK == 0 { 0.0 } else { squares };
                squares = before + f64::from(scaled) * f64::from(scaled);
                let reach = squares.sqrt() * segment.reach[column];
                products += reach;
                if column % BLOCK == BLOCK - 1 || column == segment.rank - 1 {
                    totals += reach;
                    underflow += segment.reach[column];
                }
            }
            if factors.iter().any(|&factor| factor != 0.0) {
                let rounding = 1.01 * 2_f64.powi(-24) * (products + (blocks + 2.0) * totals);
                let underflow = 2_f64.powi(-148) * (rank + blocks + BLOCK as f64 * underflow);
                group.bounds[index] = (rounding + underflow) as f32;
                group.large |= totals.partial_cmp(&LARGE) != Some(Ordering::Less);
            }
        }
        group
    }
}

/// The body once for each of up to eight rows, so that what belongs to a row stays in registers.
macro_rules! each_row {
    ($rows:ident, $index:ident, $body:block) => {
        each_row!(@ $rows, $index, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $rows:ident, $index:ident, $body:block, $($number:literal)*) => {
        $(
            if $number < $rows {
                #[allow(non_upper_case_globals)]
                const $index: usize = $number;
                $body
            }
        )*
    };
}

impl<W: Weights> Work for Sum<'_, W> {
    #[inline(always)]
    fn run<L: Lanes, const ROWS: usize>(self, lanes: L) {
        if self.to == Float::BF16 { self.run_to::<L, ROWS, true>(lanes) } else { self.run_to::<L, ROWS, false>(lanes) }
    }
}

impl<W: Weights> Sum<'_, W> {
    #[inline(always)]
    fn run_to<L: Lanes, const ROWS: usize, const BF16: bool>(mut self, lanes: L) {
        let mut groups = Vec::new();
        let mut row = self.rows.start;
        while row < self.rows.end {
            let left = self.rows.end - row;
            let rows = [ROWS, 4, 1].into_iter().find(|&rows| rows <= left).unwrap_or(1);
            groups.push(Group::new(self.segment, row, rows));
            row += rows;
        }
        let segment = self.segment;
        for (start, strips) in (0..).step_by(TILE).zip(segment.strips().chunks(TILE / STRIP * segment.rank)) {
            for group in &groups {
                match group.rows {
                    rows if group.large => self.sum_all_anew(group.row..group.row + rows, start),
                    rows if rows == ROWS => self.sum::<L, ROWS, BF16>(lanes, group, start, strips),
                    4 => self.sum::<L, 4, BF16>(lanes, group, start, strips),
                    _ => self.sum::<L, 1, BF16>(lanes, group, start, strips),
                }
            }
        }
    }

    /// Sum in f64 a tile, from column `start` on, that no bound can be told for.
    #[cold]
    fn sum_all_anew(&mut self, rows: Range<usize>, start: usize) {
        for row in rows {
            for column in start..self.segment.columns.min(start + TILE) {
                let at = row * self.segment.columns + column - self.first;
                sum_anew(self.segment, self.weights, self.to, [row, column, at], 1, self.out);
            }
        }
    }

    /// Sum a tile of a group of `R` rows, from column `start` on, whose right factors are `strips`.
    #[inline(always)]
    fn sum<L: Lanes, const R: usize, const BF16: bool>(
        &mut self,
        lanes: L,
        group: &Group,
        start: usize,
        strips: &[Strip],
    ) {
        let mut doubts = [[0; R]; TILE / STRIP];
        let starts = (start..).step_by(STRIP);
        for ((start, strip), doubts) in starts.clone().zip(strips.chunks_exact(self.segment.rank)).zip(&mut doubts) {
            for part in 0..STRIP / L::WIDTH {
                let first = part * L::WIDTH;
                let count = self.segment.columns.saturating_sub(start + first);
                let found = if count >= L::WIDTH {
                    self.part::<L, R, BF16, true>(lanes, group, start, strip, part, L::WIDTH)
                } else if count > 0 {
                    self.part::<L, R, BF16, false>(lanes, group, start, strip, part, count)
                } else {
                    [0; R]
                };
                each_row!(R, ROW, { doubts[ROW] |= found[ROW] << first });
            }
        }
        // Not sooner: a call between the sums would empty all registers, and none of these waits for another.
        for (start, doubts) in starts.zip(doubts) {
            for (row, doubt) in (group.row..).zip(doubts) {
                if doubt != 0 {
                    let at = row * self.segment.columns + start - self.first;
                    sum_anew(self.segment, self.weights, self.to, [row, start, at], doubt, self.out);
                }
            }
        }
    }

    /// Sum number `part` of the strip from column `start` on: `count` columns of it, which are `WHOLE` if they are as many
    /// as there are lanes. Returns of each row which values are in doubt.
    #[inline(always)]
    fn part<L: Lanes, const R: usize, const BF16: bool, const WHOLE: bool>(
        &mut self,
        lanes: L,
        group: &Group,
        start: usize,
        strip: &[Strip],
        part: usize,
        count: usize,
    ) -> [u32; R] {
        let Self { segment, weights, first, .. } = *self;
        let out = &mut *self.out;
        let bounds: &[f32; R] = group.bounds.as_slice().try_into().expect("as many rows");
        let left = group.left.as_chunks::<R>().0;
        let mut blocks = left.chunks(BLOCK).zip(strip.chunks(BLOCK)).map(
            #[inline(always)]
            |(left, strip)| products(lanes, left, strip, part),
        );
        let mut sums = blocks.next().unwrap_or([lanes.splat(0.0); R]);
        for products in blocks {
            each_row!(R, ROW, { sums[ROW] = lanes.add(sums[ROW], products[ROW]) });
        }
        let at = group.row * segment.columns + start + part * L::WIDTH - first;
        // Of the next rows: what is read of each in a tile is too short for the processor to foresee.
        each_row!(R, ROW, { weights.prefetch(lanes, at + (R + ROW) * segment.columns) });
        let mut doubts = [0; R];
        each_row!(R, ROW, {
            let at = at + ROW * segment.columns;
            let value = lanes.add(weights.strip(lanes, at), sums[ROW]);
            let bound = lanes.mul_add(lanes.abs(value), lanes.splat(RELATIVE), lanes.splat(bounds[ROW]));
            let (low, high) = (lanes.sub(value, bound), lanes.add(value, bound));
            doubts[ROW] = if WHOLE {
                lanes.round::<BF16>(low, high, &mut out[at..])
            } else {
                let mut whole = [[0; 2]; STRIP];
                let doubt = lanes.round::<BF16>(low, high, &mut whole);
                out[at..][..count].copy_from_slice(&whole[..count]);
                doubt & ((1 << count) - 1)
            };
        });
        doubts
    }
}

/// The products of a block of ranks, added up, with part of a strip of each.
#[inline(always)]
fn products<L: Lanes, const R: usize>(lanes: L, left: &[[f32; R]], strip: &[Strip], part: usize) -> [L::Floats; R] {
    let mut products = [lanes.splat(0.0); R];
    for (left, strip) in left.iter().zip(strip) {
        let right = lanes.part(strip, part);
        each_row!(R, ROW, { products[ROW] = lanes.mul_add(right, lanes.splat(left[ROW]), products[ROW]) });
    }
    products
}

/// Sum in f64 what `bits` say of the values from a row and column on, of which the first is number `at`.
#[cold]
#[inline(never)]
fn sum_anew(
    segment: &Segment,
    weights: impl Weights,
    to: Float,
    [row, column, at]: [usize; 3],
    mut bits: u32,
    out: &mut [[u8; 2]],
) {
    while bits != 0 {
        let lane = bits.trailing_zeros() as usize;
        let exact = segment.exact(row, column + lane, weights.one(at + lane));
        round::encode(to, &[exact], &mut [0.0], &mut out[at + lane]);
        bits &= bits - 1;
    }
}
