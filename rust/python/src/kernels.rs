//! The arithmetic on buffers. Arrays cross as little-endian bytes, or, in the functions `*_into`, stay where they are: in
//! anything that has the buffer protocol, as numpy arrays and memoryviews do.

use std::ops::Range;
use std::slice;

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use qpack_core::encoded::{fp8, mxfp4};
use qpack_core::merge::{Factors, merge_nf4};
use qpack_core::{Dtype, Float, nested, nf4, search};

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
    check_parts(codes.len(), absmax.len(), elements, blocksize)?;
    PyBytes::new_with(py, elements * dtype.size(), |bytes| {
        py.detach(|| nf4::dequantize_to(dtype, codes, &absmax, blocksize, bytes));
        Ok(())
    })
}

#[pyfunction]
pub fn quantize_nf4_into(
    py: Python<'_>,
    weights: PyBuffer<u8>,
    dtype: &str,
    blocksize: usize,
    mut codes: PyBuffer<u8>,
    mut absmax: PyBuffer<f32>,
) -> PyResult<()> {
    check_blocksize(blocksize)?;
    let float = float(dtype)?;
    check_apart(&[("weights", place(&weights)), ("codes", place(&codes)), ("absmax", place(&absmax))])?;
    let weights = contents("weights", &weights)?;
    let elements = elements(weights, float)?;
    let codes = contents_mut("codes", &mut codes, elements.div_ceil(2))?;
    let absmax = contents_mut("absmax", &mut absmax, elements.div_ceil(blocksize))?;
    py.detach(|| nf4::quantize(weights, float, blocksize, absmax, codes))
        .map_err(|index| PyValueError::new_err(format!("value {index} is not finite")))
}

#[pyfunction]
pub fn dequantize_nf4_into(
    py: Python<'_>,
    codes: PyBuffer<u8>,
    absmax: PyBuffer<f32>,
    dtype: &str,
    blocksize: usize,
    mut weights: PyBuffer<u8>,
) -> PyResult<()> {
    check_blocksize(blocksize)?;
    let float = float(dtype)?;
    check_apart(&[("weights", place(&weights)), ("codes", place(&codes))])?;
    check_apart(&[("weights", place(&weights)), ("absmax", place(&absmax))])?;
    let (codes, absmax) = (contents("codes", &codes)?, contents("absmax", &absmax)?);
    let bytes = weights.item_count();
    let weights = contents_mut("weights", &mut weights, bytes)?;
    let elements = elements(weights, float)?;
    check_parts(codes.len(), absmax.len(), elements, blocksize)?;
    py.detach(|| nf4::dequantize_to(float, codes, absmax, blocksize, weights));
    Ok(())
}

#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "buffers of the caller's")]
pub fn merge_nf4_into(
    py: Python<'_>,
    codes: PyBuffer<u8>,
    absmax: PyBuffer<f32>,
    blocksize: usize,
    left: PyBuffer<f32>,
    right: PyBuffer<f32>,
    r: usize,
    scale: f64,
    dtype: &str,
    mut weights: PyBuffer<u8>,
) -> PyResult<()> {
    check_blocksize(blocksize)?;
    let float = float(dtype)?;
    let inputs =
        [("codes", place(&codes)), ("absmax", place(&absmax)), ("left", place(&left)), ("right", place(&right))];
    for input in inputs {
        check_apart(&[("weights", place(&weights)), input])?;
    }
    let (codes, absmax) = (contents("codes", &codes)?, contents("absmax", &absmax)?);
    let (left, right) = (contents("left", &left)?, contents("right", &right)?);
    for (name, factor) in [("left", left), ("right", right)] {
        if r == 0 || factor.is_empty() || !factor.len().is_multiple_of(r) {
            return Err(PyValueError::new_err(format!(
                "{name} has {} items, which rank {r} does not divide",
                factor.len()
            )));
        }
    }
    let elements = left.len() / r * (right.len() / r);
    let weights = contents_mut("weights", &mut weights, elements * float.size())?;
    check_parts(codes.len(), absmax.len(), elements, blocksize)?;
    let factors = Factors { left, right, r, scale };
    py.detach(|| merge_nf4(codes, absmax, blocksize, factors, float, weights));
    Ok(())
}

/// Refuse codes and scales that are too few or too many for these weights.
fn check_parts(codes: usize, scales: usize, elements: usize, blocksize: usize) -> PyResult<()> {
    if (codes, scales) == (elements.div_ceil(2), elements.div_ceil(blocksize)) {
        return Ok(());
    }
    let reason = format!("{codes} bytes of codes and {scales} scales do not make {elements} weights");
    Err(PyValueError::new_err(reason))
}

/// Addresses of a buffer's bytes.
fn place<T: Element>(buffer: &PyBuffer<T>) -> Range<usize> {
    let start = buffer.buf_ptr().addr();
    start..start + buffer.len_bytes()
}

/// Refuse buffers that share memory.
fn check_apart(buffers: &[(&str, Range<usize>)]) -> PyResult<()> {
    for (index, (name, place)) in buffers.iter().enumerate() {
        for (other, others) in &buffers[..index] {
            if place.start < others.end && others.start < place.end {
                return Err(PyValueError::new_err(format!("{other} and {name} share memory")));
            }
        }
    }
    Ok(())
}

fn check_contiguous<T: Element>(name: &str, buffer: &PyBuffer<T>) -> PyResult<()> {
    if buffer.is_c_contiguous() {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{name} is not contiguous")))
}

/// What a buffer holds.
#[allow(unsafe_code, reason = "Python's buffers are memory by address")]
fn contents<'a, T: Element>(name: &str, buffer: &'a PyBuffer<T>) -> PyResult<&'a [T]> {
    check_contiguous(name, buffer)?;
    if buffer.item_count() == 0 {
        return Ok(&[]);
    }
    // SAFETY: contiguous, aligned for T and held by `buffer`, as PyBuffer::get has checked. That nobody writes to it
    // meanwhile is the caller's to see to, as everywhere in Python where the GIL is released.
    Ok(unsafe { slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.item_count()) })
}

/// What a buffer of `count` items, which is to be written, holds.
#[allow(unsafe_code, reason = "Python's buffers are memory by address")]
fn contents_mut<'a, T: Element>(name: &str, buffer: &'a mut PyBuffer<T>, count: usize) -> PyResult<&'a mut [T]> {
    check_contiguous(name, buffer)?;
    if buffer.readonly() {
        return Err(PyValueError::new_err(format!("{name} is read-only")));
    }
    if buffer.item_count() != count {
        return Err(PyValueError::new_err(format!("{name} has {} items, expected {count}", buffer.item_count())));
    }
    if count == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as above; writable, and apart from all other buffers of the call, as check_apart has found.
    Ok(unsafe { slice::from_raw_parts_mut(buffer.buf_ptr().cast(), count) })
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
pub fn dequantize_nested_into(
    py: Python<'_>,
    codes: PyBuffer<u8>,
    absmax: PyBuffer<f32>,
    quant_map: PyBuffer<f32>,
    offset: f32,
    mut scales: PyBuffer<f32>,
) -> PyResult<()> {
    let inputs = [("codes", place(&codes)), ("absmax", place(&absmax)), ("quant_map", place(&quant_map))];
    for input in inputs {
        check_apart(&[("scales", place(&scales)), input])?;
    }
    let (codes, absmax) = (contents("codes", &codes)?, contents("absmax", &absmax)?);
    let levels = contents("quant_map", &quant_map)?;
    let levels = levels
        .try_into()
        .map_err(|_| PyValueError::new_err(format!("quant_map has {} items, expected 256", levels.len())))?;
    if absmax.len() as u64 != nested::blocks(codes.len() as u64) {
        let reason = format!("{} second-level scales do not belong to {} scales", absmax.len(), codes.len());
        return Err(PyValueError::new_err(reason));
    }
    let scales = contents_mut("scales", &mut scales, codes.len())?;
    py.detach(|| nested::dequantize_into(codes, absmax, levels, offset, scales));
    Ok(())
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
