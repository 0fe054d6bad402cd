//! A change at work: values of a weight in, in any order of runs; changed values out, as bytes of a float type.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use super::factors::Segment;
use super::fast::LARGE_SQUARES;
use super::region::{Region, TILE, Values, rectangles, squares, squares_of_weights};
use super::{Norms, fast, round};
use crate::isa::{compiled_for, vectorized};
use crate::sync::lock;
use crate::{Float, Isa};

/// The change of one weight, its factors in memory.
pub(crate) struct Applied {
    name: String,
    /// Rows and columns.
    size: [usize; 2],
    kind: Kind,
    /// Sums of squares of the weight and, where its factors do not tell, of the change; by the number of the first element.
    squares: Mutex<BTreeMap<u64, [f64; 2]>>,
}

enum Kind {
    Sum { segments: Vec<Segment>, dora: Option<Dora> },
    Rows { rows: HashMap<usize, usize>, values: Vec<f32> },
}

/// What the norms of rows or columns become.
struct Dora {
    magnitude: Vec<f32>,
    by_columns: bool,
    /// Sums of squares of rows or columns from some number on, by the number of the first element.
    squares: Mutex<BTreeMap<u64, (usize, Vec<f64>)>>,
    /// What each row or column is multiplied by; known when all have been seen.
    factors: OnceLock<Vec<f64>>,
}

/// Room for the columns of a tile.
struct Tile {
    weight: [f32; TILE],
    sum: [f64; TILE],
    product: [f64; TILE],
    rounded: [f32; TILE],
}

impl Applied {
    pub(super) fn sum(
        name: String,
        segments: Vec<Segment>,
        size: [usize; 2],
        magnitude: Option<Vec<f32>>,
        by_columns: bool,
    ) -> Self {
        let dora = magnitude.map(|magnitude| Dora {
            magnitude,
            by_columns,
            squares: Mutex::default(),
            factors: OnceLock::new(),
        });
        Self { name, size, kind: Kind::Sum { segments, dora }, squares: Mutex::default() }
    }

    pub(super) fn rows(name: String, rows: HashMap<usize, usize>, values: Vec<f32>, size: [usize; 2]) -> Self {
        Self { name, size, kind: Kind::Rows { rows, values }, squares: Mutex::default() }
    }

    /// Whether all values have to be [measured](Applied::measure) before the change can be applied.
    pub(crate) fn to_measure(&self) -> bool {
        self.dora().is_some_and(|dora| dora.factors.get().is_none())
    }

    /// Take the sums of squares that the norms are made of. In any order; the sums do not depend on it.
    pub(crate) fn measure(&self, values: &impl Values) {
        let Some(dora) = self.dora() else { return };
        let [_, columns] = self.size;
        let (first, len) = (values.first() as usize, values.len());
        let first_row = if dora.by_columns { 0 } else { first / columns };
        let rows = (first + len).div_ceil(columns) - first / columns;
        let mut found = vec![0.0; if dora.by_columns { columns } else { rows }];
        self.each_region(values, Float::F32, &mut [], |region, segment| {
            compiled_for(
                Isa::current(),
                #[inline(always)]
                || {
                    self.each_tile(
                        region,
                        segment,
                        #[inline(always)]
                        |row, columns, tile, _| {
                            let sums = &tile.sum[..columns.len()];
                            if dora.by_columns {
                                for (found, &value) in found[columns].iter_mut().zip(sums) {
                                    *found += value * value;
                                }
                            } else {
                                found[row - first_row] += squares(sums);
                            }
                        },
                    );
                },
            );
        });
        lock(&dora.squares).insert(values.first(), (first_row, found));
    }

    /// All values have been measured.
    ///
    /// # Errors
    /// One line, if a norm is zero or not finite.
    pub(crate) fn measured(&self) -> Result<(), String> {
        let Some(dora) = self.dora() else { return Ok(()) };
        let mut all = vec![0.0; dora.magnitude.len()];
        for (first, found) in std::mem::take(&mut *lock(&dora.squares)).into_values() {
            for (square, found) in all[first..].iter_mut().zip(found) {
                *square += found;
            }
        }
        if let Some(index) = all.iter().position(|&square| !square.is_normal()) {
            let what = if dora.by_columns { "column" } else { "row" };
            let norm = all[index].sqrt();
            return Err(format!("{what} {index} of {} has norm {norm}, which no magnitude can scale", self.name));
        }
        let factors = all.iter().zip(&dora.magnitude);
        let factors = factors.map(|(square, &magnitude)| f64::from(magnitude) / square.sqrt()).collect();
        dora.factors.set(factors).expect("measured once");
        Ok(())
    }

    /// The changed values, as bytes of type `to`, rounded once.
    pub(crate) fn apply(&self, values: &impl Values, to: Float, out: &mut [u8]) {
        let weight = squares_of(values);
        let change = self.apply_on(Isa::current(), values, weight < LARGE_SQUARES, to, out);
        lock(&self.squares).insert(values.first(), [weight, change]);
    }

    /// As [`Applied::apply`]; `bounded` says that no weight is over 1e15. Returns the sum of the change's squares where the
    /// factors do not tell it.
    pub(super) fn apply_on(&self, isa: Isa, values: &impl Values, bounded: bool, to: Float, out: &mut [u8]) -> f64 {
        let mut change = 0.0;
        let in_f32 = bounded && to != Float::F32 && self.dora().is_none();
        let mut floats = Vec::new();
        self.each_region(values, to, out, |region, segment| {
            if !(in_f32 && fast::sum(isa, region, segment, &mut floats)) {
                change += self.sum_exactly(isa, region, segment);
            }
        });
        change
    }

    /// Sum in f64. Returns the sum of the change's squares where the factors do not tell it.
    fn sum_exactly(&self, isa: Isa, region: &mut Region<'_, impl Values>, segment: Option<&Segment>) -> f64 {
        let told = matches!(self.kind, Kind::Sum { dora: None, .. });
        let mut change = 0.0;
        compiled_for(
            isa,
            #[inline(always)]
            || {
                self.each_tile(
                    region,
                    segment,
                    #[inline(always)]
                    |row, columns, tile, region| {
                        let (at, count, size) = (region.at(row, columns.start), columns.len(), region.to.size());
                        let (weight, sum) = (&tile.weight[..count], &mut tile.sum[..count]);
                        if let Some(dora) = self.dora() {
                            dora.scale(row, columns, sum);
                        }
                        if !told {
                            let changes = &mut tile.product[..count];
                            for (change, (sum, &weight)) in changes.iter_mut().zip(sum.iter().zip(weight)) {
                                *change = sum - f64::from(weight);
                            }
                            change += squares(changes);
                        }
                        let out = &mut region.out[at * size..][..count * size];
                        round::encode(region.to, sum, &mut tile.rounded[..count], out);
                    },
                );
            },
        );
        change
    }

    /// How much the weight is changed; known when all of it has been.
    pub(crate) fn norms(&self) -> Norms {
        let squares = lock(&self.squares);
        let [weight, mut change] = [0, 1].map(|index| squares.values().map(|squares| squares[index]).sum::<f64>());
        if let Kind::Sum { segments, dora: None } = &self.kind {
            change = segments.iter().map(Segment::squared_norm).sum();
        }
        Norms { change: change.sqrt(), weight: weight.sqrt() }
    }

    /// The weight's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn dora(&self) -> Option<&Dora> {
        match &self.kind {
            Kind::Sum { dora, .. } => dora.as_ref(),
            Kind::Rows { .. } => None,
        }
    }

    /// Call `visit` with the regions of a run, each with its segment if it has one.
    fn each_region<V: Values>(
        &self,
        values: &V,
        to: Float,
        out: &mut [u8],
        mut visit: impl FnMut(&mut Region<'_, V>, Option<&Segment>),
    ) {
        let [_, width] = self.size;
        for (rows, columns) in rectangles(values.first() as usize, values.len(), width) {
            let mut row = rows.start;
            while row < rows.end {
                let (segment, end) = self.segment(row);
                let rows = row..end.min(rows.end);
                row = rows.end;
                let columns = columns.clone();
                let mut region = Region { values, rows, columns, width, to, out: &mut *out };
                visit(&mut region, segment);
            }
        }
    }

    /// The segment that a row lies in, if it lies in one, and the row before which that is so.
    fn segment(&self, row: usize) -> (Option<&Segment>, usize) {
        let segments = match &self.kind {
            Kind::Sum { segments, .. } => &segments[..],
            Kind::Rows { .. } => &[],
        };
        let next = segments.partition_point(|segment| segment.rows.end <= row);
        match segments.get(next) {
            Some(segment) if segment.rows.start <= row => (Some(segment), segment.rows.end),
            Some(segment) => (None, segment.rows.start),
            None => (None, usize::MAX),
        }
    }

    /// Call `visit` with every tile of a region: its row and columns, the weight, and its sum with the change in f64.
    #[inline(always)]
    fn each_tile<'r, V: Values>(
        &self,
        region: &mut Region<'r, V>,
        segment: Option<&Segment>,
        mut visit: impl FnMut(usize, Range<usize>, &mut Tile, &mut Region<'r, V>),
    ) {
        let [weight, rounded] = [[0.0; TILE]; 2];
        let [sum, product] = [[0.0; TILE]; 2];
        let mut tile = Tile { weight, sum, product, rounded };
        for start in region.columns.clone().step_by(TILE) {
            let columns = start..region.columns.end.min(start + TILE);
            for row in region.rows.clone() {
                region.values.decode(region.at(row, start), &mut tile.weight[..columns.len()]);
                self.sum_tile(row, columns.clone(), segment, &mut tile);
                visit(row, columns.clone(), &mut tile, region);
            }
        }
    }

    #[inline(always)]
    fn sum_tile(&self, row: usize, columns: Range<usize>, segment: Option<&Segment>, tile: &mut Tile) {
        let count = columns.len();
        let (weight, sum) = (&tile.weight[..count], &mut tile.sum[..count]);
        if let Some(segment) = segment {
            segment.delta(row, columns, sum, &mut tile.product[..count]);
            for (sum, &weight) in sum.iter_mut().zip(weight) {
                *sum += f64::from(weight);
            }
            return;
        }
        let replaced = match &self.kind {
            Kind::Rows { rows, values } => rows.get(&row).map(|row| &values[row * self.size[1]..][columns]),
            Kind::Sum { .. } => None,
        };
        for (sum, &value) in sum.iter_mut().zip(replaced.unwrap_or(weight)) {
            *sum = f64::from(value);
        }
    }
}

/// The sum of squares of all of a run's elements.
fn squares_of(values: &impl Values) -> f64 {
    let mut tile = [0.0; TILE];
    let mut sum = 0.0;
    vectorized(
        #[inline(always)]
        || {
            for at in (0..values.len()).step_by(TILE) {
                let tile = &mut tile[..TILE.min(values.len() - at)];
                values.decode(at, tile);
                sum += squares_of_weights(tile);
            }
        },
    );
    sum
}

impl Dora {
    #[inline(always)]
    fn scale(&self, row: usize, columns: Range<usize>, values: &mut [f64]) {
        let factors = self.factors.get().expect("all values have been measured");
        if self.by_columns {
            for (value, factor) in values.iter_mut().zip(&factors[columns]) {
                *value *= factor;
            }
        } else {
            for value in values {
                *value *= factors[row];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prop::collection::vec as many_of;
    use proptest::prelude::*;

    use super::*;

    struct Floats(u64, Vec<f32>);

    impl Values for Floats {
        fn first(&self) -> u64 {
            self.0
        }

        fn len(&self) -> usize {
            self.1.len()
        }

        fn decode(&self, at: usize, out: &mut [f32]) {
            out.copy_from_slice(&self.1[at..][..out.len()]);
        }
    }

    /// Floats of the sizes that weights have, many of them whole steps that make ties of bfloat16 and f16.
    fn ordinary() -> impl Strategy<Value = f32> {
        prop_oneof![
            3 => -1.0_f32..1.0,
            5 => (-4096..4096_i32).prop_map(|steps| steps as f32 / 8192.0),
            1 => Just(0.0),
        ]
    }

    /// Some from the ends of the range among them.
    fn any_finite() -> impl Strategy<Value = f32> {
        prop_oneof![9 => ordinary(), 1 => prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// On every instruction set, and however the weight is cut into runs, the bytes are those of f64 rounded once.
        #[test]
        fn sums_are_exact_everywhere(
            (rows, columns, rank) in (1_usize..20, 1_usize..80, 1_usize..40),
            first_row in 0_usize..3,
            scale in prop_oneof![Just(2.0), Just(-0.3), Just(1e-9), Just(1e-30), Just(1e-42), Just(1e20)],
            cut in any::<prop::sample::Index>(),
            seed in prop_oneof![3 => many_of(ordinary(), 2048), 1 => many_of(any_finite(), 2048)],
        ) {
            let mut floats = seed.into_iter().cycle();
            let mut take = |count: usize| floats.by_ref().take(count).collect::<Vec<f32>>();
            let height = first_row + rows + 2;
            let (weights, left, right) = (take(height * columns), take(rows * rank), take(rank * columns));
            let terms = Vec::from([(rank / 2, scale), (rank - rank / 2, -scale / 3.0)]);
            let changed = first_row..first_row + rows;
            let exact = |index: usize| {
                let (row, column) = (index / columns, index % columns);
                let weight = f64::from(weights[index]);
                if !changed.contains(&row) {
                    return weight;
                }
                let product = |rank_index: usize| {
                    let left = left[(row - first_row) * rank + rank_index];
                    f64::from(left) * f64::from(right[rank_index * columns + column])
                };
                let first: f64 = (0..rank / 2).map(product).fold(0.0, |sum, product| sum + product);
                let second: f64 = (rank / 2..rank).map(product).fold(0.0, |sum, product| sum + product);
                weight + (0.0 + scale * first + -scale / 3.0 * second)
            };
            let exact: Vec<f64> = (0..weights.len()).map(exact).collect();
            let cut = cut.index(weights.len());
            for to in [Float::BF16, Float::F16, Float::F32] {
                let mut expected = vec![0; weights.len() * to.size()];
                round::encode(to, &exact, &mut vec![0.0; exact.len()], &mut expected);
                for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                    let segment =
                        Segment::new(changed.clone(), columns, left.clone(), right.clone(), terms.clone());
                    let change = Applied::sum("w".into(), vec![segment], [height, columns], None, false);
                    let mut found = vec![0; expected.len()];
                    let (head, tail) = found.split_at_mut(cut * to.size());
                    let bounded = weights.iter().all(|weight| weight.abs() < 1e15);
                    change.apply_on(isa, &Floats(0, weights[..cut].to_vec()), bounded, to, head);
                    change.apply_on(isa, &Floats(cut as u64, weights[cut..].to_vec()), bounded, to, tail);
                    let differs = found.chunks(to.size()).zip(expected.chunks(to.size())).position(|(a, b)| a != b);
                    prop_assert_eq!(differs, None, "{:?} {:?}", isa, to);
                }
            }
        }
    }
}
