//! The plan of `qpack/policy/plan.py`, from Python's dataclasses to those of the core.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qpack_core::pack::{self, Mode, Options};
use qpack_core::{Dtype, Float};

use crate::kernels::{check_blocksize, float};

/// `qpack.policy.plan.Recipe`
#[derive(FromPyObject)]
pub struct Recipe {
    source: String,
    scale: Option<String>,
    block: Option<[u64; 2]>,
    parts: Vec<Part>,
}

/// `qpack.policy.plan.Part`
#[derive(FromPyObject)]
struct Part {
    name: String,
    shape: Vec<u64>,
    packing: Option<Packing>,
    dtype: Option<String>,
    matrix: u64,
    rows: (u64, u64),
    transpose: bool,
}

/// `qpack.policy.plan.Packing`
#[derive(FromPyObject)]
pub struct Packing {
    blocksize: usize,
    double_quant: bool,
}

/// The recipes, with every name and number that the core does not check itself.
pub fn checked(recipes: Vec<Recipe>) -> PyResult<Vec<pack::Recipe>> {
    recipes.into_iter().map(Recipe::check).collect()
}

impl Recipe {
    fn check(self) -> PyResult<pack::Recipe> {
        let parts = self.parts.into_iter().map(Part::check).collect::<PyResult<_>>()?;
        Ok(pack::Recipe { source: self.source, scale: self.scale, block: self.block, parts })
    }
}

impl Packing {
    /// The same, with a legal blocksize.
    pub fn check(self) -> PyResult<pack::Packing> {
        check_blocksize(self.blocksize)?;
        Ok(pack::Packing { blocksize: self.blocksize, double_quant: self.double_quant })
    }
}

impl Part {
    fn check(self) -> PyResult<pack::Part> {
        let packing = self.packing.map(Packing::check);
        Ok(pack::Part {
            name: self.name,
            shape: self.shape,
            packing: packing.transpose()?,
            keep_as: self.dtype.as_deref().map(float).transpose()?,
            matrix: self.matrix,
            rows: self.rows,
            transpose: self.transpose,
        })
    }
}

/// How all weights are packed, by the names that Python uses.
pub fn options(mode: &str, storage: &str) -> PyResult<Options> {
    let mode = match mode {
        "exact" => Mode::Exact,
        "best" => Mode::Best,
        other => return Err(PyValueError::new_err(format!("mode is '{other}', expected exact or best"))),
    };
    let storage = match storage {
        "uint8" => Dtype::U8,
        other => Float::from_torch_name(other).map(Float::dtype).ok_or_else(|| {
            let expected = "expected uint8, bfloat16, float16 or float32";
            PyValueError::new_err(format!("quant_storage is '{other}', {expected}"))
        })?,
    };
    Ok(Options { mode, storage })
}
