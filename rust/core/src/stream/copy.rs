//! Tensors that are written as they are. Of floats all values must be finite.

use std::ops::Range;

use super::{CHUNK, Recipe, Run, Sink};
use crate::safetensors::{Tensor, TensorSpec};
use crate::{Float, Result};

/// Bytes that are copied at a time.
const COPY_CHUNK: u64 = 2 * CHUNK as u64;

/// A tensor written as it is, whatever its dtype.
#[derive(Debug)]
pub struct Copy<'a> {
    source: Tensor<'a>,
    name: String,
}

impl<'a> Copy<'a> {
    /// A recipe that writes `source` as it is, under the name `name`.
    pub fn new(source: Tensor<'a>, name: String) -> Self {
        Self { source, name }
    }
}

impl Recipe for Copy<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        vec![TensorSpec { name: self.name.clone(), ..self.source.spec() }]
    }

    fn source(&self) -> Tensor<'_> {
        self.source
    }

    fn chunks(&self) -> Vec<Range<u64>> {
        copy_chunks(self.source.info.bytes(), COPY_CHUNK)
    }

    fn start(&self) -> Result<Box<dyn Run + '_>> {
        Ok(Box::new(self))
    }
}

/// `total` bytes, `step` at a time.
fn copy_chunks(total: u64, step: u64) -> Vec<Range<u64>> {
    (0..total.div_ceil(step)).map(|chunk| chunk * step..(chunk * step + step).min(total)).collect()
}

impl Run for &Copy<'_> {
    fn chunk(&self, chunk: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Vec<usize>> {
        let offset = chunk as u64 * COPY_CHUNK;
        let info = self.source.info;
        if let Some(index) = Float::from_dtype(info.dtype).and_then(|float| float.first_non_finite(bytes)) {
            return Err(self.source.non_finite(&info.name, offset / info.dtype.size() + index as u64));
        }
        sink.write_at(0, offset, bytes)?;
        Ok(Vec::new())
    }

    fn is_copy(&self) -> bool {
        true
    }
}
