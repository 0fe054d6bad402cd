//! Writing checkpoints.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::thread;

use pyo3::prelude::*;
use qpack_core::merge::{Changes, Norms};
use qpack_core::safetensors::Checkpoint;
use qpack_core::stream::{self, Supply, WeightError};
use qpack_core::{Error, Result, pack as packing};

use crate::change::{Change, opened};
use crate::errors::to_python;
use crate::recipe::{Packing, Recipe, checked, options};
use crate::watch::watch;

#[pyclass(frozen, get_all, module = "qpack._core")]
pub struct Written {
    files: Vec<String>,
    tensor_bytes: u64,
    resumed_bytes: u64,
    digests: BTreeMap<String, String>,
    fingerprint: String,
    source_fingerprint: String,
    errors: BTreeMap<String, (f64, f64, f64, u64)>,
    changes: BTreeMap<String, (f64, f64)>,
}

impl From<stream::Written> for Written {
    fn from(written: stream::Written) -> Self {
        let stream::Written {
            files,
            tensor_bytes,
            resumed_bytes,
            digests,
            fingerprint,
            source_fingerprint,
            errors,
            changes,
        } = written;
        let norms = |(name, Norms { change, weight })| (name, (change, weight));
        Self {
            files,
            tensor_bytes,
            resumed_bytes,
            digests,
            fingerprint,
            source_fingerprint,
            errors: error_tuples(errors),
            changes: changes.into_iter().map(norms).collect(),
        }
    }
}

/// The `fetch` and `drop` of a `qpack.sources.Source`; the files of adapters are there.
struct Source<'a> {
    python: &'a Py<PyAny>,
    changes: &'a Changes,
}

impl Supply for Source<'_> {
    fn fetches(&self) -> bool {
        true
    }

    fn need(&self, file: &Path) -> Result<Option<PathBuf>> {
        if self.changes.reads(file) {
            return Ok(None);
        }
        let fetch = |py: Python<'_>| self.python.call_method1(py, "fetch", (file,))?.extract(py).map(Some);
        Python::attach(fetch).map_err(|error| supply_error(file, error))
    }

    fn done(&self, file: &Path) -> Result<()> {
        if self.changes.reads(file) {
            return Ok(());
        }
        let drop = |py: Python<'_>| self.python.call_method1(py, "drop", (file,)).map(drop);
        Python::attach(drop).map_err(|error| supply_error(file, error))
    }
}

fn supply_error(file: &Path, error: PyErr) -> Error {
    Error::Supply { path: file.to_owned(), source: Box::new(error) }
}

/// Relative error, norm, the worst block's relative error and its index, by weight.
pub fn error_tuples(errors: BTreeMap<String, WeightError>) -> BTreeMap<String, (f64, f64, f64, u64)> {
    let errors = errors.into_iter();
    errors.map(|(name, error)| (name, (error.relative, error.norm, error.worst, error.worst_block))).collect()
}

/// The number of workers that is meant by `threads`: 0 stands for all cores.
pub fn workers(threads: usize) -> usize {
    if threads > 0 { threads } else { thread::available_parallelism().map_or(1, NonZero::get) }
}

#[pyfunction]
#[pyo3(signature = (shards, directory, recipes, *, mode, quant_storage, inputs, max_shard_bytes, threads, source=None, on_progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn pack(
    py: Python<'_>,
    shards: Vec<PathBuf>,
    directory: PathBuf,
    recipes: Vec<Recipe>,
    mode: &str,
    quant_storage: &str,
    inputs: &str,
    max_shard_bytes: u64,
    threads: usize,
    source: Option<Py<PyAny>>,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Written> {
    let changes = BTreeMap::new();
    merge(
        py,
        shards,
        directory,
        recipes,
        changes,
        mode,
        quant_storage,
        inputs,
        max_shard_bytes,
        threads,
        source,
        on_progress,
    )
}

#[pyfunction]
#[pyo3(signature = (shards, recipes, candidates, *, threads, source=None, on_progress=None))]
pub fn measure(
    py: Python<'_>,
    shards: Vec<PathBuf>,
    recipes: Vec<Recipe>,
    candidates: Vec<Packing>,
    threads: usize,
    source: Option<Py<PyAny>>,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<HashMap<String, Vec<f64>>> {
    let recipes = checked(recipes)?;
    let candidates = candidates.into_iter().map(Packing::check).collect::<PyResult<Vec<_>>>()?;
    let checkpoint = py.detach(|| Checkpoint::open(&shards)).map_err(to_python)?;
    let plan = py.detach(|| packing::measure(&checkpoint, &recipes, &candidates)).map_err(to_python)?;
    let total = plan.source_bytes();
    let supply: &dyn Supply = match &source {
        Some(source) => &Source { python: source, changes: Changes::none() },
        None => &(),
    };
    let work = |job: &_| plan.examine(workers(threads), supply, job);
    let found = watch(py, total, on_progress.as_ref(), work)?;
    let mut squares: HashMap<String, Vec<f64>> = HashMap::new();
    for (key, error) in found.errors {
        let (name, index) = key.rsplit_once('\t').expect("a candidate's index");
        let index: usize = index.parse().expect("a number");
        let squares = squares.entry(name.to_owned()).or_insert_with(|| vec![0.0; candidates.len()]);
        squares[index] = (error.relative * error.norm).powi(2);
    }
    Ok(squares)
}

/// Let two directories change names, at once and for whoever looks.
#[pyfunction]
pub fn exchange(one: PathBuf, other: PathBuf) -> PyResult<()> {
    stream::exchange(&one, &other).map_err(to_python)
}

#[pyfunction]
#[pyo3(signature = (shards, recipes, *, quant_storage, max_shard_bytes))]
pub fn plan_pack(
    py: Python<'_>,
    shards: Vec<PathBuf>,
    recipes: Vec<Recipe>,
    quant_storage: &str,
    max_shard_bytes: u64,
) -> PyResult<Vec<(String, u64)>> {
    plan_merge(py, shards, recipes, BTreeMap::new(), quant_storage, max_shard_bytes)
}

#[pyfunction]
#[pyo3(signature = (shards, directory, recipes, changes, *, mode, quant_storage, inputs, max_shard_bytes, threads, source=None, on_progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn merge(
    py: Python<'_>,
    shards: Vec<PathBuf>,
    directory: PathBuf,
    recipes: Vec<Recipe>,
    changes: BTreeMap<String, Change>,
    mode: &str,
    quant_storage: &str,
    inputs: &str,
    max_shard_bytes: u64,
    threads: usize,
    source: Option<Py<PyAny>>,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Written> {
    let options = options(mode, quant_storage)?;
    let recipes = checked(recipes)?;
    let open = || Ok((Checkpoint::open(&shards)?, opened(changes)?));
    let (checkpoint, changes) = py.detach(open).map_err(to_python)?;
    let plan = || packing::plan(&checkpoint, &recipes, &changes, options, max_shard_bytes);
    let plan = py.detach(plan).map_err(to_python)?;
    let total = plan.source_bytes();
    let supply: &dyn Supply = match &source {
        Some(source) => &Source { python: source, changes: &changes },
        None => &(),
    };
    let work = |job: &_| plan.write(&directory, inputs, workers(threads), supply, job);
    watch(py, total, on_progress.as_ref(), work).map(Written::from)
}

#[pyfunction]
#[pyo3(signature = (shards, recipes, changes, *, quant_storage, max_shard_bytes))]
pub fn plan_merge(
    py: Python<'_>,
    shards: Vec<PathBuf>,
    recipes: Vec<Recipe>,
    changes: BTreeMap<String, Change>,
    quant_storage: &str,
    max_shard_bytes: u64,
) -> PyResult<Vec<(String, u64)>> {
    let options = options("exact", quant_storage)?;
    let recipes = checked(recipes)?;
    let files = || {
        let (checkpoint, changes) = (Checkpoint::open(&shards)?, opened(changes)?);
        Ok(packing::plan(&checkpoint, &recipes, &changes, options, max_shard_bytes)?.files())
    };
    py.detach(files).map_err(to_python)
}
