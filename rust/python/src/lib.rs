//! `qpack._core`: the binding. It translates arguments, releases the GIL, maps errors and reports progress; what it
//! exports is described in `qpack/_core.pyi`.

#![allow(missing_docs, reason = "documented where Python reads it, in qpack/_core.pyi")]
#![allow(clippy::needless_pass_by_value, reason = "pyo3 hands arguments over by value")]

mod change;
mod errors;
mod kernels;
mod read;
mod recipe;
mod verify;
mod watch;
mod write;

#[pyo3::pymodule]
mod _core {
    use pyo3::exceptions::PyValueError;
    use pyo3::prelude::*;
    use pyo3::types::PyTuple;
    use qpack_core::{Isa, nf4, quant_state};

    #[pymodule_export]
    use crate::kernels::{
        decode_fp8, decode_mxfp4, dequantize_nested_into, dequantize_nf4, dequantize_nf4_into, merge_nf4_into,
        nested_quant_map, quantize_nested, quantize_nf4, quantize_nf4_best, quantize_nf4_into,
    };
    #[pymodule_export]
    use crate::read::{PackedInfo, TensorInfo, largest_values, read_header, read_index, read_packed};
    #[pymodule_export]
    use crate::verify::{
        Comparison, WeightStatistics, broken_weights, compare_packed, digest_tensors, fingerprint, weight_statistics,
    };
    #[pymodule_export]
    use crate::write::{Written, exchange, measure, merge, pack, plan_merge, plan_pack};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let isa = Isa::limit().map(|_| Isa::current().name()).map_err(PyValueError::new_err)?;
        module.add("ISA", isa)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("BLOCKSIZES", PyTuple::new(module.py(), nf4::BLOCKSIZES)?)?;
        module.add("LEVELS", PyTuple::new(module.py(), nf4::LEVELS)?)?;
        let suffixes = [quant_state::ABSMAX, quant_state::QUANT_MAP, quant_state::NESTED_ABSMAX];
        let suffixes = suffixes.into_iter().chain([quant_state::NESTED_QUANT_MAP, quant_state::STATE]);
        module.add("SUFFIXES", PyTuple::new(module.py(), suffixes.collect::<Vec<_>>())?)
    }
}
