//! Reading factors into memory: rows of the weight that are changed by the same terms share one pair of matrices.

use std::collections::{BTreeSet, HashMap};
use std::iter;
use std::ops::Range;
use std::rc::Rc;
use std::sync::OnceLock;

use super::Term;
use crate::Result;
use crate::safetensors::Tensor;

/// Ranks that are summed at a time, and their sums then added.
pub(super) const BLOCK: usize = 16;

/// Columns that the kernels sum together.
pub(super) const STRIP: usize = 32;

/// Right factors of one rank for as many columns: those of the even ones, then those of the odd ones. So lie the codes of a
/// weight that were shifted out of bytes, and the halves of what becomes a pair of 16-bit values.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Strip(pub(super) [f32; STRIP]);

impl Strip {
    /// Of the first values, and zeros if there are fewer.
    fn new(values: &[f32]) -> Self {
        let mut strip = [0.0; STRIP];
        for (column, &value) in values.iter().take(STRIP).enumerate() {
            strip[Self::place(column)] = value;
        }
        Self(strip)
    }

    /// Where the value of a column is.
    fn place(column: usize) -> usize {
        column / 2 + column % 2 * (STRIP / 2)
    }
}

/// A matrix in a tensor that has been found, all of it in the tensor.
#[derive(Debug)]
pub(super) struct ReadView<'a> {
    pub(super) tensor: Tensor<'a>,
    offset: usize,
    strides: [usize; 2],
    size: [usize; 2],
}

impl<'a> ReadView<'a> {
    pub(super) fn new(tensor: Tensor<'a>, offset: u64, strides: [u64; 2], size: [u64; 2]) -> Result<Self> {
        let steps = size.iter().zip(strides).map(|(size, stride)| size.saturating_sub(1).saturating_mul(stride));
        let last = steps.fold(offset, u64::saturating_add);
        let elements = tensor.info.elements();
        if last >= elements {
            let [rows, columns] = size;
            let what = format!("a matrix of {rows} x {columns} from element {offset} on, in steps of {strides:?}");
            return Err(tensor.error(format!("of shape {:?} does not hold {what}", tensor.info.shape)));
        }
        let [strides, size] = [strides, size].map(|pair| pair.map(|value| value as usize));
        Ok(Self { tensor, offset: offset as usize, strides, size })
    }

    /// The element (row, column) of this view of the tensor's elements `all`.
    fn at(&self, all: &[f32], row: usize, column: usize) -> f32 {
        all[self.offset + row * self.strides[0] + column * self.strides[1]]
    }
}

/// Rows that are changed by the same terms, whose ranks are counted through: `rank` is their sum.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) rows: Range<usize>,
    pub(super) columns: usize,
    pub(super) rank: usize,
    /// (rows, rank)
    pub(super) left: Vec<f32>,
    /// (rank, columns)
    right: Vec<f32>,
    /// (strips of columns, rank): what the kernels read, in the order in which they do.
    strips: OnceLock<Vec<Strip>>,
    /// Rank and scale of each term.
    pub(super) terms: Vec<(usize, f64)>,
    /// The scale of each rank.
    pub(super) scales: Vec<f64>,
    /// Of each rank, the largest norm of a column of `right` from the start of the rank's [`BLOCK`] to it.
    pub(super) reach: Vec<f64>,
}

impl Segment {
    /// The segments of all rows that `terms` change, ascending.
    pub(super) fn read_all(terms: &[Term<'_>], columns: usize) -> Result<Vec<Self>> {
        let mut known = Known::default();
        let ends: BTreeSet<usize> = terms.iter().flat_map(|term| [term.rows.start, term.rows.end]).collect();
        let ends: Vec<usize> = ends.into_iter().collect();
        let mut segments = Vec::new();
        for bounds in ends.windows(2) {
            let rows = bounds[0]..bounds[1];
            let active: Vec<_> = terms.iter().filter(|term| term.rows.contains(&rows.start)).collect();
            if !active.is_empty() {
                segments.push(Self::read(&active, rows, columns, &mut known)?);
            }
        }
        Ok(segments)
    }

    fn read(terms: &[&Term<'_>], rows: Range<usize>, columns: usize, known: &mut Known) -> Result<Self> {
        let rank = terms.iter().map(|term| term.left.size[1]).sum();
        let (mut left, mut right) = (vec![0.0; rows.len() * rank], Vec::with_capacity(rank * columns));
        let mut first = 0;
        for term in terms {
            let r = term.left.size[1];
            let all = known.floats(&term.left.tensor)?;
            for (row, values) in (rows.start - term.rows.start..).zip(left.chunks_exact_mut(rank)) {
                for (column, value) in values[first..first + r].iter_mut().enumerate() {
                    *value = term.left.at(&all, row, column);
                }
            }
            let all = known.floats(&term.right.tensor)?;
            for row in 0..r {
                right.extend((0..columns).map(|column| term.right.at(&all, row, column)));
            }
            first += r;
        }
        let terms = terms.iter().map(|term| (term.left.size[1], term.scale)).collect();
        Ok(Self::new(rows, columns, left, right, terms))
    }

    pub(super) fn new(
        rows: Range<usize>,
        columns: usize,
        left: Vec<f32>,
        right: Vec<f32>,
        terms: Vec<(usize, f64)>,
    ) -> Self {
        let mut squares = vec![0.0_f64; columns];
        let reach = right.chunks_exact(columns).enumerate().map(|(rank, row)| {
            if rank % BLOCK == 0 {
                squares.fill(0.0);
            }
            for (square, &value) in squares.iter_mut().zip(row) {
                *square += f64::from(value) * f64::from(value);
            }
            squares.iter().copied().fold(0.0, f64::max).sqrt()
        });
        let reach = reach.collect();
        let rank = right.len() / columns;
        let scales = terms.iter().flat_map(|&(r, scale)| vec![scale; r]).collect();
        Self { rows, columns, rank, left, right, strips: OnceLock::new(), terms, scales, reach }
    }

    /// The right factors, of each strip of columns all ranks.
    pub(super) fn strips(&self) -> &[Strip] {
        self.strips.get_or_init(|| {
            let starts = (0..self.columns).step_by(STRIP);
            starts
                .flat_map(|start| self.right.chunks_exact(self.columns).map(move |row| Strip::new(&row[start..])))
                .collect()
        })
    }

    /// The left factors of a row of the weight.
    pub(super) fn left_of(&self, row: usize) -> &[f32] {
        &self.left[(row - self.rows.start) * self.rank..][..self.rank]
    }

    /// The changes of some columns of a row, in f64: each term is summed in the order of the rank and then scaled, and the
    /// terms are added in order. Products of two f32 are exact. `product` is room for as many.
    #[inline(always)]
    pub(super) fn delta(&self, row: usize, columns: Range<usize>, delta: &mut [f64], product: &mut [f64]) {
        let left = self.left_of(row);
        delta.fill(0.0);
        let mut first = 0;
        for &(r, scale) in &self.terms {
            product.fill(0.0);
            for (rank, &factor) in (first..).zip(&left[first..first + r]) {
                let factor = f64::from(factor);
                let right = &self.right[rank * self.columns..][columns.clone()];
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

    /// The sum of `weight` and its change, in f64: what [`Segment::delta`] makes of one column.
    #[inline(always)]
    pub(super) fn exact(&self, row: usize, column: usize, weight: f32) -> f64 {
        let right = &self.strips()[column / STRIP * self.rank..][..self.rank];
        let place = Strip::place(column % STRIP);
        let mut pairs = iter::zip(self.left_of(row), right);
        let mut delta = 0.0;
        for &(r, scale) in &self.terms {
            let products = pairs.by_ref().take(r).map(|(&left, right)| f64::from(left) * f64::from(right.0[place]));
            delta += scale * products.fold(0.0, |sum, product| sum + product);
        }
        f64::from(weight) + delta
    }

    /// The squared Frobenius norm of the change: the sum over all pairs of ranks of the products of `L^T L` and `R R^T`.
    pub(super) fn squared_norm(&self) -> f64 {
        let mut total = 0.0;
        for first in 0..self.rank {
            for second in 0..=first {
                let rows = self.left.chunks_exact(self.rank);
                let left: f64 = rows.map(|row| f64::from(row[first]) * f64::from(row[second])).sum();
                let [a, b] = [first, second].map(|rank| &self.right[rank * self.columns..][..self.columns]);
                let right: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                let twice = if first == second { 1.0 } else { 2.0 };
                total += twice * self.scales[first] * self.scales[second] * left * right;
            }
        }
        total.max(0.0)
    }
}

/// Tensors that have been read, by file and name: the experts of a weight share theirs.
#[derive(Default)]
struct Known(HashMap<(*const u8, String), Rc<Vec<f32>>>);

impl Known {
    fn floats(&mut self, tensor: &Tensor<'_>) -> Result<Rc<Vec<f32>>> {
        let key = (std::ptr::from_ref(tensor.file).cast(), tensor.info.name.clone());
        if let Some(floats) = self.0.get(&key) {
            return Ok(floats.clone());
        }
        let floats = Rc::new(tensor.read_floats()?);
        self.0.insert(key, floats.clone());
        Ok(floats)
    }
}
