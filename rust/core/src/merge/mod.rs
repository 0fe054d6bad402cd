//! Merging: what an adapter makes of the weights of its base.
//!
//! ```text
//! W' = round(W + sum of scale * L @ R)                 LoRA: Hu et al., arXiv 2106.09685
//! W' = round(m / |W + D| * (W + D))                    DoRA: Liu et al., arXiv 2402.09353; norms by row or by column
//! ```
//!
//! with `W` the weight as f32, decoded where it is packed, and everything behind it in f64, rounded once, to the output's
//! float type: what PEFT 0.21 computes (`tuners/lora/layer.py`, `merge`) if its model is in f64. A [`Change`] says, as
//! data, where an adapter keeps the factors; [`crate::pack`] carries it out on its way from a source to what is made of
//! it. Never back to 4 bits from a packed weight: most codes would round to where they were, and the adapter with them.

mod apply;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffers;
mod factors;
mod fast;
mod lanes;
mod region;
mod round;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::slice;

pub(crate) use apply::Applied;
pub use buffers::{Factors, merge_nf4};
use factors::{ReadView, Segment};
pub(crate) use region::{Codes, ROWS, Values};
use serde::{Deserialize, Serialize};

use crate::safetensors::{Checkpoint, Tensor};
use crate::{Error, Result};

/// A tensor in an adapter's file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Stored {
    /// The safetensors file.
    pub file: PathBuf,
    /// Name of the tensor in it.
    pub name: String,
}

/// A matrix in a tensor: its element (i, j) is number `offset + i * strides[0] + j * strides[1]` of the flattened tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// What holds the elements.
    pub tensor: Stored,
    /// Number of the element (0, 0).
    pub offset: u64,
    /// From row to row, and from column to column.
    pub strides: [u64; 2],
}

/// A change by `scale * left @ right`.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// (rows, r)
    pub left: View,
    /// (r, columns)
    pub right: View,
    /// Columns of `left` and rows of `right`.
    pub r: u64,
    /// What the product is multiplied by.
    pub scale: f64,
    /// The rows of the weight that are changed; None for all.
    pub rows: Option<(u64, u64)>,
}

/// What is done to a weight, seen as a matrix: its last dimension are the columns, all others the rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A sum of low-rank changes is added.
    Sum {
        /// What is added.
        terms: Vec<LowRank>,
        /// `DoRA`'s magnitudes: what the norms of all rows of the sum become.
        magnitude: Option<Stored>,
        /// Whether magnitudes and norms are those of columns.
        by_columns: bool,
        /// The weight that this is added to, where it is not the one of this name, which then must not be there: so what
        /// was tied to another weight gets values of its own.
        of: Option<String>,
    },
    /// Another tensor takes its place.
    Replace(Stored),
    /// Some rows become those of another tensor.
    ReplaceRows {
        /// (rows that are replaced, columns)
        tensor: Stored,
        /// Which rows, in the order of the tensor's.
        rows: Vec<u64>,
    },
}

/// How much a weight was changed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Norms {
    /// Frobenius norm of the change.
    pub change: f64,
    /// Frobenius norm of the weight before.
    pub weight: f64,
}

/// Changes of weights by name, and the files that they come from.
#[derive(Debug)]
pub struct Changes {
    by_name: BTreeMap<String, Change>,
    files: BTreeMap<PathBuf, Checkpoint>,
}

impl Changes {
    /// No changes at all.
    pub fn none() -> &'static Self {
        static NONE: Changes = Changes { by_name: BTreeMap::new(), files: BTreeMap::new() };
        &NONE
    }

    /// Open the files that `by_name` speaks of.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open(by_name: BTreeMap<String, Change>) -> Result<Self> {
        let mut paths = BTreeSet::new();
        for change in by_name.values() {
            change.each_tensor(|tensor| {
                paths.insert(&tensor.file);
            });
        }
        let open = |path: &PathBuf| Ok((path.clone(), Checkpoint::open(slice::from_ref(path))?));
        let files = paths.into_iter().map(open).collect::<Result<_>>()?;
        Ok(Self { by_name, files })
    }

    /// Whether `path` is one of the adapters' files.
    pub fn reads(&self, path: &Path) -> bool {
        self.files.contains_key(path)
    }

    /// The names of the weights that are changed.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The name of the weight that the change of `name` starts from.
    pub(crate) fn origin<'n>(&'n self, name: &'n str) -> &'n str {
        match self.by_name.get(name) {
            Some(Change::Sum { of: Some(of), .. }) => of,
            _ => name,
        }
    }

    /// The tensor that takes the place of the weight `name`, if one does.
    pub(crate) fn replacement(&self, name: &str) -> Result<Option<Tensor<'_>>> {
        match self.by_name.get(name) {
            Some(Change::Replace(stored)) => self.tensor(stored).map(Some),
            _ => Ok(None),
        }
    }

    /// The change of the weight `name` of shape `shape`, checked, if it is one that reads the weight.
    pub(crate) fn open_change(&self, name: &str, shape: &[u64]) -> Result<Option<OpenChange<'_>>> {
        let Some(change) = self.by_name.get(name) else { return Ok(None) };
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<u64>().checked_div(columns).unwrap_or(0);
        let size = [rows, columns];
        let kind = match change {
            Change::Replace(_) => return Ok(None),
            Change::Sum { terms, magnitude, by_columns, .. } => {
                let terms = terms.iter().map(|term| self.open_term(term, name, size)).collect::<Result<_>>()?;
                let magnitude = magnitude.as_ref().map(|stored| self.tensor(stored)).transpose()?;
                if let Some(tensor) = magnitude {
                    let expected = size[usize::from(*by_columns)];
                    if tensor.info.elements() != expected || shape.len() != 2 {
                        let found = tensor.info.elements();
                        return Err(tensor.error(format!("has {found} magnitudes for {name} of shape {shape:?}")));
                    }
                    tensor.float()?;
                }
                Kind::Sum { terms, magnitude, by_columns: *by_columns }
            }
            Change::ReplaceRows { tensor, rows: replaced } => {
                let tensor = self.tensor(tensor)?;
                tensor.float()?;
                let (found, count) = (&tensor.info.shape, replaced.len() as u64);
                if *found != [count, columns] {
                    return Err(tensor.error(format!("has shape {found:?}, expected [{count}, {columns}] for {name}")));
                }
                let distinct: BTreeSet<_> = replaced.iter().collect();
                if distinct.len() != replaced.len() || distinct.last().is_some_and(|&&row| row >= rows) {
                    return Err(tensor.error(format!("replaces rows {replaced:?} of {name}, which has {rows}")));
                }
                Kind::Rows { tensor, rows: replaced }
            }
        };
        Ok(Some(OpenChange { kind, size: size.map(|size| size as usize), name: name.to_owned() }))
    }

    fn open_term(&self, term: &LowRank, name: &str, [rows, columns]: [u64; 2]) -> Result<Term<'_>> {
        let (start, end) = term.rows.unwrap_or((0, rows));
        let left = self.open_view(&term.left, [end.saturating_sub(start), term.r])?;
        if start >= end || end > rows {
            return Err(left.tensor.error(format!("changes rows {start} to {end} of {name}, which has {rows}")));
        }
        let right = self.open_view(&term.right, [term.r, columns])?;
        if term.r == 0 || !term.scale.is_finite() {
            return Err(left.tensor.error(format!("has rank {} and scale {} for {name}", term.r, term.scale)));
        }
        Ok(Term { left, right, scale: term.scale, rows: start as usize..end as usize })
    }

    fn open_view(&self, view: &View, size: [u64; 2]) -> Result<ReadView<'_>> {
        let tensor = self.tensor(&view.tensor)?;
        tensor.float()?;
        ReadView::new(tensor, view.offset, view.strides, size)
    }

    fn tensor(&self, stored: &Stored) -> Result<Tensor<'_>> {
        match self.files.get(&stored.file) {
            Some(file) => file.tensor(&stored.name),
            None => Err(Error::malformed(&stored.file, "was not opened")),
        }
    }
}

impl Change {
    fn each_tensor<'c>(&'c self, mut with: impl FnMut(&'c Stored)) {
        match self {
            Self::Sum { terms, magnitude, .. } => {
                for term in terms {
                    with(&term.left.tensor);
                    with(&term.right.tensor);
                }
                magnitude.iter().for_each(with);
            }
            Self::Replace(tensor) | Self::ReplaceRows { tensor, .. } => with(tensor),
        }
    }
}

/// The change of one weight, its tensors found and checked.
#[derive(Debug)]
pub(crate) struct OpenChange<'a> {
    kind: Kind<'a>,
    /// Rows and columns of the weight.
    size: [usize; 2],
    name: String,
}

#[derive(Debug)]
enum Kind<'a> {
    Sum { terms: Vec<Term<'a>>, magnitude: Option<Tensor<'a>>, by_columns: bool },
    Rows { tensor: Tensor<'a>, rows: &'a [u64] },
}

/// A [`LowRank`] change, its tensors found and checked.
#[derive(Debug)]
struct Term<'a> {
    left: ReadView<'a>,
    right: ReadView<'a>,
    scale: f64,
    rows: Range<usize>,
}

impl OpenChange<'_> {
    /// Read the factors, to apply the change.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn read(&self) -> Result<Applied> {
        let [_, columns] = self.size;
        match &self.kind {
            Kind::Sum { terms, magnitude, by_columns } => {
                let segments = Segment::read_all(terms, columns)?;
                let magnitude = magnitude.map(|tensor| tensor.read_floats()).transpose()?;
                Ok(Applied::sum(self.name.clone(), segments, self.size, magnitude, *by_columns))
            }
            Kind::Rows { tensor, rows } => {
                let rows = rows.iter().map(|&row| row as usize).zip(0..).collect();
                Ok(Applied::rows(self.name.clone(), rows, tensor.read_floats()?, self.size))
            }
        }
    }
}
