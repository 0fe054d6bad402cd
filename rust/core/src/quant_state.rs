//! What stands beside the codes of one packed weight: the names of its tensors and its quant state.
//!
//! Reference: bitsandbytes 0.50, `functional.QuantState.as_dict(packed=True)`. For a weight `W` of `n` values in blocks
//! of `B`:
//!
//! ```text
//! W                                   U8  [ceil(n/2), 1]        codes
//! W.absmax                            U8  [ceil(n/B)]           with double quantization; else F32
//! W.quant_map                         F32 [16]                  the NF4 levels
//! W.nested_absmax                     F32 [ceil(n/B/256)]       only with double quantization
//! W.nested_quant_map                  F32 [256]                 only with double quantization
//! W.quant_state.bitsandbytes__nf4     U8  [length]              a JSON object, see QuantState
//! ```
//!
//! The JSON ends in spaces, so that its length does not depend on the offset: headers are planned before data is read.

use serde::{Deserialize, Serialize};

use crate::safetensors::TensorSpec;
use crate::{Dtype, Float, nested, nf4};

/// Suffix of the block scales.
pub const ABSMAX: &str = ".absmax";
/// Suffix of the NF4 levels.
pub const QUANT_MAP: &str = ".quant_map";
/// Suffix of the second-level scales.
pub const NESTED_ABSMAX: &str = ".nested_absmax";
/// Suffix of the second-level levels.
pub const NESTED_QUANT_MAP: &str = ".nested_quant_map";
/// Suffix of the JSON.
pub const STATE: &str = ".quant_state.bitsandbytes__nf4";

/// The name of the weight that the tensor `name` stands beside, if it has one of this module's suffixes.
pub fn weight_of(name: &str) -> Option<&str> {
    [ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP, STATE].iter().find_map(|suffix| name.strip_suffix(suffix))
}

/// More weights than any file can hold the codes of.
const MAX_ELEMENTS: u64 = 1 << 62;

/// Longest text of an f64 that serde writes.
const LONGEST_NUMBER: usize = 24;

/// The quant state of one packed weight.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// Weights per block scale.
    pub blocksize: usize,
    /// Element type before packing, which is also what bitsandbytes decodes to.
    pub dtype: Float,
    /// (`out_features`, `in_features`)
    pub shape: Vec<u64>,
    /// Whether the block scales are themselves in 8 bits, and if so around which offset.
    pub nested_offset: Option<f32>,
}

#[derive(Serialize, Deserialize)]
struct Json {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    nested_blocksize: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    nested_dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    nested_offset: Option<f64>,
}

impl QuantState {
    /// The JSON text, padded with spaces to a length that does not depend on the offset.
    ///
    /// # Panics
    /// Never: the object has only strings and finite numbers.
    pub fn to_json(&self) -> Vec<u8> {
        let nested = self.nested_offset.is_some();
        let json = |nested_offset| Json {
            quant_type: "nf4".to_owned(),
            blocksize: self.blocksize,
            dtype: self.dtype.torch_name().to_owned(),
            shape: self.shape.clone(),
            nested_blocksize: nested.then_some(nested::BLOCKSIZE),
            nested_dtype: nested.then(|| Float::F32.torch_name().to_owned()),
            nested_offset,
        };
        let text = |json: &Json| serde_json::to_vec(json).expect("strings and finite numbers");
        let mut bytes = text(&json(self.nested_offset.map(f64::from)));
        if nested {
            // `0.0` stands for the number that is to be left room for.
            bytes.resize(text(&json(Some(0.0))).len() - "0.0".len() + LONGEST_NUMBER, b' ');
        }
        bytes
    }

    /// Read a quant state written by bitsandbytes or by [`QuantState::to_json`].
    ///
    /// # Errors
    /// One line saying what is not as expected.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let json: Json = serde_json::from_slice(bytes).map_err(|error| format!("quant state: {error}"))?;
        if json.quant_type != "nf4" {
            return Err(format!("quant_type is {:?}, expected \"nf4\"", json.quant_type));
        }
        if !nf4::BLOCKSIZES.contains(&json.blocksize) {
            return Err(format!("blocksize is {}, expected one of {:?}", json.blocksize, nf4::BLOCKSIZES));
        }
        let elements = json.shape.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim));
        if json.shape.len() != 2 || elements.is_none_or(|elements| elements == 0 || elements > MAX_ELEMENTS) {
            return Err(format!("shape is {:?}, expected (out_features, in_features)", json.shape));
        }
        let nested_blocksize = json.nested_blocksize.unwrap_or(nested::BLOCKSIZE);
        if nested_blocksize != nested::BLOCKSIZE {
            return Err(format!("nested_blocksize is {nested_blocksize}, expected {}", nested::BLOCKSIZE));
        }
        let dtype = Float::from_torch_name(&json.dtype)
            .ok_or_else(|| format!("dtype is {:?}, expected bfloat16, float16 or float32", json.dtype))?;
        let nested_offset = json.nested_offset.map(|offset| offset as f32);
        Ok(Self { blocksize: json.blocksize, dtype, shape: json.shape, nested_offset })
    }

    /// Number of weights.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// The tensors of the packed weight `name`, codes first, then in the order of this module's table.
    ///
    /// `storage` is the element type that the codes' bytes are stored in, U8 but for FSDP.
    pub fn tensors(&self, name: &str, storage: Dtype) -> Vec<TensorSpec> {
        let spec = |suffix: &str, dtype, shape| TensorSpec { name: format!("{name}{suffix}"), dtype, shape };
        let blocks = nf4::blocks(self.elements(), self.blocksize);
        let nested = self.nested_offset.is_some();
        let mut tensors = vec![
            spec("", storage, vec![nf4::code_bytes(self.elements()) / storage.size(), 1]),
            spec(ABSMAX, if nested { Dtype::U8 } else { Dtype::F32 }, vec![blocks]),
            spec(QUANT_MAP, Dtype::F32, vec![nf4::LEVELS.len() as u64]),
        ];
        if nested {
            tensors.push(spec(NESTED_ABSMAX, Dtype::F32, vec![nested::blocks(blocks)]));
            tensors.push(spec(NESTED_QUANT_MAP, Dtype::F32, vec![256]));
        }
        tensors.push(spec(STATE, Dtype::U8, vec![self.to_json().len() as u64]));
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_one_length_whatever_the_offset_and_reads_back() {
        let state = |nested_offset| QuantState { blocksize: 64, dtype: Float::BF16, shape: vec![3, 5], nested_offset };
        let length = state(Some(0.0)).to_json().len();
        for offset in [0.0, 1.0, 0.1, f32::MIN_POSITIVE, f32::MAX, f32::from_bits(1), 0.033_610_456] {
            let json = state(Some(offset)).to_json();
            assert_eq!(json.len(), length, "{}", String::from_utf8_lossy(&json));
            assert_eq!(QuantState::parse(&json).unwrap(), state(Some(offset)));
        }
        assert_eq!(QuantState::parse(&state(None).to_json()).unwrap(), state(None));
    }
}
