//! Merging: every weight of a base in a float type, with an adapter's changes: `round(dequantize(W) + scale * B @ A)`.
//!
//! Everything is computed in f32 and rounded once, to the output's float type. Never back to 4 bits: most codes would
//! round to where they were, and the adapter with them.

use std::collections::HashMap;

use rayon::prelude::*;

use crate::lora::Factors;
use crate::quant_state::{self, QuantState};
use crate::safetensors::{Checkpoint, Tensor, TensorSpec};
use crate::stream::{CHUNK, Cast, Copy, Plan, Recipe, Scratch, Sink, same_shape};
use crate::{Float, Job, Result, nested, nf4};

/// Where an adapter keeps its change of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct FactorNames {
    /// Name of the tensor (r, `in_features`) in the adapter's file.
    pub a: String,
    /// Name of the tensor (`out_features`, r) in the adapter's file.
    pub b: String,
    /// What their product is scaled by.
    pub scale: f32,
}

/// Write all of `base` as floats of type `to`: packed weights decoded, other floats cast, with the changes `factors`
/// (by weight) of `adapter` added. Tensors that are not BF16, F16 or F32 are written as they are.
///
/// # Errors
/// As [`Packed::open`] and [`Factors::open`]; [`crate::Error::Malformed`] if a weight or a factor is missing.
pub fn plan<'a>(
    base: &'a Checkpoint,
    adapter: &'a Checkpoint,
    factors: &HashMap<String, FactorNames>,
    to: Float,
    max_shard_bytes: u64,
) -> Result<Plan<'a>> {
    for name in factors.keys() {
        base.tensor(name)?;
    }
    let change = |name: &str, shape: &[u64]| {
        let open = |FactorNames { a, b, scale }: &FactorNames| {
            Factors::open(adapter.tensor(a)?, adapter.tensor(b)?, *scale, shape)
        };
        factors.get(name).map(open).transpose()
    };
    let mut recipes: Vec<Box<dyn Recipe>> = Vec::new();
    for tensor in base.tensors() {
        let name = &tensor.info.name;
        if quant_state::weight_of(name).is_some_and(|weight| Packed::is(base, weight)) {
            // A part of a packed weight, which is read with its codes.
        } else if Packed::is(base, name) {
            let packed = Packed::open(base, name)?;
            let change = change(name, &packed.state.shape)?;
            recipes.push(Box::new(Merge::packed(packed, change, to)));
        } else if let Some(change) = change(name, &tensor.info.shape)? {
            recipes.push(Box::new(Merge::plain(tensor, change, to)?));
        } else if Float::from_dtype(tensor.info.dtype).is_some() {
            recipes.push(Box::new(Cast::new(tensor, to)?));
        } else {
            recipes.push(Box::new(Copy(tensor)));
        }
    }
    Ok(Plan::new(recipes, max_shard_bytes))
}

/// A packed weight of an open checkpoint, its tensors checked.
#[derive(Debug)]
pub struct Packed<'a> {
    checkpoint: &'a Checkpoint,
    codes: Tensor<'a>,
    state: QuantState,
    bytes: u64,
}

impl<'a> Packed<'a> {
    /// Whether the weight `name` of `checkpoint` is packed: whether it has a quant state.
    pub fn is(checkpoint: &Checkpoint, name: &str) -> bool {
        checkpoint.get(&format!("{name}{}", quant_state::STATE)).is_some()
    }

    /// Read the quant state of the packed weight `name` and check what stands beside its codes.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] naming the tensor of it that is missing or not as expected.
    pub fn open(checkpoint: &'a Checkpoint, name: &str) -> Result<Self> {
        let codes = checkpoint.tensor(name)?;
        let json = checkpoint.tensor(&format!("{name}{}", quant_state::STATE))?;
        let state = QuantState::parse(&json.read()?).map_err(|reason| json.error(reason))?;
        let mut bytes = 0;
        for expected in state.tensors(name) {
            let found = checkpoint.tensor(&expected.name)?;
            bytes += found.info.bytes();
            let length = |shape: &[u64]| shape.iter().product::<u64>();
            let alike = found.info.dtype == expected.dtype && length(&found.info.shape) == length(&expected.shape);
            // Only the quant state's JSON has no length of its own.
            if !alike && !expected.name.ends_with(quant_state::STATE) {
                let (dtype, shape) = (expected.dtype.name(), expected.shape);
                let (found_dtype, found_shape) = (found.info.dtype.name(), &found.info.shape);
                return Err(found.error(format!("is {found_dtype} {found_shape:?}, expected {dtype} {shape:?}")));
            }
        }
        Ok(Self { checkpoint, codes, state, bytes })
    }

    /// Blocksize, shape, dtype before packing.
    pub fn state(&self) -> &QuantState {
        &self.state
    }

    /// Bytes of all tensors that make up this weight.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Read the block scales, decoded if they are themselves in 8 bits.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; [`crate::Error::Malformed`] if a nested map has not 256 levels.
    pub fn read_scales(&self) -> Result<Vec<f32>> {
        let beside = |suffix: &str| self.checkpoint.tensor(&format!("{}{suffix}", self.codes.info.name));
        let absmax = beside(quant_state::ABSMAX)?;
        let Some(offset) = self.state.nested_offset else { return absmax.read_floats() };
        let nested_absmax = beside(quant_state::NESTED_ABSMAX)?.read_floats()?;
        let map = beside(quant_state::NESTED_QUANT_MAP)?;
        let levels = map.read_floats()?;
        let levels = levels.as_slice().try_into().map_err(|_| map.error("has not 256 levels"))?;
        Ok(nested::dequantize(&absmax.read()?, &nested_absmax, levels, offset))
    }

    /// Replace `out` by the `len` weights from `first` on, in f32, through `bytes` as scratch.
    ///
    /// `scales` are those of [`Packed::read_scales`].
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn read_floats_at(
        &self,
        scales: &[f32],
        first: u64,
        len: usize,
        out: &mut Vec<f32>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let blocksize = self.state.blocksize as u64;
        let (block, skip) = (first / blocksize, (first % blocksize) as usize);
        let elements = skip + len;
        bytes.resize(elements.div_ceil(2), 0);
        self.codes.read_at(block * blocksize / 2, bytes)?;
        let scales = &scales[block as usize..][..elements.div_ceil(self.state.blocksize)];
        out.resize(elements, 0.0);
        nf4::dequantize(bytes, scales, self.state.blocksize, out);
        out.drain(..skip);
        Ok(())
    }
}

/// A weight of the base, packed or plain.
#[derive(Debug)]
enum Base<'a> {
    Packed(Packed<'a>),
    Plain(Tensor<'a>),
}

/// A weight written in a float type, with an adapter's change added.
#[derive(Debug)]
pub struct Merge<'a> {
    base: Base<'a>,
    output: TensorSpec,
    source_bytes: u64,
    to: Float,
    change: Option<Factors<'a>>,
}

impl<'a> Merge<'a> {
    /// A recipe that decodes the packed weight `packed`, adds `change` and writes the sum as `to`.
    pub fn packed(packed: Packed<'a>, change: Option<Factors<'a>>, to: Float) -> Self {
        let name = packed.codes.info.name.clone();
        let output = TensorSpec { name, dtype: to.dtype(), shape: packed.state.shape.clone() };
        Self { output, source_bytes: packed.codes.info.bytes(), base: Base::Packed(packed), to, change }
    }

    /// A recipe that adds `change` to the plain weight `tensor` and writes the sum as `to`.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] if the weight is not BF16, F16 or F32.
    pub fn plain(tensor: Tensor<'a>, change: Factors<'a>, to: Float) -> Result<Self> {
        tensor.float()?;
        let output = same_shape(&tensor, to.dtype());
        Ok(Self { output, source_bytes: tensor.info.bytes(), base: Base::Plain(tensor), to, change: Some(change) })
    }
}

impl Recipe for Merge<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        vec![self.output.clone()]
    }

    fn source_bytes(&self) -> u64 {
        self.source_bytes
    }

    fn run(&self, sink: &Sink<'_>, job: &Job) -> Result<()> {
        let scales = match &self.base {
            Base::Packed(packed) => packed.read_scales()?,
            Base::Plain(_) => Vec::new(),
        };
        let delta = self.change.map(|factors| factors.read()).transpose()?;
        let [out_features, in_features] = [self.output.shape[0], self.output.shape[1]];
        let rows_a_chunk = (CHUNK as u64 / in_features).max(1);
        let chunks = (0..out_features.div_ceil(rows_a_chunk)).into_par_iter();
        chunks.try_for_each_init(Scratch::default, |scratch, chunk| {
            let Scratch { bytes, floats } = scratch;
            let first_row = chunk * rows_a_chunk;
            let rows = rows_a_chunk.min(out_features - first_row);
            let (first, elements) = (first_row * in_features, (rows * in_features) as usize);
            match &self.base {
                Base::Packed(packed) => packed.read_floats_at(&scales, first, elements, floats, bytes)?,
                Base::Plain(tensor) => {
                    floats.resize(elements, 0.0);
                    tensor.read_floats_at(first, floats, bytes)?;
                }
            }
            if let Some(delta) = &delta {
                delta.add_to(floats, first_row as usize);
            }
            scratch.write_floats(self.to, sink, first)?;
            // Shares of the source's bytes that add up to all of them.
            let share = |row: u64| self.source_bytes * row / out_features;
            job.advance(share(first_row + rows) - share(first_row))
        })
    }
}
