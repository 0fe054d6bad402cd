//! Reading packed weights: codes and scales out of a checkpoint, decoded to f32.

use crate::quant_state::{self, QuantState};
use crate::safetensors::{Checkpoint, Tensor};
use crate::{Dtype, Float, Result, nested, nf4};

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

    /// The tensors that stand beside the codes.
    pub fn beside(&self) -> Vec<Tensor<'a>> {
        let storage = self.codes.info.dtype;
        let names = self.state.tensors(&self.codes.info.name, storage).into_iter().skip(1).map(|spec| spec.name);
        names.filter_map(|name| self.checkpoint.get(&name)).collect()
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

    /// Decode the weights from number `first` on, which starts a block, to bytes of type `to`, rounded once. `codes` are
    /// all of theirs, `scales` those of [`Packed::read_scales`].
    pub(crate) fn decode_to(&self, to: Float, scales: &[f32], first: u64, codes: &[u8], out: &mut [u8]) {
        let blocksize = self.state.blocksize;
        let blocks = (out.len() / to.size()).div_ceil(blocksize);
        let scales = &scales[(first / blocksize as u64) as usize..][..blocks];
        nf4::dequantize_to(to, codes, scales, blocksize, out);
    }

    /// Decode to f32, of the weights from number `first` on, which starts a block and whose codes are `codes`, those from
    /// number `at` on.
    #[inline(always)]
    pub(crate) fn decode(&self, scales: &[f32], first: u64, codes: &[u8], at: usize, out: &mut [f32]) {
        let blocksize = self.state.blocksize;
        decode(codes, &scales[(first / blocksize as u64) as usize..], blocksize, at, out);
    }
}

/// Decode to f32 the weights from number `at` on, which need not start a block, of those whose codes are `codes`.
#[inline(always)]
pub(crate) fn decode(codes: &[u8], scales: &[f32], blocksize: usize, at: usize, out: &mut [f32]) {
    let (block, skip) = (at / blocksize, at % blocksize);
    let elements = skip + out.len();
    let codes = &codes[block * blocksize / 2..][..elements.div_ceil(2)];
    let scales = &scales[block..][..elements.div_ceil(blocksize)];
    if skip == 0 {
        return nf4::dequantize(codes, scales, blocksize, out);
    }
    let mut whole = vec![0.0; elements];
    nf4::dequantize(codes, scales, blocksize, &mut whole);
    out.copy_from_slice(&whole[skip..]);
}
