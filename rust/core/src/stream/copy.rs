//! Tensors that are written as they are.

use std::ops::Range;

use super::{CHUNK, Recipe, Run, Sink};
use crate::Result;
use crate::safetensors::{Tensor, TensorSpec};

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
        Ok(Box::new(CopyRun))
    }
}

/// `total` bytes, `step` at a time.
fn copy_chunks(total: u64, step: u64) -> Vec<Range<u64>> {
    (0..total.div_ceil(step)).map(|chunk| chunk * step..(chunk * step + step).min(total)).collect()
}

struct CopyRun;

impl Run for CopyRun {
    fn chunk(&self, chunk: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Vec<usize>> {
        sink.write_at(0, chunk as u64 * COPY_CHUNK, bytes)?;
        Ok(Vec::new())
    }

    fn is_copy(&self) -> bool {
        true
    }
}
