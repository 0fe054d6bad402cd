//! Packing: floats in; codes, scales and quant state out, chunk by chunk.

use std::collections::HashSet;

use rayon::prelude::*;

use crate::quant_state::QuantState;
use crate::safetensors::{Checkpoint, Tensor, TensorSpec};
use crate::stream::{CHUNK, Copy, Plan, Recipe, Sink};
use crate::{Error, Job, Result, nested, nf4};

/// How weights are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Weights per block scale, one of [`nf4::BLOCKSIZES`].
    pub blocksize: usize,
    /// Whether the block scales are themselves stored in 8 bits.
    pub double_quant: bool,
}

/// Pack the tensors of `checkpoint` named in `weights`, write all others as they are.
///
/// # Errors
/// As [`Pack::new`]; [`Error::Malformed`] if the checkpoint lacks one of `weights`.
pub fn plan<'a>(
    checkpoint: &'a Checkpoint,
    weights: &HashSet<String>,
    options: Options,
    max_shard_bytes: u64,
) -> Result<Plan<'a>> {
    for name in weights {
        checkpoint.tensor(name)?;
    }
    let recipes = checkpoint.tensors().map(|tensor| -> Result<Box<dyn Recipe + 'a>> {
        if weights.contains(&tensor.info.name) {
            Ok(Box::new(Pack::new(tensor, options)?))
        } else {
            Ok(Box::new(Copy(tensor)))
        }
    });
    Ok(Plan::new(recipes.collect::<Result<_>>()?, max_shard_bytes))
}

/// A weight written in NF4.
#[derive(Debug)]
pub struct Pack<'a> {
    source: Tensor<'a>,
    /// As planned: a nested offset, where there is one, is not known yet.
    state: QuantState,
}

impl<'a> Pack<'a> {
    /// A recipe that packs `source`.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the source is not two-dimensional, is empty, or is not BF16, F16 or F32.
    pub fn new(source: Tensor<'a>, options: Options) -> Result<Self> {
        let shape = &source.info.shape;
        if shape.len() != 2 || source.info.elements() == 0 {
            return Err(source.error(format!("has shape {shape:?}, expected (out_features, in_features)")));
        }
        let state = QuantState {
            blocksize: options.blocksize,
            dtype: source.float()?,
            shape: shape.clone(),
            nested_offset: options.double_quant.then_some(0.0),
        };
        Ok(Self { source, state })
    }

    /// Quantize chunk by chunk: codes go to the sink, the scales of all blocks are returned.
    fn quantize(&self, sink: &Sink<'_>, job: &Job) -> Result<Vec<f32>> {
        let QuantState { blocksize, dtype, .. } = self.state;
        let total = self.state.elements();
        let mut absmax = vec![0.0; nf4::blocks(total, blocksize) as usize];
        let chunks = absmax.par_chunks_mut(CHUNK / blocksize).enumerate();
        chunks.try_for_each_init(Default::default, |(bytes, codes): &mut (Vec<u8>, Vec<u8>), (chunk, absmax)| {
            let first = chunk as u64 * CHUNK as u64;
            let elements = (total - first).min(CHUNK as u64);
            bytes.resize(elements as usize * dtype.size(), 0);
            self.source.read_at(first * dtype.size() as u64, bytes)?;
            codes.resize(nf4::code_bytes(elements) as usize, 0);
            let quantized = nf4::quantize(bytes, dtype, blocksize, absmax, codes);
            quantized.map_err(|index| self.non_finite(first + index as u64))?;
            sink.write_at(0, first / 2, codes)?;
            job.advance(bytes.len() as u64)
        })?;
        Ok(absmax)
    }

    fn non_finite(&self, index: u64) -> Error {
        let path = self.source.file.path().to_owned();
        Error::NonFinite { path, tensor: self.source.info.name.clone(), index }
    }
}

impl Recipe for Pack<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        self.state.tensors(&self.source.info.name)
    }

    fn source_bytes(&self) -> u64 {
        self.source.info.bytes()
    }

    fn run(&self, sink: &Sink<'_>, job: &Job) -> Result<()> {
        let absmax = self.quantize(sink, job)?;
        let mut state = self.state.clone();
        // In the order of `QuantState::tensors`, after the codes.
        let mut rest = Vec::new();
        if state.nested_offset.is_some() {
            let nested = nested::quantize(&absmax, nested::offset(&absmax));
            state.nested_offset = Some(nested.offset);
            let map = le_bytes(&*nested::QUANT_MAP);
            rest.extend([nested.codes, le_bytes(&nf4::LEVELS), le_bytes(&nested.absmax), map]);
        } else {
            rest.extend([le_bytes(&absmax), le_bytes(&nf4::LEVELS)]);
        }
        rest.push(state.to_json());
        rest.iter().enumerate().try_for_each(|(index, bytes)| sink.write_at(index + 1, 0, bytes))
    }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
