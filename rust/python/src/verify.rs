//! Digests, comparisons and statistics of what is stored.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qpack_core::digest::Fingerprint;
use qpack_core::safetensors::{Checkpoint, File, Tensor};
use qpack_core::{Dtype, Error, Job, Result, pack, statistics, verify};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::errors::to_python;
use crate::recipe::{Recipe, checked};
use crate::watch::watch;
use crate::write::{error_tuples, workers};

/// Threads to share the work of one call; 0 takes all cores.
fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().expect("the system gives threads")
}

#[pyfunction]
#[pyo3(signature = (paths, *, names=None, threads=0, on_progress=None))]
pub fn digest_tensors(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    names: Option<BTreeSet<String>>,
    threads: usize,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Vec<(PathBuf, String, String)>> {
    let open = || paths.iter().map(|path| File::open(path)).collect::<Result<Vec<_>>>();
    let files = py.detach(open).map_err(to_python)?;
    let tensors = files.iter().flat_map(|file| file.tensors().iter().map(move |info| Tensor { file, info }));
    let tensors: Vec<_> =
        tensors.filter(|tensor| names.as_ref().is_none_or(|names| names.contains(&tensor.info.name))).collect();
    let total = tensors.iter().map(|tensor| tensor.info.bytes()).sum();
    let digests = |job: &Job| pool(threads).install(|| verify::digests(tensors, job));
    let digests = watch(py, total, on_progress.as_ref(), digests)?.into_iter();
    Ok(digests.map(|(tensor, digest)| (tensor.file.path().to_owned(), tensor.info.name.clone(), digest)).collect())
}

#[pyfunction]
pub fn fingerprint(tensors: Vec<(String, String, Vec<u64>, String)>) -> PyResult<String> {
    let mut fingerprint = Fingerprint::default();
    for (name, dtype, shape, digest) in tensors {
        let unknown = || PyValueError::new_err(format!("tensor {name} has unknown dtype '{dtype}'"));
        fingerprint.add(&name, Dtype::parse(&dtype).ok_or_else(unknown)?, &shape, &digest);
    }
    Ok(fingerprint.finish())
}

#[pyfunction]
pub fn broken_weights(py: Python<'_>, paths: Vec<PathBuf>) -> PyResult<Vec<(String, PathBuf, String)>> {
    let broken = py.detach(|| verify::broken(&Checkpoint::open(&paths)?)).map_err(to_python)?;
    let broken = broken.into_iter().map(|broken| match broken.error {
        Error::Malformed { path, reason } => Ok((broken.weight, path, reason)),
        other => Err(to_python(other)),
    });
    broken.collect()
}

#[pyclass(frozen, get_all, module = "qpack._core")]
pub struct Comparison {
    errors: BTreeMap<String, (f64, f64, f64, u64)>,
    differences: BTreeMap<String, u64>,
    problems: BTreeMap<String, String>,
    source_fingerprint: String,
}

#[pyfunction]
#[pyo3(signature = (paths, sources, recipes, *, threads=0, on_progress=None))]
pub fn compare_packed(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    sources: Vec<PathBuf>,
    recipes: Vec<Recipe>,
    threads: usize,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Comparison> {
    let recipes = checked(recipes)?;
    let open = || Ok((Checkpoint::open(&paths)?, Checkpoint::open(&sources)?));
    let (stored, originals) = py.detach(open).map_err(to_python)?;
    let differences = Mutex::default();
    let compare = || pack::compare(&stored, &originals, &recipes, &differences);
    let plan = py.detach(compare).map_err(to_python)?;
    let total = plan.source_bytes();
    let work = |job: &_| plan.examine(workers(threads), &(), job);
    let found = watch(py, total, on_progress.as_ref(), work)?;
    let pack::Differences { kept, problems } = differences.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Comparison {
        errors: error_tuples(found.errors),
        differences: kept,
        problems,
        source_fingerprint: found.source_fingerprint,
    })
}

#[pyclass(frozen, get_all, module = "qpack._core")]
pub struct WeightStatistics {
    codes: [u64; 16],
    smallest: f32,
    mean: f64,
    largest: f32,
    negative: u64,
}

#[pyfunction]
pub fn weight_statistics(py: Python<'_>, paths: Vec<PathBuf>, name: &str) -> PyResult<WeightStatistics> {
    let checkpoint = py.detach(|| Checkpoint::open(&paths)).map_err(to_python)?;
    let total = checkpoint.tensor(name).map_err(to_python)?.info.bytes();
    let found = watch(py, total, None, |job| statistics::of(&checkpoint, name, job))?;
    let statistics::Statistics { codes, smallest, mean, largest, negative } = found;
    Ok(WeightStatistics { codes, smallest, mean, largest, negative })
}
