//! Errors of the core as Python exceptions.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::{PyTypeInfo, import_exception};
use qpack_core::Error;

import_exception!(qpack.errors, CheckpointError);

/// `CheckpointError` for a bad file; `OSError` with errno and filename where the operating system refused.
pub fn to_python(error: Error) -> PyErr {
    match error {
        Error::Io { path, source } => match source.raw_os_error() {
            // Called with these arguments, OSError picks its own subclass (FileNotFoundError, PermissionError, ...).
            Some(code) => Python::attach(|py| {
                let strerror = source.to_string();
                let strerror = strerror.split(" (os error").next().unwrap_or_default();
                match PyOSError::type_object(py).call1((code, strerror, path)) {
                    Ok(exception) => PyErr::from_value(exception),
                    Err(failure) => failure,
                }
            }),
            None => CheckpointError::new_err(format!("{}: {source}", path.display())),
        },
        // An exception of Python's own goes back as it came.
        Error::Supply { path, source } => match source.downcast::<PyErr>() {
            Ok(exception) => *exception,
            Err(source) => CheckpointError::new_err(format!("{}: {source}", path.display())),
        },
        other => CheckpointError::new_err(other.to_string()),
    }
}
