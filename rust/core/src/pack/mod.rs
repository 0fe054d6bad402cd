//! Packing: floats in; codes, scales and quant state out, chunk by chunk.
//!
//! A [`Recipe`] says which tensors are made of one source tensor, as data: the whole of it, one expert of a fused tensor,
//! every second row, the transpose; packed or kept. [`plan`] checks it against the source and gives a [`stream::Plan`].

mod chunks;
mod compare;
mod encoding;
mod measure;
mod run;
mod weight;

use std::collections::HashSet;
use std::ops::Range;

use chunks::Chunk;
pub use compare::{Differences, compare};
use encoding::{Decoder, Encoding};
pub use measure::measure;
use run::PackRun;

use crate::quant_state::QuantState;
use crate::safetensors::{Checkpoint, Tensor, TensorSpec};
use crate::stream::{self, Copy, Plan, Run};
use crate::{Dtype, Error, Float, Result};

/// How one weight is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Weights per block scale, one of [`crate::nf4::BLOCKSIZES`].
    pub blocksize: usize,
    /// Whether the block scales are themselves stored in 8 bits.
    pub double_quant: bool,
}

/// How all weights are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Which codes and scales.
    pub mode: Mode,
    /// Element type that codes are stored in: U8, or a float type whose bytes they fill (for FSDP).
    pub storage: Dtype,
}

/// Which codes and scales are taken for a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Those of bitsandbytes on a CPU.
    Exact,
    /// Those of least squared error that [`crate::search`] finds; the exact ones where they have less.
    Best,
}

/// One output of a recipe, see `qpack/policy/plan.py`.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Name of the tensor.
    pub name: String,
    /// Its shape as the model sees it.
    pub shape: Vec<u64>,
    /// None keeps it in a float type, or as it is.
    pub packing: Option<Packing>,
    /// The float type to keep it in; None takes the source's, decoded where it is encoded.
    pub keep_as: Option<Float>,
    /// Which matrix of the source.
    pub matrix: u64,
    /// First row of the matrix, and step.
    pub rows: (u64, u64),
    /// Whether the matrix is stored transposed.
    pub transpose: bool,
}

/// What is made of one source tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Name of the source tensor.
    pub source: String,
    /// Name of the tensor that decodes it, where it is encoded.
    pub scale: Option<String>,
    /// Rows and columns that an FP8 scale is for; None where one is for all.
    pub block: Option<[u64; 2]>,
    /// In the order of their bytes in the source.
    pub parts: Vec<Part>,
}

/// Carry out `recipes` on the tensors of `checkpoint`.
///
/// # Errors
/// [`Error::Malformed`] if a tensor is missing, left over or used twice, or does not give what a recipe makes of it.
pub fn plan<'a>(
    checkpoint: &'a Checkpoint,
    recipes: &[Recipe],
    options: Options,
    max_shard_bytes: u64,
) -> Result<Plan<'a>> {
    let mut used = HashSet::new();
    let mut made = HashSet::new();
    let mut planned: Vec<Box<dyn stream::Recipe + 'a>> = Vec::new();
    for recipe in recipes {
        let source = checkpoint.tensor(&recipe.source)?;
        for name in std::iter::once(&recipe.source).chain(&recipe.scale) {
            if !used.insert(name.as_str()) {
                return Err(source.error(format!("{name} is used twice")));
            }
        }
        for part in &recipe.parts {
            if !made.insert(part.name.as_str()) {
                return Err(source.error(format!("{} is made twice", part.name)));
            }
        }
        planned.push(match &recipe.parts[..] {
            [part] if part.packing.is_none() && recipe.scale.is_none() && part.is_all_of(&source) => {
                Box::new(Copy::renamed(source, part.name.clone()))
            }
            _ => Box::new(Pack::new(checkpoint, recipe, options)?),
        });
    }
    match checkpoint.tensors().find(|tensor| !used.contains(tensor.info.name.as_str())) {
        Some(tensor) => Err(tensor.error("is in no recipe")),
        None => Ok(Plan::new(planned, max_shard_bytes)),
    }
}

impl Part {
    /// Whether this is the source as it stands.
    fn is_all_of(&self, source: &Tensor<'_>) -> bool {
        let same_type = self.keep_as.is_none_or(|float| float.dtype() == source.info.dtype);
        same_type && self.shape == source.info.shape && !self.transpose && self.rows == (0, 1) && self.matrix == 0
    }

    /// Number of elements.
    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Rows of the matrix that are taken.
    fn row_count(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }
}

/// A source tensor and what is made of it.
#[derive(Debug)]
struct Pack<'a> {
    source: Tensor<'a>,
    encoding: Encoding<'a>,
    parts: Vec<(Part, Output)>,
    chunks: Vec<Chunk>,
    options: Options,
}

/// How a part is stored.
#[derive(Debug, Clone, PartialEq)]
enum Output {
    /// A nested offset, where there is one, is not known yet.
    Packed(QuantState),
    /// Elements of the source in this type; of another float type where that differs from the source's.
    Kept(Dtype),
}

impl<'a> Pack<'a> {
    fn new(checkpoint: &'a Checkpoint, recipe: &Recipe, options: Options) -> Result<Self> {
        let source = checkpoint.tensor(&recipe.source)?;
        let encoding = Encoding::open(checkpoint, recipe)?;
        let parts = recipe.parts.iter().map(|part| Ok((part.clone(), output(&source, &encoding, part, options)?)));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let chunks = chunks::split(&source, &encoding, &recipe.parts)?;
        Ok(Self { source, encoding, parts, chunks, options })
    }
}

fn output(source: &Tensor<'_>, encoding: &Encoding<'_>, part: &Part, options: Options) -> Result<Output> {
    let float = encoding.float();
    let Some(packing) = part.packing else {
        let dtype = float.map_or(source.info.dtype, Float::dtype);
        let kept = part.keep_as.map_or(dtype, Float::dtype);
        if kept != dtype && float.is_none() {
            return Err(source.error(format!("is {}, which cannot be kept as {}", dtype.name(), kept.name())));
        }
        return Ok(Output::Kept(kept));
    };
    if part.shape.len() != 2 || part.elements() == 0 {
        return Err(source.error(format!("has shape {:?}, expected (out_features, in_features)", part.shape)));
    }
    let Some(dtype) = float else {
        return Err(source.error(format!("is {}, expected BF16, F16 or F32", source.info.dtype.name())));
    };
    let state = QuantState {
        blocksize: packing.blocksize,
        dtype,
        shape: part.shape.clone(),
        nested_offset: packing.double_quant.then_some(0.0),
    };
    if !crate::nf4::code_bytes(part.elements()).is_multiple_of(options.storage.size()) {
        let (codes, storage) = (crate::nf4::code_bytes(part.elements()), options.storage.name());
        return Err(source.error(format!("{codes} bytes of codes are no whole number of {storage} values")));
    }
    Ok(Output::Packed(state))
}

impl stream::Recipe for Pack<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        let tensors = self.parts.iter().flat_map(|(part, output)| match output {
            Output::Packed(state) => state.tensors(&part.name, self.options.storage),
            Output::Kept(dtype) => {
                vec![TensorSpec { name: part.name.clone(), dtype: *dtype, shape: part.shape.clone() }]
            }
        });
        tensors.collect()
    }

    fn source(&self) -> Tensor<'_> {
        self.source
    }

    fn beside(&self) -> Vec<Tensor<'_>> {
        self.encoding.scales().into_iter().collect()
    }

    fn chunks(&self) -> Vec<Range<u64>> {
        self.chunks.iter().map(|chunk| chunk.bytes.clone()).collect()
    }

    fn start(&self) -> Result<Box<dyn Run + '_>> {
        Ok(Box::new(PackRun::new(self)?))
    }
}

impl Pack<'_> {
    fn non_finite(&self, part: &Part, index: u64) -> Error {
        let path = self.source.file.path().to_owned();
        Error::NonFinite { path, tensor: part.name.clone(), index }
    }
}
