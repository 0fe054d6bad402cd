//! The changes of `qpack/adapters/changes.py`, from Python's dataclasses to those of the core.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::prelude::*;
use qpack_core::Result;
use qpack_core::merge::{self, Changes};

/// One of `qpack.adapters.changes`, told by its fields.
#[derive(FromPyObject)]
pub enum Change {
    Sum { terms: Vec<LowRank>, magnitude: Option<Stored>, by_columns: bool, of: Option<String> },
    ReplaceRows { tensor: Stored, rows: Vec<u64> },
    Replace { tensor: Stored },
}

/// `qpack.adapters.changes.Stored`
#[derive(FromPyObject)]
pub struct Stored {
    file: PathBuf,
    name: String,
}

/// `qpack.adapters.changes.View`
#[derive(FromPyObject)]
struct View {
    tensor: Stored,
    strides: [u64; 2],
    offset: u64,
}

/// `qpack.adapters.changes.LowRank`
#[derive(FromPyObject)]
pub struct LowRank {
    left: View,
    right: View,
    r: u64,
    scale: f64,
    rows: Option<(u64, u64)>,
}

/// The changes, their files opened.
pub fn opened(changes: BTreeMap<String, Change>) -> Result<Changes> {
    Changes::open(changes.into_iter().map(|(name, change)| (name, change.into())).collect())
}

impl From<Change> for merge::Change {
    fn from(change: Change) -> Self {
        match change {
            Change::Sum { terms, magnitude, by_columns, of } => Self::Sum {
                terms: terms.into_iter().map(merge::LowRank::from).collect(),
                magnitude: magnitude.map(merge::Stored::from),
                by_columns,
                of,
            },
            Change::ReplaceRows { tensor, rows } => Self::ReplaceRows { tensor: tensor.into(), rows },
            Change::Replace { tensor } => Self::Replace(tensor.into()),
        }
    }
}

impl From<Stored> for merge::Stored {
    fn from(Stored { file, name }: Stored) -> Self {
        Self { file, name }
    }
}

impl From<View> for merge::View {
    fn from(View { tensor, strides, offset }: View) -> Self {
        Self { tensor: tensor.into(), offset, strides }
    }
}

impl From<LowRank> for merge::LowRank {
    fn from(LowRank { left, right, r, scale, rows }: LowRank) -> Self {
        Self { left: left.into(), right: right.into(), r, scale, rows }
    }
}
