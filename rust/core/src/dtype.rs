//! Element types of safetensors files, and conversion between bytes and f32 for the three that hold weights.
//!
//! Names are those of the safetensors header (<https://github.com/huggingface/safetensors>, `Dtype`). Types of less
//! than a byte an element are not read.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// f16 values converted at a time.
const HALVES: usize = 1024;

macro_rules! dtypes {
    ($($variant:ident $name:literal $size:literal,)*) => {
        /// Element type of a tensor, as named in a safetensors header.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, non_camel_case_types)]
        pub enum Dtype { $($variant,)* }

        impl Dtype {
            /// The name in a safetensors header.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Bytes an element.
            pub fn size(self) -> u64 {
                match self { $(Self::$variant => $size,)* }
            }

            /// The type of this safetensors name, if it is one that is known.
            pub fn parse(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    Bool "BOOL" 1,
    U8 "U8" 1,
    I8 "I8" 1,
    F8E4M3 "F8_E4M3" 1,
    F8E5M2 "F8_E5M2" 1,
    F8E8M0 "F8_E8M0" 1,
    F8E4M3Fnuz "F8_E4M3FNUZ" 1,
    F8E5M2Fnuz "F8_E5M2FNUZ" 1,
    I16 "I16" 2,
    U16 "U16" 2,
    F16 "F16" 2,
    BF16 "BF16" 2,
    I32 "I32" 4,
    U32 "U32" 4,
    F32 "F32" 4,
    C64 "C64" 8,
    F64 "F64" 8,
    I64 "I64" 8,
    U64 "U64" 8,
}

/// The element types that weights are computed from and written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// bfloat16
    BF16,
    /// IEEE half precision
    F16,
    /// IEEE single precision
    F32,
}

/// The index of the first value that is bad: by pieces in which a loop without an exit, which becomes vector code, finds one.
fn first<T>(values: &[T], is_bad: impl Fn(&T) -> bool) -> Option<usize> {
    let has_bad = |piece: &[T]| piece.iter().fold(false, |found, value| found | is_bad(value));
    let (number, piece) = values.chunks(HALVES).enumerate().find(|(_, piece)| has_bad(piece))?;
    piece.iter().position(is_bad).map(|index| number * HALVES + index)
}

impl Float {
    /// The float type of a header dtype, where weights of that dtype can be computed with.
    pub fn from_dtype(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::BF16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// The header dtype.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::BF16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }

    /// The name torch gives it, as it stands in a quant state's JSON.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::BF16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }

    /// The largest finite value.
    pub fn max(self) -> f32 {
        match self {
            Self::BF16 => half::bf16::MAX.to_f32(),
            Self::F16 => f16::MAX.to_f32(),
            Self::F32 => f32::MAX,
        }
    }

    /// The float type that torch gives this name.
    pub fn from_torch_name(name: &str) -> Option<Self> {
        [Self::BF16, Self::F16, Self::F32].into_iter().find(|float| float.torch_name() == name)
    }

    /// Bytes an element.
    pub fn size(self) -> usize {
        self.dtype().size() as usize
    }

    /// The index of the first of the little-endian values in `bytes` that is NaN or infinite.
    pub fn first_non_finite(self, bytes: &[u8]) -> Option<usize> {
        let halves = |exponent: u16| {
            let is_bad = |value: &[u8; 2]| u16::from_le_bytes(*value) & exponent == exponent;
            first(bytes.as_chunks().0, is_bad)
        };
        match self {
            Self::BF16 => halves(0x7f80),
            Self::F16 => halves(0x7c00),
            Self::F32 => first(bytes.as_chunks().0, |value| !f32::from_le_bytes(*value).is_finite()),
        }
    }

    /// Decode little-endian `bytes` to f32, exactly.
    ///
    /// # Panics
    /// If the lengths do not match.
    #[inline(always)]
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.size(), "bytes and elements differ in number");
        match self {
            Self::BF16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*raw)) << 16);
                }
            }
            Self::F16 => {
                // Through `half`, which picks F16C itself; a piece at a time, on the stack.
                let mut halves = [0_u16; HALVES];
                for (values, bytes) in out.chunks_mut(HALVES).zip(bytes.chunks(2 * HALVES)) {
                    let halves = &mut halves[..values.len()];
                    for (half, raw) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                        *half = u16::from_le_bytes(*raw);
                    }
                    halves.reinterpret_cast::<f16>().convert_to_f32_slice(values);
                }
            }
            Self::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*raw);
                }
            }
        }
    }

    /// Little-endian `bytes` of this type as bytes of the type `to`, each value rounded once.
    ///
    /// # Panics
    /// If `bytes` is no whole number of values.
    pub fn convert(self, bytes: &[u8], to: Self) -> Vec<u8> {
        let mut values = vec![0.0; bytes.len() / self.size()];
        self.decode(bytes, &mut values);
        let mut converted = vec![0; values.len() * to.size()];
        to.encode(&values, &mut converted);
        converted
    }

    /// Encode `values`, rounding once, to nearest with ties to even.
    ///
    /// # Panics
    /// If the lengths do not match.
    #[inline(always)]
    pub fn encode(self, values: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), values.len() * self.size(), "bytes and elements differ in number");
        match self {
            Self::BF16 => {
                for (raw, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *raw = bf16_bits(*value).to_le_bytes();
                }
            }
            Self::F16 => {
                let mut halves = [f16::ZERO; HALVES];
                for (values, bytes) in values.chunks(HALVES).zip(out.chunks_mut(2 * HALVES)) {
                    let halves = &mut halves[..values.len()];
                    halves.convert_from_f32_slice(values);
                    for (raw, half) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
                        *raw = half.to_le_bytes();
                    }
                }
            }
            Self::F32 => {
                for (raw, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *raw = value.to_le_bytes();
                }
            }
        }
    }
}

/// `value` as bfloat16, to nearest with ties to even; written out so that it compiles to vector instructions.
#[inline(always)]
pub(crate) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x0040; // quiet, and never rounded up to infinity
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        // Every upper half with lower halves around the ties and the ends.
        for upper in 0..=0xffff_u32 {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(upper << 16 | lower);
                assert_eq!(bf16_bits(value), half::bf16::from_f32(value).to_bits(), "{value:?}");
            }
        }
    }
}
