//! The arithmetic on buffers, for parity tests and small tools. Arrays cross as little-endian bytes.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use qpack_core::{Float, nested, nf4, search};

/// The float type that torch gives this name.
pub fn float(dtype: &str) -> PyResult<Float> {
    let reason = || PyValueError::new_err(format!("dtype is '{dtype}', expected bfloat16, float16 or float32"));
    Float::from_torch_name(dtype).ok_or_else(reason)
}

/// Refuse a blocksize that bitsandbytes does not know.
pub fn check_blocksize(blocksize: usize) -> PyResult<()> {
    if nf4::BLOCKSIZES.contains(&blocksize) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("blocksize is {blocksize}, expected one of {:?}", nf4::BLOCKSIZES)))
}

fn elements(bytes: &[u8], float: Float) -> PyResult<usize> {
    if bytes.len().is_multiple_of(float.size()) {
        return Ok(bytes.len() / float.size());
    }
    let reason = format!("{} bytes are no whole number of {} values", bytes.len(), float.torch_name());
    Err(PyValueError::new_err(reason))
}

fn floats(bytes: &[u8]) -> PyResult<Vec<f32>> {
    let mut values = vec![0.0; elements(bytes, Float::F32)?];
    Float::F32.decode(bytes, &mut values);
    Ok(values)
}

fn bytes<'py>(py: Python<'py>, values: &[f32], float: Float) -> Bound<'py, PyBytes> {
    let mut bytes = vec![0; values.len() * float.size()];
    float.encode(values, &mut bytes);
    PyBytes::new(py, &bytes)
}

#[pyfunction]
pub fn quantize_nf4<'py>(
    py: Python<'py>,
    weights: &[u8],
    dtype: &str,
    blocksize: usize,
) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
    check_blocksize(blocksize)?;
    let float = float(dtype)?;
    let elements = elements(weights, float)?;
    let mut absmax = vec![0.0; elements.div_ceil(blocksize)];
    let mut codes = vec![0; elements.div_ceil(2)];
    py.detach(|| nf4::quantize(weights, float, blocksize, &mut absmax, &mut codes))
        .map_err(|index| PyValueError::new_err(format!("value {index} is not finite")))?;
    Ok((PyBytes::new(py, &codes), bytes(py, &absmax, Float::F32)))
}

/// Codes, scales or their nested codes, second-level scales, map and offset; the last three without double quantization
/// are empty, empty and 0.
type Best<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>, f32);

#[pyfunction]
pub fn quantize_nf4_best<'py>(
    py: Python<'py>,
    weights: &[u8],
    dtype: &str,
    blocksize: usize,
    double_quant: bool,
) -> PyResult<Best<'py>> {
    check_blocksize(blocksize)?;
    let float = float(dtype)?;
    elements(weights, float)?;
    let packed = py
        .detach(|| search::quantize(weights, float, blocksize, double_quant))
        .map_err(|index| PyValueError::new_err(format!("value {index} is not finite")))?;
    let codes = PyBytes::new(py, &packed.codes);
    Ok(match packed.nested {
        None => (codes, bytes(py, &packed.scales, Float::F32), PyBytes::new(py, &[]), PyBytes::new(py, &[]), 0.0),
        Some((nested, levels)) => {
            let (absmax, levels) = (bytes(py, &nested.absmax, Float::F32), bytes(py, &levels, Float::F32));
            (codes, PyBytes::new(py, &nested.codes), absmax, levels, nested.offset)
        }
    })
}

#[pyfunction]
pub fn dequantize_nf4<'py>(
    py: Python<'py>,
    codes: &[u8],
    absmax: &[u8],
    elements: usize,
    dtype: &str,
    blocksize: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    check_blocksize(blocksize)?;
    let dtype = float(dtype)?;
    let absmax = floats(absmax)?;
    if (codes.len(), absmax.len()) != (elements.div_ceil(2), elements.div_ceil(blocksize)) {
        let (codes, scales) = (codes.len(), absmax.len());
        let reason = format!("{codes} bytes of codes and {scales} scales do not make {elements} weights");
        return Err(PyValueError::new_err(reason));
    }
    PyBytes::new_with(py, elements * dtype.size(), |bytes| {
        py.detach(|| nf4::dequantize_to(dtype, codes, &absmax, blocksize, bytes));
        Ok(())
    })
}

#[pyfunction]
#[pyo3(signature = (absmax, offset=None))]
pub fn quantize_nested<'py>(
    py: Python<'py>,
    absmax: &[u8],
    offset: Option<f32>,
) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>, f32)> {
    let absmax = floats(absmax)?;
    let nested = nested::quantize(&absmax, offset.unwrap_or_else(|| nested::offset(&absmax)));
    Ok((PyBytes::new(py, &nested.codes), bytes(py, &nested.absmax, Float::F32), nested.offset))
}

#[pyfunction]
pub fn nested_quant_map(py: Python<'_>) -> Bound<'_, PyBytes> {
    bytes(py, &*nested::QUANT_MAP, Float::F32)
}
