//! Tensors that keep their values: written as they are, or in another float type.

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
    /// A recipe that writes `source` as it is.
    pub fn new(source: Tensor<'a>) -> Self {
        Self::renamed(source, source.info.name.clone())
    }

    /// A recipe that writes `source` under another name.
    pub fn renamed(source: Tensor<'a>, name: String) -> Self {
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
    fn chunk(&self, chunk: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Range<usize>> {
        sink.write_at(0, chunk as u64 * COPY_CHUNK, bytes)?;
        Ok(0..0)
    }

    fn is_copy(&self) -> bool {
        true
    }
}

/// A tensor of floats written in another float type, each value rounded once.
#[derive(Debug)]
pub struct Cast<'a> {
    source: Tensor<'a>,
    from: Float,
    to: Float,
}

impl<'a> Cast<'a> {
    /// A recipe that writes `source` as `to`.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] if the source is not BF16, F16 or F32.
    pub fn new(source: Tensor<'a>, to: Float) -> Result<Self> {
        Ok(Self { from: source.float()?, source, to })
    }
}

impl Recipe for Cast<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        vec![TensorSpec { dtype: self.to.dtype(), ..self.source.spec() }]
    }

    fn source(&self) -> Tensor<'_> {
        self.source
    }

    fn chunks(&self) -> Vec<Range<u64>> {
        copy_chunks(self.source.info.bytes(), (CHUNK * self.from.size()) as u64)
    }

    fn start(&self) -> Result<Box<dyn Run + '_>> {
        Ok(Box::new(self))
    }
}

impl Run for &Cast<'_> {
    fn chunk(&self, chunk: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Range<usize>> {
        let written = self.from.convert(bytes, self.to);
        sink.write_at(0, (chunk * CHUNK * self.to.size()) as u64, &written)?;
        Ok(0..0)
    }

    fn is_copy(&self) -> bool {
        self.from == self.to
    }
}
