//! What safetensors files hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use qpack_core::packed::Packed;
use qpack_core::safetensors::{Checkpoint, File, parse_index};
use qpack_core::{Error, Float, Result, quant_state};

use crate::errors::to_python;

#[pyclass(frozen, get_all, module = "qpack._core")]
pub struct TensorInfo {
    name: String,
    dtype: &'static str,
    bytes: u64,
    shape: Py<PyTuple>,
}

#[pyclass(frozen, get_all, module = "qpack._core")]
pub struct PackedInfo {
    name: String,
    shape: Py<PyTuple>,
    blocksize: usize,
    dtype: &'static str,
    double_quant: bool,
    bytes: u64,
}

#[pyfunction]
pub fn read_header(py: Python<'_>, path: PathBuf) -> PyResult<Vec<TensorInfo>> {
    let file = py.detach(|| File::open(&path)).map_err(to_python)?;
    let tensors = file.tensors().iter();
    tensors
        .map(|tensor| {
            Ok(TensorInfo {
                name: tensor.name.clone(),
                dtype: tensor.dtype.name(),
                bytes: tensor.bytes(),
                shape: PyTuple::new(py, &tensor.shape)?.unbind(),
            })
        })
        .collect()
}

#[pyfunction]
pub fn read_index(path: PathBuf) -> PyResult<BTreeMap<String, String>> {
    let json = fs::read(&path).map_err(|source| to_python(Error::Io { path: path.clone(), source }))?;
    parse_index(&json).map_err(|reason| to_python(Error::Malformed { path, reason }))
}

#[pyfunction]
pub fn read_packed(py: Python<'_>, shards: Vec<PathBuf>) -> PyResult<Vec<PackedInfo>> {
    let packed = py.detach(|| packed_weights(&shards)).map_err(to_python)?;
    packed
        .into_iter()
        .map(|(name, state, bytes)| {
            Ok(PackedInfo {
                name,
                shape: PyTuple::new(py, &state.shape)?.unbind(),
                blocksize: state.blocksize,
                dtype: state.dtype.torch_name(),
                double_quant: state.nested_offset.is_some(),
                bytes,
            })
        })
        .collect()
}

fn packed_weights(shards: &[PathBuf]) -> Result<Vec<(String, quant_state::QuantState, u64)>> {
    let checkpoint = Checkpoint::open(shards)?;
    let names = checkpoint.tensors().filter_map(|tensor| tensor.info.name.strip_suffix(quant_state::STATE));
    names
        .map(|name| {
            let packed = Packed::open(&checkpoint, name)?;
            Ok((name.to_owned(), packed.state().clone(), packed.bytes()))
        })
        .collect()
}

#[pyfunction]
pub fn largest_values(py: Python<'_>, path: PathBuf) -> PyResult<BTreeMap<String, f32>> {
    let measure = || -> Result<BTreeMap<String, f32>> {
        let checkpoint = Checkpoint::open(std::slice::from_ref(&path))?;
        let mut largest = BTreeMap::new();
        for tensor in checkpoint.tensors().filter(|tensor| Float::from_dtype(tensor.info.dtype).is_some()) {
            let name = tensor.info.name.clone();
            let values = tensor.read_floats()?;
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(Error::NonFinite { path: path.clone(), tensor: name, index: index as u64 });
            }
            largest.insert(name, values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs())));
        }
        Ok(largest)
    };
    py.detach(measure).map_err(to_python)
}
