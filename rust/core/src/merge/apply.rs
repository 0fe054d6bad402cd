//! A change at work: values of a weight in, in any order of pieces; changed values out, as bytes of a float type.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use super::factors::Segment;
use super::{Norms, round};
use crate::Float;
use crate::isa::vectorized;
use crate::sync::lock;

/// Columns that are computed at a time.
const TILE: usize = 512;

/// Sums of squares are taken in this many lanes, whatever the processor has.
const LANES: usize = 16;

/// A run of a weight's elements, and how to read them.
pub(crate) struct Values<D: Fn(usize, &mut [f32])> {
    /// Number of the first element in the weight.
    pub(crate) first: u64,
    /// How many elements there are.
    pub(crate) len: usize,
    /// Decode elements, from that of this number in the run on.
    pub(crate) decode: D,
}

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

/// Elements of one row.
struct Piece {
    row: usize,
    columns: Range<usize>,
    /// Number of the first one in the run.
    at: usize,
}

/// Room for the columns of a tile.
struct Scratch {
    weight: [f32; TILE],
    sum: [f64; TILE],
    product: [f64; TILE],
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
    pub(crate) fn measure(&self, values: &Values<impl Fn(usize, &mut [f32])>) {
        let Some(dora) = self.dora() else { return };
        let [_, columns] = self.size;
        let first = values.first as usize;
        let first_row = if dora.by_columns { 0 } else { first / columns };
        let rows = (first + values.len).div_ceil(columns) - first / columns;
        let mut squares = vec![0.0; if dora.by_columns { columns } else { rows }];
        self.each_tile(values, |piece, scratch| {
            let sums = &scratch.sum[..piece.columns.len()];
            if dora.by_columns {
                for (square, &value) in squares[piece.columns.clone()].iter_mut().zip(sums) {
                    *square += value * value;
                }
            } else {
                squares[piece.row - first_row] += sum_of_squares(sums.iter().copied());
            }
        });
        lock(&dora.squares).insert(values.first, (first_row, squares));
    }

    /// All values have been measured.
    ///
    /// # Errors
    /// One line, if a norm is zero or not finite.
    pub(crate) fn measured(&self) -> Result<(), String> {
        let Some(dora) = self.dora() else { return Ok(()) };
        let mut squares = vec![0.0; dora.magnitude.len()];
        for (first, found) in std::mem::take(&mut *lock(&dora.squares)).into_values() {
            for (square, found) in squares[first..].iter_mut().zip(found) {
                *square += found;
            }
        }
        if let Some(index) = squares.iter().position(|&square| !square.is_normal()) {
            let what = if dora.by_columns { "column" } else { "row" };
            let norm = squares[index].sqrt();
            return Err(format!("{what} {index} of {} has norm {norm}, which no magnitude can scale", self.name));
        }
        let factors = squares.iter().zip(&dora.magnitude);
        let factors = factors.map(|(square, &magnitude)| f64::from(magnitude) / square.sqrt()).collect();
        dora.factors.set(factors).expect("measured once");
        Ok(())
    }

    /// The changed values, as bytes of type `to`, rounded once.
    pub(crate) fn apply(&self, values: &Values<impl Fn(usize, &mut [f32])>, to: Float, out: &mut [u8]) {
        let mut squares = [0.0; 2];
        let mut rounded = [0.0; TILE];
        let told = matches!(self.kind, Kind::Sum { dora: None, .. });
        self.each_tile(values, |piece, scratch| {
            let count = piece.columns.len();
            let (weight, sum) = (&scratch.weight[..count], &mut scratch.sum[..count]);
            if let Some(dora) = self.dora() {
                dora.scale(&piece, sum);
            }
            squares[0] += sum_of_squares(weight.iter().map(|&weight| f64::from(weight)));
            if !told {
                squares[1] += sum_of_squares(sum.iter().zip(weight).map(|(sum, &weight)| sum - f64::from(weight)));
            }
            let out = &mut out[piece.at * to.size()..][..count * to.size()];
            round::encode(to, sum, &mut rounded[..count], out);
        });
        lock(&self.squares).insert(values.first, squares);
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

    fn dora(&self) -> Option<&Dora> {
        match &self.kind {
            Kind::Sum { dora, .. } => dora.as_ref(),
            Kind::Rows { .. } => None,
        }
    }

    /// Call `with` with every tile of `values`: the weight, and its sum with the low-rank changes, or what replaces it.
    fn each_tile(&self, values: &Values<impl Fn(usize, &mut [f32])>, mut with: impl FnMut(Piece, &mut Scratch)) {
        let [_, columns] = self.size;
        let mut scratch = Scratch { weight: [0.0; TILE], sum: [0.0; TILE], product: [0.0; TILE] };
        let mut at = 0;
        vectorized(
            #[inline(always)]
            || {
                while at < values.len {
                    let first = values.first as usize + at;
                    let (row, column) = (first / columns, first % columns);
                    let count = TILE.min(columns - column).min(values.len - at);
                    let piece = Piece { row, columns: column..column + count, at };
                    (values.decode)(at, &mut scratch.weight[..count]);
                    self.add(&piece, &mut scratch);
                    with(piece, &mut scratch);
                    at += count;
                }
            },
        );
    }

    #[inline(always)]
    fn add(&self, piece: &Piece, scratch: &mut Scratch) {
        let [_, columns] = self.size;
        let count = piece.columns.len();
        let Scratch { weight, sum, product } = scratch;
        let (weight, sum, product) = (&weight[..count], &mut sum[..count], &mut product[..count]);
        match &self.kind {
            Kind::Rows { rows, values } => {
                let replaced = rows.get(&piece.row).map(|row| &values[row * columns..][piece.columns.clone()]);
                for (sum, &value) in sum.iter_mut().zip(replaced.unwrap_or(weight)) {
                    *sum = f64::from(value);
                }
            }
            Kind::Sum { segments, .. } => {
                let after = segments.partition_point(|segment| segment.rows.end <= piece.row);
                match segments.get(after) {
                    Some(segment) if segment.rows.contains(&piece.row) => {
                        segment.delta(piece, columns, sum, product);
                        for (sum, &weight) in sum.iter_mut().zip(weight) {
                            *sum += f64::from(weight);
                        }
                    }
                    _ => {
                        for (sum, &weight) in sum.iter_mut().zip(weight) {
                            *sum = f64::from(weight);
                        }
                    }
                }
            }
        }
    }
}

impl Segment {
    /// The change itself, in f64: each term is summed in the order of the rank and then scaled, and the terms are added
    /// in order. Products of two f32 are exact.
    #[inline(always)]
    fn delta(&self, piece: &Piece, columns: usize, delta: &mut [f64], product: &mut [f64]) {
        let left = &self.left[(piece.row - self.rows.start) * self.rank..][..self.rank];
        delta.fill(0.0);
        let mut first = 0;
        for &(r, scale) in &self.terms {
            product.fill(0.0);
            for (rank, &factor) in (first..).zip(&left[first..first + r]) {
                let factor = f64::from(factor);
                let right = &self.right[rank * columns..][piece.columns.clone()];
                for (product, &right) in product.iter_mut().zip(right) {
                    *product += factor * f64::from(right);
                }
            }
            for (delta, &product) in delta.iter_mut().zip(&*product) {
                *delta += scale * product;
            }
            first += r;
        }
    }
}

impl Dora {
    #[inline(always)]
    fn scale(&self, piece: &Piece, values: &mut [f64]) {
        let factors = self.factors.get().expect("all values have been measured");
        if self.by_columns {
            for (value, factor) in values.iter_mut().zip(&factors[piece.columns.clone()]) {
                *value *= factor;
            }
        } else {
            let factor = factors[piece.row];
            for value in values {
                *value *= factor;
            }
        }
    }
}

#[inline(always)]
fn sum_of_squares(values: impl Iterator<Item = f64>) -> f64 {
    let mut lanes = [0.0; LANES];
    for (index, value) in values.enumerate() {
        lanes[index % LANES] += value * value;
    }
    lanes.iter().sum()
}
