//! One weight being packed: codes chunk by chunk; scales, error and quant state when all of them have been seen.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::{Mode, Options};
use crate::nf4::{self, Moments};
use crate::quant_state::QuantState;
use crate::stream::{Sink, WeightError};
use crate::{Error, Result, nested};

pub(super) struct Weight<'p> {
    name: &'p str,
    state: &'p QuantState,
    options: Options,
    /// Index of the codes among the recipe's outputs; the rest follows, in the order of [`QuantState::tensors`].
    output: usize,
    /// The recipe's chunks that hold this weight.
    chunks: Range<usize>,
    /// Chunks that have not come yet.
    left: AtomicUsize,
    blocks: Mutex<Blocks>,
    error: OnceLock<WeightError>,
}

/// What is known of every block.
#[derive(Default)]
struct Blocks {
    scales: Vec<f32>,
    moments: Vec<Moments>,
}

impl<'p> Weight<'p> {
    pub(super) fn new(
        name: &'p str,
        state: &'p QuantState,
        options: Options,
        output: usize,
        chunks: Range<usize>,
    ) -> Self {
        let left = AtomicUsize::new(chunks.len());
        Self { name, state, options, output, chunks, left, blocks: Mutex::default(), error: OnceLock::new() }
    }

    pub(super) fn name(&self) -> &str {
        self.name
    }

    /// How far the packed weight is from its source; known when all chunks have been seen.
    pub(super) fn error(&self) -> WeightError {
        *self.error.get().expect("all chunks have been seen")
    }

    /// Pack the elements from number `first` on, which are a chunk. Returns the chunks that have to come once more.
    pub(super) fn put(
        &self,
        first: u64,
        bytes: &[u8],
        sink: &Sink<'_>,
        non_finite: impl Fn(u64) -> Error,
    ) -> Result<Range<usize>> {
        let QuantState { blocksize, dtype, .. } = *self.state;
        let elements = bytes.len() / dtype.size();
        let mut codes = vec![0; elements.div_ceil(2)];
        let mut scales = vec![0.0; elements.div_ceil(blocksize)];
        let mut moments = vec![Moments::default(); scales.len()];
        match self.options.mode {
            Mode::Exact => {
                nf4::quantize(bytes, dtype, blocksize, &mut scales, &mut codes)
                    .map_err(|index| non_finite(first + index as u64))?;
                nf4::moments(bytes, dtype, &codes, blocksize, &mut moments);
                sink.write_at(self.output, first / 2, &codes)?;
            }
        }
        let block = (first / blocksize as u64) as usize;
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let Blocks { scales: all_scales, moments: all_moments } = &mut *blocks;
        let total = nf4::blocks(self.state.elements(), blocksize) as usize;
        all_scales.resize(total, 0.0);
        all_moments.resize(total, Moments::default());
        all_scales[block..][..scales.len()].copy_from_slice(&scales);
        all_moments[block..][..moments.len()].copy_from_slice(&moments);
        drop(blocks);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish(sink)?;
        }
        Ok(0..0)
    }

    /// Write what stands beside the codes.
    fn finish(&self, sink: &Sink<'_>) -> Result<()> {
        let Blocks { scales, moments } =
            std::mem::take(&mut *self.blocks.lock().unwrap_or_else(PoisonError::into_inner));
        let mut state = self.state.clone();
        let mut rest = Vec::new();
        let error = if state.nested_offset.is_some() {
            let nested = nested::quantize(&scales, nested::offset(&scales));
            state.nested_offset = Some(nested.offset);
            let decoded = nested::dequantize(&nested.codes, &nested.absmax, &nested::QUANT_MAP, nested.offset);
            let map = le_bytes(&*nested::QUANT_MAP);
            rest.extend([nested.codes, le_bytes(&nf4::LEVELS), le_bytes(&nested.absmax), map]);
            error(&moments, &decoded)
        } else {
            rest.extend([le_bytes(&scales), le_bytes(&nf4::LEVELS)]);
            error(&moments, &scales)
        };
        rest.push(state.to_json());
        self.error.set(error).expect("finished once");
        let outputs = self.output + 1..;
        outputs.zip(&rest).try_for_each(|(output, bytes)| sink.write_at(output, 0, bytes))
    }
}

/// The error of a weight whose blocks have these moments under these (decoded) scales.
///
/// Per block `sum (x - s q)^2 = sum x^2 - 2 s sum x q + s^2 sum q^2`, in f64; the moments are f32 sums.
fn error(moments: &[Moments], scales: &[f32]) -> WeightError {
    let (mut squares, mut total) = (0.0, 0.0);
    let (mut worst, mut worst_block) = (0.0, 0);
    for (index, (moments, &scale)) in (0..).zip(moments.iter().zip(scales)) {
        let Moments { xx, xq, qq } = *moments;
        let [xx, xq, qq, scale] = [xx, xq, qq, scale].map(f64::from);
        let square = (xx - 2.0 * scale * xq + scale * scale * qq).max(0.0);
        squares += square;
        total += xx;
        if xx > 0.0 && square / xx > worst {
            (worst, worst_block) = (square / xx, index);
        }
    }
    let relative = if total > 0.0 { (squares / total).sqrt() } else { 0.0 };
    WeightError { relative, norm: total.sqrt(), worst: worst.sqrt(), worst_block }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
