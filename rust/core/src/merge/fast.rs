//! Sums in f32 that are proven to round as the exact ones do, or are made anew.
//!
//! With `u = 2^-24`, rank `n` and `D` the norm of a row's scaled left factors times the largest norm of a column's right
//! ones, which no change exceeds (Cauchy and Schwarz), nor does the sum of its terms' magnitudes, the exact sum is within
//!
//! ```text
//! E = 2u |v| + (n + 2) u D + 2^-148 (n + the sum of the column's magnitudes)
//! ```
//!
//! of the f32 sum `v`: half a last place for adding weight and change, as much for `v - E` and `v + E` themselves, one
//! rounding for each of the `n` fused products and for the scaled factors (Higham, "Accuracy and stability of numerical
//! algorithms", chapter 3), and what underflows. Where both bounds round to the same 16 bits, so does the exact sum. About one
//! value in 2,000 is in doubt and is computed in f64, by [`Segment::exact`]: so the results are those of f64 on every
//! processor, at the speed of f32.

use std::cmp::Ordering;
use std::ops::Range;

use super::factors::{STRIP, Segment};
use super::lanes::{Lanes, Work};
use super::region::{Codes, Region, TILE, Values};
use super::{lanes, round};
use crate::nf4::LEVELS;
use crate::{Float, Isa};

/// Twice the unit roundoff of f32, and a hundredth for the rounding of the bound itself.
const RELATIVE: f32 = 1.01 / (1 << 23) as f32;

/// Changes under this are bounded without overflow.
const LARGE: f64 = 1e30;

/// Weights whose squares add up to less are so too.
pub(super) const LARGE_SQUARES: f64 = 1e30;

/// The rows of one segment, summed and rounded to 16 bits.
struct Sum<'s, W> {
    segment: &'s Segment,
    weights: W,
    rows: Range<usize>,
    columns: Range<usize>,
    /// Number of the first of `weights` and of `out` in the weight.
    first: usize,
    to: Float,
    out: &'s mut [[u8; 2]],
}

/// Sum a region in f32, and say whether that can be done. `floats` takes all of the run, if it has to be decoded for that.
pub(super) fn sum(
    isa: Isa,
    region: &mut Region<'_, impl Values>,
    segment: Option<&Segment>,
    floats: &mut Vec<f32>,
) -> bool {
    let Some(segment) = segment else { return false };
    let (first, rows, columns, to) =
        (region.values.first() as usize, region.rows.clone(), region.columns.clone(), region.to);
    let out = region.out.as_chunks_mut::<2>().0;
    let whole_blocks = |codes: &Codes<'_>| region.width.is_multiple_of(codes.blocksize) && columns == (0..region.width);
    if let Some(weights) = region.values.codes().filter(whole_blocks) {
        return lanes::run(isa, Sum { segment, weights, rows, columns, first, to, out });
    }
    if floats.is_empty() {
        floats.resize(region.values.len() + STRIP, 0.0);
        region.values.decode(0, &mut floats[..region.values.len()]);
    }
    lanes::run(isa, Sum { segment, weights: &floats[..], rows, columns, first, to, out })
}

/// Weights that are read a strip at a time.
trait Weights: Copy {
    fn strip<L: Lanes>(self, lanes: L, at: usize) -> L::Floats;
    fn one(self, at: usize) -> f32;
}

/// Floats, and room to read one strip behind them.
impl Weights for &[f32] {
    #[inline(always)]
    fn strip<L: Lanes>(self, lanes: L, at: usize) -> L::Floats {
        lanes.load(&self[at..])
    }

    fn one(self, at: usize) -> f32 {
        self[at]
    }
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
        LEVELS[usize::from(code & 15)] * self.scales[at / self.blocksize]
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
        let rank = segment.rank as f64;
        for index in 0..rows {
            let (mut squares, mut zero) = (0.0, true);
            for (column, (&factor, scale)) in segment.left_of(row + index).iter().zip(&segment.scales).enumerate() {
                let scaled = (scale * f64::from(factor)) as f32;
                group.left[column * rows + index] = scaled;
                squares += f64::from(scaled) * f64::from(scaled);
                zero &= factor == 0.0;
            }
            let reach = squares.sqrt() * segment.column_norm;
            let rounding = 1.01 * (rank + 2.0) * 2_f64.powi(-24) * reach;
            let underflow = 2_f64.powi(-148) * (rank + rank.sqrt() * segment.column_norm);
            if !zero {
                group.bounds[index] = (rounding + underflow) as f32;
                group.large |= reach.partial_cmp(&LARGE) != Some(Ordering::Less);
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
        for start in self.columns.clone().step_by(TILE) {
            let count = TILE.min(self.columns.end - start);
            for group in &groups {
                match group.rows {
                    _ if group.large => self.all_in_doubt(group, start, count),
                    rows if rows == ROWS => self.sum::<L, ROWS, BF16>(lanes, group, start, count),
                    4 => self.sum::<L, 4, BF16>(lanes, group, start, count),
                    _ => self.sum::<L, 1, BF16>(lanes, group, start, count),
                }
            }
        }
    }

    /// Sum `count` columns from `start` on of a group of `R` rows.
    #[inline(always)]
    fn sum<L: Lanes, const R: usize, const BF16: bool>(&mut self, lanes: L, group: &Group, start: usize, count: usize) {
        let columns = self.segment.columns;
        let bounds: &[f32; R] = group.bounds.as_slice().try_into().expect("as many rows");
        for strip in (0..count).step_by(L::WIDTH) {
            let mut sums = [lanes.splat(0.0); R];
            let mut at = start + strip;
            for left in group.left.as_chunks::<R>().0 {
                let right = lanes.load(&self.segment.right[at..]);
                each_row!(R, ROW, { sums[ROW] = lanes.mul_add(right, lanes.splat(left[ROW]), sums[ROW]) });
                at += columns;
            }
            let mut doubts = [0; R];
            let first = group.row * columns + start + strip - self.first;
            let whole = count - strip >= L::WIDTH;
            each_row!(R, ROW, {
                let at = first + ROW * columns;
                let value = lanes.add(self.weights.strip(lanes, at), sums[ROW]);
                let bound = lanes.mul_add(lanes.abs(value), lanes.splat(RELATIVE), lanes.splat(bounds[ROW]));
                let (low, high) = (lanes.sub(value, bound), lanes.add(value, bound));
                if whole {
                    doubts[ROW] = lanes.round::<BF16>(low, high, &mut self.out[at..]);
                } else {
                    let mut strip_out = [[0; 2]; STRIP];
                    let left = count - strip;
                    doubts[ROW] = lanes.round::<BF16>(low, high, &mut strip_out) & ((1 << left) - 1);
                    self.out[at..][..left].copy_from_slice(&strip_out[..left]);
                }
            });
            if doubts.iter().any(|&doubt| doubt != 0) {
                for (row, mut doubt) in (group.row..).zip(doubts) {
                    while doubt != 0 {
                        self.doubt(row, start + strip + doubt.trailing_zeros() as usize);
                        doubt &= doubt - 1;
                    }
                }
            }
        }
    }

    #[cold]
    fn all_in_doubt(&mut self, group: &Group, start: usize, count: usize) {
        for row in group.row..group.row + group.rows {
            (start..start + count).for_each(|column| self.doubt(row, column));
        }
    }

    /// Make one value anew.
    #[cold]
    #[inline(never)]
    fn doubt(&mut self, row: usize, column: usize) {
        let at = row * self.segment.columns + column - self.first;
        let exact = self.segment.exact(row, column, self.weights.one(at));
        round::encode(self.to, &[exact], &mut [0.0], &mut self.out[at]);
    }
}
