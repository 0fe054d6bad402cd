//! Writing checkpoints.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::slice;

use pyo3::prelude::*;
use qpack_core::merge::FactorNames;
use qpack_core::pack::Options;
use qpack_core::safetensors::Checkpoint;
use qpack_core::stream;

use crate::errors::to_python;
use crate::kernels::{check_blocksize, float};
use crate::watch::watch;

#[pyclass(frozen, get_all, module = "qpack._core")]
pub struct Written {
    files: Vec<String>,
    tensor_bytes: u64,
}

impl From<stream::Written> for Written {
    fn from(written: stream::Written) -> Self {
        Self { files: written.files, tensor_bytes: written.tensor_bytes }
    }
}

#[pyfunction]
#[pyo3(signature = (shards, directory, weights, *, blocksize, double_quant, max_shard_bytes, threads, on_progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn pack(
    py: Python<'_>,
    shards: Vec<PathBuf>,
    directory: PathBuf,
    weights: HashSet<String>,
    blocksize: usize,
    double_quant: bool,
    max_shard_bytes: u64,
    threads: usize,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Written> {
    check_blocksize(blocksize)?;
    let options = Options { blocksize, double_quant };
    let checkpoint = py.detach(|| Checkpoint::open(&shards)).map_err(to_python)?;
    let plan = qpack_core::pack::plan(&checkpoint, &weights, options, max_shard_bytes).map_err(to_python)?;
    let work = |job: &_| plan.write(&directory, job);
    watch(py, threads, plan.source_bytes(), on_progress.as_ref(), work).map(Written::from)
}

#[pyfunction]
#[pyo3(signature = (shards, adapter, directory, deltas, *, dtype, max_shard_bytes, threads, on_progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn merge(
    py: Python<'_>,
    shards: Vec<PathBuf>,
    adapter: PathBuf,
    directory: PathBuf,
    deltas: HashMap<String, (String, String, f32)>,
    dtype: &str,
    max_shard_bytes: u64,
    threads: usize,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Written> {
    let to = float(dtype)?;
    let factors = deltas.into_iter().map(|(name, (a, b, scale))| (name, FactorNames { a, b, scale })).collect();
    let open = || Ok((Checkpoint::open(&shards)?, Checkpoint::open(slice::from_ref(&adapter))?));
    let (base, adapter) = py.detach(open).map_err(to_python)?;
    let plan =
        py.detach(|| qpack_core::merge::plan(&base, &adapter, &factors, to, max_shard_bytes)).map_err(to_python)?;
    let work = |job: &_| plan.write(&directory, job);
    watch(py, threads, plan.source_bytes(), on_progress.as_ref(), work).map(Written::from)
}
