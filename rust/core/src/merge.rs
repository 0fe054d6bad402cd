//! Merging: every weight of a base in a float type, with an adapter's changes: `round(dequantize(W) + scale * B @ A)`.
//!
//! Everything is computed in f32 and rounded once, to the output's float type. Never back to 4 bits: most codes would
//! round to where they were, and the adapter with them.

use std::collections::HashMap;
use std::ops::Range;

use crate::lora::{Delta, Factors};
use crate::quant_state::{self, QuantState};
use crate::safetensors::{Checkpoint, Tensor, TensorSpec};
use crate::stream::{CHUNK, Cast, Copy, Plan, Recipe, Run, Sink};
use crate::{Dtype, Float, Result, nested, nf4};

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
            recipes.push(Box::new(Copy::new(tensor)));
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
        let storage = codes.info.dtype;
        if !matches!(storage, Dtype::U8 | Dtype::BF16 | Dtype::F16 | Dtype::F32) {
            return Err(codes.error(format!("is {}, expected U8, BF16, F16 or F32 to hold codes", storage.name())));
        }
        for expected in state.tensors(name, storage) {
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

    /// Decode the weights from number `first` on to f32. `bytes` are their codes, from the start of the first one's block.
    ///
    /// `scales` are those of [`Packed::read_scales`].
    pub fn decode(&self, scales: &[f32], first: u64, bytes: &[u8], out: &mut [f32]) {
        let blocksize = self.state.blocksize;
        let (block, skip) = ((first / blocksize as u64) as usize, (first % blocksize as u64) as usize);
        let elements = skip + out.len();
        let scales = &scales[block..][..elements.div_ceil(blocksize)];
        if skip == 0 {
            return nf4::dequantize(bytes, scales, blocksize, out);
        }
        let mut whole = vec![0.0; elements];
        nf4::dequantize(bytes, scales, blocksize, &mut whole);
        out.copy_from_slice(&whole[skip..]);
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
    to: Float,
    change: Option<Factors<'a>>,
}

impl<'a> Merge<'a> {
    /// A recipe that decodes the packed weight `packed`, adds `change` and writes the sum as `to`.
    pub fn packed(packed: Packed<'a>, change: Option<Factors<'a>>, to: Float) -> Self {
        let name = packed.codes.info.name.clone();
        let output = TensorSpec { name, dtype: to.dtype(), shape: packed.state.shape.clone() };
        Self { output, base: Base::Packed(packed), to, change }
    }

    /// A recipe that adds `change` to the plain weight `tensor` and writes the sum as `to`.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] if the weight is not BF16, F16 or F32.
    pub fn plain(tensor: Tensor<'a>, change: Factors<'a>, to: Float) -> Result<Self> {
        tensor.float()?;
        let output = TensorSpec { dtype: to.dtype(), ..tensor.spec() };
        Ok(Self { output, base: Base::Plain(tensor), to, change: Some(change) })
    }
}

impl Recipe for Merge<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        vec![self.output.clone()]
    }

    fn source(&self) -> Tensor<'_> {
        match &self.base {
            Base::Packed(packed) => packed.codes,
            Base::Plain(tensor) => *tensor,
        }
    }

    /// Whole rows. Those of a packed weight begin with the block that the first of them lies in.
    fn chunks(&self) -> Vec<Range<u64>> {
        let elements =
            |chunk: u64| self.first_row(chunk) * self.in_features()..self.first_row(chunk + 1) * self.in_features();
        let chunks = 0..self.output.shape[0].div_ceil(self.rows_a_chunk());
        chunks
            .map(|chunk| {
                let Range { start, end } = elements(chunk);
                match &self.base {
                    Base::Packed(packed) => {
                        let blocksize = packed.state.blocksize as u64;
                        start / blocksize * blocksize / 2..end.div_ceil(2)
                    }
                    Base::Plain(tensor) => {
                        let size = tensor.info.dtype.size();
                        start * size..end * size
                    }
                }
            })
            .collect()
    }

    fn start(&self) -> Result<Box<dyn Run + '_>> {
        let scales = match &self.base {
            Base::Packed(packed) => packed.read_scales()?,
            Base::Plain(_) => Vec::new(),
        };
        let delta = self.change.map(|factors| factors.read()).transpose()?;
        Ok(Box::new(MergeRun { merge: self, scales, delta }))
    }
}

impl Merge<'_> {
    fn in_features(&self) -> u64 {
        self.output.shape[1]
    }

    fn rows_a_chunk(&self) -> u64 {
        (CHUNK as u64 / self.in_features()).max(1)
    }

    fn first_row(&self, chunk: u64) -> u64 {
        (chunk * self.rows_a_chunk()).min(self.output.shape[0])
    }
}

/// A weight being merged.
struct MergeRun<'m> {
    merge: &'m Merge<'m>,
    scales: Vec<f32>,
    delta: Option<Delta>,
}

impl Run for MergeRun<'_> {
    fn chunk(&self, chunk: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Range<usize>> {
        let merge = self.merge;
        let (first_row, end_row) = (merge.first_row(chunk as u64), merge.first_row(chunk as u64 + 1));
        let first = first_row * merge.in_features();
        let mut floats = vec![0.0; ((end_row - first_row) * merge.in_features()) as usize];
        match &merge.base {
            Base::Packed(packed) => packed.decode(&self.scales, first, bytes, &mut floats),
            Base::Plain(tensor) => tensor.float()?.decode(bytes, &mut floats),
        }
        if let Some(delta) = &self.delta {
            delta.add_to(&mut floats, first_row as usize);
        }
        let mut merged = vec![0; floats.len() * merge.to.size()];
        merge.to.encode(&floats, &mut merged);
        sink.write_at(0, first * merge.to.size() as u64, &merged)?;
        Ok(0..0)
    }
}
