//! Packing: floats in; codes, scales and quant state out, chunk by chunk.
//!
//! A [`Recipe`] says which tensors are made of one source tensor, as data: the whole of it, one expert of a fused tensor,
//! every second row, the transpose; packed or kept. [`plan`] checks it against the source and gives a [`stream::Plan`].
//! Sources may be packed themselves, which are unpacked; and they may be [changed](crate::merge) on the way, which is how
//! adapters are merged.

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
use encoding::Encoding;
pub use measure::measure;
use run::PackRun;

use crate::merge::{Changes, OpenChange};
use crate::packed::Packed;
use crate::quant_state::{self, QuantState};
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
    /// The float type to keep it in, or that a packed one is said to be of; None takes the source's, decoded where it is
    /// encoded.
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

/// Carry out `recipes` on the tensors of `checkpoint`, with `changes` made to them before.
///
/// The tensors that stand beside a packed weight are read with it and in no recipe. A recipe whose source the checkpoint
/// lacks is one of a tensor that `changes` has in its place.
///
/// # Errors
/// [`Error::Malformed`] if a tensor is missing, left over or used twice, or does not give what a recipe makes of it; or
/// if a change is of no source, or not of its shape.
pub fn plan<'a>(
    checkpoint: &'a Checkpoint,
    recipes: &[Recipe],
    changes: &'a Changes,
    options: Options,
    max_shard_bytes: u64,
) -> Result<Plan<'a>> {
    let mut used = HashSet::new();
    let mut made = HashSet::new();
    let mut planned: Vec<Box<dyn stream::Recipe + 'a>> = Vec::new();
    for recipe in recipes {
        let source = find(checkpoint, &recipe.source, changes)?;
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
        let pack = Pack::new(checkpoint, recipe, changes, options)?;
        planned.push(match &recipe.parts[..] {
            [part] if pack.change.is_none() && pack.is_copy(part) => Box::new(Copy::new(source, part.name.clone())),
            _ => Box::new(pack),
        });
    }
    let unused = |name: &str| !used.contains(name);
    let beside = |name: &str| quant_state::weight_of(name).is_some_and(|weight| Packed::is(checkpoint, weight));
    let left_over = |tensor: &Tensor<'_>| unused(&tensor.info.name) && !beside(&tensor.info.name);
    if let Some(tensor) = checkpoint.tensors().find(left_over) {
        return Err(tensor.error("is in no recipe"));
    }
    if let Some(name) = changes.names().find(|name| unused(name)) {
        return Err(Error::malformed(checkpoint.path(), format!("{name} is changed, and in no recipe")));
    }
    Ok(Plan::new(planned, max_shard_bytes))
}

/// The source tensor `name`: of the checkpoint, or what takes its place.
fn find<'a>(checkpoint: &'a Checkpoint, name: &str, changes: &'a Changes) -> Result<Tensor<'a>> {
    if let Some(replacement) = changes.replacement(name)? {
        return Ok(replacement);
    }
    let origin = changes.origin(name);
    match checkpoint.get(name) {
        Some(tensor) if origin != name => Err(tensor.error(format!("is there, and is to be made of {origin}"))),
        _ => checkpoint.tensor(origin),
    }
}

impl Part {
    /// Whether this is all of a source of shape `shape`, as it lies there.
    fn is_all_of(&self, shape: &[u64]) -> bool {
        self.shape == shape && !self.transpose && self.rows == (0, 1) && self.matrix == 0
    }

    /// Whether this is all of a source of shape `shape`, or of its transpose.
    fn is_transposed_or_all_of(&self, shape: &[u64]) -> bool {
        let transposed: Vec<u64> = shape.iter().rev().copied().collect();
        let whole = Self { transpose: false, ..self.clone() };
        whole.is_all_of(if self.transpose { &transposed } else { shape })
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
    change: Option<OpenChange<'a>>,
    parts: Vec<(Part, Output)>,
    chunks: Vec<Chunk>,
    options: Options,
}

/// How a part is stored.
#[derive(Debug, Clone, PartialEq)]
enum Output {
    /// A nested offset, where there is one, is not known yet. What is packed are values of this type, which is wider than
    /// the state's where they are a sum.
    Packed { state: QuantState, values: Float },
    /// Elements of the source in this type; of another float type where that differs from the source's.
    Kept(Dtype),
}

impl<'a> Pack<'a> {
    fn new(checkpoint: &'a Checkpoint, recipe: &Recipe, changes: &'a Changes, options: Options) -> Result<Self> {
        let source = find(checkpoint, &recipe.source, changes)?;
        let encoding = match changes.replacement(&recipe.source)? {
            Some(replacement) => Encoding::Plain(replacement),
            None => Encoding::open(checkpoint, changes.origin(&recipe.source), recipe)?,
        };
        let change = changes.open_change(&recipe.source, encoding.shape())?;
        if change.is_some() && encoding.float().is_none() {
            return Err(source.error(format!("is {}, which cannot be changed", source.info.dtype.name())));
        }
        let output = |part| output(&source, &encoding, part, change.is_some(), options);
        let parts = recipe.parts.iter().map(|part| Ok((part.clone(), output(part)?)));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let chunks = chunks::split(&source, &encoding, &recipe.parts, change.is_some())?;
        Ok(Self { source, encoding, change, parts, chunks, options })
    }

    /// Whether `part`, the only one, has the very bytes of the source.
    fn is_copy(&self, part: &Part) -> bool {
        let Encoding::Plain(source) = &self.encoding else { return false };
        part.is_all_of(&source.info.shape) && self.parts[0].1 == Output::Kept(source.info.dtype)
    }

    /// The type of the values that the part of this number is made of; None where they are no floats.
    fn taken_as(&self, part: usize) -> Option<Float> {
        match &self.parts[part].1 {
            Output::Packed { values, .. } => Some(*values),
            Output::Kept(dtype) => self.encoding.float().and(Float::from_dtype(*dtype)),
        }
    }
}

fn output(
    source: &Tensor<'_>,
    encoding: &Encoding<'_>,
    part: &Part,
    changed: bool,
    options: Options,
) -> Result<Output> {
    let float = match encoding {
        Encoding::Packed(packed) if part.packing.is_some() || !part.is_transposed_or_all_of(&packed.state().shape) => {
            return Err(source.error(format!("is packed, and {} no float of all of it", part.name)));
        }
        Encoding::Packed(packed) => Some(packed.state().dtype),
        _ => encoding.float(),
    };
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
        dtype: part.keep_as.unwrap_or(dtype),
        shape: part.shape.clone(),
        nested_offset: packing.double_quant.then_some(0.0),
    };
    if !crate::nf4::code_bytes(part.elements()).is_multiple_of(options.storage.size()) {
        let (codes, storage) = (crate::nf4::code_bytes(part.elements()), options.storage.name());
        return Err(source.error(format!("{codes} bytes of codes are no whole number of {storage} values")));
    }
    Ok(Output::Packed { state, values: if changed { Float::F32 } else { dtype } })
}

impl stream::Recipe for Pack<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        let tensors = self.parts.iter().flat_map(|(part, output)| match output {
            Output::Packed { state, .. } => state.tensors(&part.name, self.options.storage),
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
        self.encoding.beside()
    }

    fn chunks(&self) -> Vec<Range<u64>> {
        self.chunks.iter().map(|chunk| chunk.bytes.clone()).collect()
    }

    fn start(&self) -> Result<Box<dyn Run + '_>> {
        Ok(Box::new(PackRun::new(self)?))
    }
}
