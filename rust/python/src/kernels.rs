//! The arithmetic on buffers, for parity tests and small tools. Arrays cross as little-endian bytes.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use qpack_core::encoded::{fp8, mxfp4};
use qpack_core::{Dtype, Float, nested, nf4};

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

#[pyfunction]
pub fn decode_fp8<'py>(
    py: Python<'py>,
    codes: &[u8],
    scales: &[u8],
    scale_dtype: &str,
    shape: Vec<u64>,
    block: Option<[u64; 2]>,
) -> PyResult<Bound<'py, PyBytes>> {
    let dtype = || Dtype::parse(scale_dtype).ok_or_else(|| format!("no dtype {scale_dtype}"));
    let scales = fp8::Grid::new(&shape, block).and_then(|grid| fp8::Scales::new(scales, dtype()?, grid));
    let scales = scales.map_err(PyValueError::new_err)?;
    if codes.len() as u64 != shape.iter().product::<u64>() {
        let reason = format!("{} bytes are no weight of shape {shape:?}", codes.len());
        return Err(PyValueError::new_err(reason));
    }
    PyBytes::new_with(py, 2 * codes.len(), |bytes| {
        py.detach(|| scales.decode_rows(codes, 0, bytes));
        Ok(())
    })
}

#[pyfunction]
pub fn decode_mxfp4<'py>(py: Python<'py>, blocks: &[u8], scales: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    if blocks.len() != scales.len() * mxfp4::GROUP / 2 {
        let reason = format!("{} bytes of blocks do not belong to {} scales", blocks.len(), scales.len());
        return Err(PyValueError::new_err(reason));
    }
    PyBytes::new_with(py, 4 * blocks.len(), |bytes| {
        py.detach(|| mxfp4::decode(blocks, scales, bytes));
        Ok(())
    })
}
