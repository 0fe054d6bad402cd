//! Digests, comparisons and statistics of what is stored.

use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qpack_core::compare::{Distance, Found};
use qpack_core::digest::Fingerprint;
use qpack_core::safetensors::{Checkpoint, File};
use qpack_core::{Dtype, Error, Result, compare, statistics, verify};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::errors::to_python;
use crate::watch::watch;

/// Threads to share the work of one call; 0 takes all cores.
fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().expect("the system gives threads")
}

#[pyfunction]
#[pyo3(signature = (paths, *, threads=0, on_progress=None))]
pub fn digest_tensors(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    threads: usize,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Vec<(PathBuf, String, String)>> {
    let open = || paths.iter().map(|path| File::open(path)).collect::<Result<Vec<_>>>();
    let files = py.detach(open).map_err(to_python)?;
    let total = files.iter().flat_map(File::tensors).map(qpack_core::safetensors::TensorInfo::bytes).sum();
    let digests = watch(py, total, on_progress.as_ref(), |job| pool(threads).install(|| verify::digests(&files, job)))?;
    let digests = digests.into_iter();
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
#[derive(Default)]
pub struct Comparison {
    name: String,
    packed: bool,
    relative: f64,
    worst: f64,
    worst_block: u64,
    first_difference: Option<u64>,
    problem: Option<String>,
}

/// What was found of the weight `name`; a pair that cannot be compared is a finding too.
fn comparison(name: String, found: Result<Found>) -> Result<Comparison> {
    Ok(match found {
        Ok(Found::Packed(Distance { relative, worst, worst_block })) => {
            Comparison { name, packed: true, relative, worst, worst_block, ..Comparison::default() }
        }
        Ok(Found::Kept(first_difference)) => Comparison { name, first_difference, ..Comparison::default() },
        Err(error @ Error::Malformed { .. }) => {
            Comparison { name, problem: Some(error.to_string()), ..Comparison::default() }
        }
        Err(error) => return Err(error),
    })
}

#[pyfunction]
#[pyo3(signature = (paths, sources, pairs, *, threads=0, on_progress=None))]
pub fn compare_packed(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    sources: Vec<PathBuf>,
    pairs: Vec<(String, String)>,
    threads: usize,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Comparison>> {
    let open = || Ok((Checkpoint::open(&paths)?, Checkpoint::open(&sources)?));
    let (stored, originals) = py.detach(open).map_err(to_python)?;
    let pairs = pairs.into_iter().map(|(name, source)| Ok((name, originals.tensor(&source)?)));
    let pairs = pairs.collect::<Result<Vec<_>>>().map_err(to_python)?;
    let total = pairs.iter().map(|(_, original)| original.info.bytes()).sum();
    watch(py, total, on_progress.as_ref(), |job| {
        let found = pairs.par_iter();
        let found =
            found.map(|(name, original)| comparison(name.clone(), compare::compare(&stored, name, *original, job)));
        pool(threads).install(|| found.collect())
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
