//! The inner loops of the search for each instruction set, all with the same results.
//!
//! A value's code is the number of [`THRESHOLDS`](crate::nf4::THRESHOLDS) strictly below it. Fifteen comparisons would do; tables need one. The
//! line is cut into cells with at most one threshold each, so that a cell's first code and its threshold, looked up by
//! permuting registers, decide. AVX-512 permutes 32 entries, enough for cells of equal width. AVX2 permutes eight and
//! picks between two halves, so there 16 cells must do, eight for each sign: the magnitude is bent first, by
//! `|x| * (a - b|x|)`, to spread the thresholds evenly.
//!
//! Ranking (see `rank`) works on bytes, 64 blocks in 64 lanes; with 16-entry tables in each 128 bits of a register.
//!
//! Everything between `Work::run` and these functions must be `#[inline(always)]`, and must not call them in a closure:
//! what is not inlined is compiled without the vector instructions, and calls each of them.

use super::rank::{Errors, Rows, Table};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::Isa;
use crate::nf4::{LEVELS, nearest};

/// Sixteen floats of each instruction set, and what it does with them its own way.
pub(super) trait Lanes: Copy {
    type Floats: Copy;

    fn load(self, values: &[f32; 16]) -> Self::Floats;
    fn splat(self, value: f32) -> Self::Floats;
    fn add(self, left: Self::Floats, right: Self::Floats) -> Self::Floats;
    fn sub(self, left: Self::Floats, right: Self::Floats) -> Self::Floats;
    fn mul(self, left: Self::Floats, right: Self::Floats) -> Self::Floats;

    /// The sum of all lanes: the two halves are added, then theirs, and so on.
    fn sum(self, lanes: Self::Floats) -> f32;

    /// Four such sums.
    fn sums(self, lanes: [Self::Floats; 4]) -> [f32; 4];

    /// How many of the sixteen are less than `value`.
    fn below(self, sixteen: &[f32; 16], value: f32) -> usize;

    /// The level nearest to each scaled value.
    fn levels(self, scaled: Self::Floats) -> Self::Floats;

    /// The codes of those levels, two a byte, the first in the high half.
    fn codes(self, scaled: Self::Floats) -> [u8; 8];

    /// The error of 64 pieces of a block at the ratio of `table`, positive and negative, in grid units squared.
    fn rank(self, rows: &Rows, table: &Table) -> [Errors; 2];
}

/// A computation that is compiled for each instruction set. `run` must be `#[inline(always)]`.
pub(super) trait Work {
    type Result;

    fn run(self, lanes: impl Lanes) -> Self::Result;
}

/// Run `work` on `isa`, or on what the processor has of it.
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code, reason = "calls with the features that detect() has found"))]
pub(super) fn run_on<W: Work>(isa: Isa, work: W) -> W::Result {
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has these features, as detect() has found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { with_avx512(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { with_avx2(work) },
        _ => work.run(Portable),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn with_avx512<W: Work>(work: W) -> W::Result {
    work.run(avx512::Avx512)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<W: Work>(work: W) -> W::Result {
    work.run(avx2::Avx2)
}

#[derive(Clone, Copy)]
struct Portable;

impl Lanes for Portable {
    type Floats = [f32; 16];

    #[inline(always)]
    fn load(self, values: &[f32; 16]) -> [f32; 16] {
        *values
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    fn add(self, left: [f32; 16], right: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| left[lane] + right[lane])
    }

    #[inline(always)]
    fn sub(self, left: [f32; 16], right: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| left[lane] - right[lane])
    }

    #[inline(always)]
    fn mul(self, left: [f32; 16], right: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| left[lane] * right[lane])
    }

    #[inline(always)]
    fn sum(self, mut lanes: [f32; 16]) -> f32 {
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    fn sums(self, lanes: [[f32; 16]; 4]) -> [f32; 4] {
        lanes.map(|lanes| self.sum(lanes))
    }

    #[inline(always)]
    fn below(self, sixteen: &[f32; 16], value: f32) -> usize {
        sixteen.iter().map(|&one| usize::from(one < value)).sum()
    }

    #[inline(always)]
    fn levels(self, scaled: [f32; 16]) -> [f32; 16] {
        scaled.map(|value| LEVELS[usize::from(nearest(value)) & 15])
    }

    #[inline(always)]
    fn codes(self, scaled: [f32; 16]) -> [u8; 8] {
        let codes = scaled.map(nearest);
        std::array::from_fn(|pair| codes[2 * pair] << 4 | codes[2 * pair + 1])
    }

    #[inline(always)]
    fn rank(self, rows: &Rows, table: &Table) -> [Errors; 2] {
        let squares = table.squares();
        let mut sums = [[0_u32; 64]; 2];
        for row in rows {
            for (lane, &value) in row.iter().enumerate() {
                sums[0][lane] += u32::from(squares[usize::from(value as u8)]);
                sums[1][lane] += u32::from(squares[usize::from(value.wrapping_neg() as u8)]);
            }
        }
        sums.map(|sums| sums.map(|sum| sum.min(u32::from(u16::MAX)) as u16))
    }
}

/// Cells of a cut line: the code at each cell's lower end, and the threshold within it.
#[cfg(target_arch = "x86_64")]
pub(super) struct Cells<const N: usize> {
    pub(super) first: [u32; N],
    pub(super) threshold: [f32; N],
}

#[cfg(target_arch = "x86_64")]
impl<const N: usize> Cells<N> {
    /// The cells of a line on which `cell_of` says in which cell each threshold lies.
    pub(super) const fn new(cell_of: [usize; 15]) -> Self {
        let mut cells = Self { first: [0; N], threshold: [f32::INFINITY; N] };
        let mut code = 0;
        while code < 15 {
            assert!(code == 0 || cell_of[code] > cell_of[code - 1], "two thresholds in one cell");
            cells.threshold[cell_of[code]] = crate::nf4::THRESHOLDS[code];
            let mut later = cell_of[code] + 1;
            while later < N {
                cells.first[later] += 1;
                later += 1;
            }
            code += 1;
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nf4::THRESHOLDS;

    struct Nearest(Vec<[f32; 16]>);

    impl Work for Nearest {
        type Result = Vec<([u8; 8], [f32; 16])>;

        #[inline(always)]
        fn run(self, lanes: impl Lanes) -> Self::Result {
            let mut all = Vec::new();
            for scaled in &self.0 {
                let scaled = lanes.load(scaled);
                let levels = lanes.levels(scaled);
                // Lane by lane: the sum of a level and fifteen zeros.
                let one = |lane| {
                    let mut mask = [0.0; 16];
                    mask[lane] = 1.0;
                    lanes.sum(lanes.mul(levels, lanes.load(&mask)))
                };
                all.push((lanes.codes(scaled), std::array::from_fn(one)));
            }
            all
        }
    }

    #[test]
    fn every_instruction_set_counts_the_thresholds_below() {
        let edges = THRESHOLDS.into_iter().chain(LEVELS);
        let mut values: Vec<f32> = edges.flat_map(|edge| [edge.next_down(), edge, edge.next_up()]).collect();
        values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, f32::MIN_POSITIVE, 1e-45]);
        values.extend((0..1 << 20).map(|index| (index as f32 / (1 << 19) as f32 - 1.0) * 1.5));
        values.resize(values.len().next_multiple_of(16), 0.0);
        let chunks = values.as_chunks::<16>().0.to_vec();
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            for (scaled, (codes, levels)) in chunks.iter().zip(run_on(isa, Nearest(chunks.clone()))) {
                let expected = scaled.map(|value| THRESHOLDS.iter().filter(|&&threshold| threshold < value).count());
                assert_eq!(levels, expected.map(|code| LEVELS[code]));
                let unpacked = codes.into_iter().flat_map(|byte| [byte >> 4, byte & 15]).map(usize::from);
                assert!(unpacked.eq(expected), "{isa:?}: {scaled:?}");
            }
        }
    }
}
