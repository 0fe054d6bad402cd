//! How the elements of a source tensor are stored: as floats, encoded beside a tensor of scales, or packed.

use std::borrow::Cow;

use super::Recipe;
use crate::encoded::{fp8, mxfp4};
use crate::merge::Codes;
use crate::packed::Packed;
use crate::safetensors::{Checkpoint, Tensor};
use crate::{Dtype, Float, Result};

/// A source's encoding, its scales checked.
#[derive(Debug)]
pub(super) enum Encoding<'a> {
    /// Floats that can be computed with, or elements of another type, which can only be kept.
    Plain(Tensor<'a>),
    /// A byte an element.
    Fp8 { codes: Tensor<'a>, scales: Tensor<'a>, weight: fp8::Weight<'a> },
    /// Half a byte an element.
    Mxfp4 { scales: Tensor<'a>, shape: Vec<u64> },
    /// Half a byte an element.
    Packed(Packed<'a>),
}

/// What decodes a source, read into memory.
pub(super) enum Decoder<'p> {
    /// None where elements are no floats.
    Plain(Option<Float>),
    Fp8 {
        scales: fp8::Scales,
        columns: u64,
    },
    Mxfp4 {
        scales: Vec<u8>,
    },
    Packed {
        packed: &'p Packed<'p>,
        scales: Vec<f32>,
    },
}

/// Elements of a source that have been read.
pub(super) enum Elements<'b> {
    /// None where they are no floats.
    Plain(Option<Float>, Cow<'b, [u8]>),
    Packed {
        packed: &'b Packed<'b>,
        scales: &'b [f32],
        first: u64,
        len: usize,
        codes: &'b [u8],
    },
}

impl<'a> Encoding<'a> {
    /// How the tensor `name`, the source of `recipe`, is stored.
    pub(super) fn open(checkpoint: &'a Checkpoint, name: &str, recipe: &Recipe) -> Result<Self> {
        let source = checkpoint.tensor(name)?;
        if Packed::is(checkpoint, name) {
            return Ok(Self::Packed(Packed::open(checkpoint, name)?));
        }
        let Some(scale) = &recipe.scale else { return Ok(Self::Plain(source)) };
        let scales = checkpoint.tensor(scale)?;
        match source.info.dtype {
            Dtype::F8E4M3 => {
                let weight = fp8::Weight::open(source, scales, recipe.block)?;
                Ok(Self::Fp8 { codes: source, scales, weight })
            }
            Dtype::U8 => Ok(Self::Mxfp4 { scales, shape: mxfp4::shape(source, scales)? }),
            other => Err(source.error(format!("is {}, which {scale} does not decode", other.name()))),
        }
    }

    /// The float type that elements decode to; None where they are no floats.
    pub(super) fn float(&self) -> Option<Float> {
        match self {
            Self::Plain(source) => Float::from_dtype(source.info.dtype),
            Self::Fp8 { .. } | Self::Mxfp4 { .. } => Some(Float::BF16),
            Self::Packed(_) => Some(Float::F32),
        }
    }

    /// The tensors that are read besides.
    pub(super) fn beside(&self) -> Vec<Tensor<'_>> {
        match self {
            Self::Plain(_) => Vec::new(),
            Self::Fp8 { scales, .. } | Self::Mxfp4 { scales, .. } => vec![*scales],
            Self::Packed(packed) => packed.beside(),
        }
    }

    /// Dimensions of the decoded tensor.
    pub(super) fn shape(&self) -> &[u64] {
        match self {
            Self::Plain(source) | Self::Fp8 { codes: source, .. } => &source.info.shape,
            Self::Mxfp4 { shape, .. } => shape,
            Self::Packed(packed) => &packed.state().shape,
        }
    }

    /// Bytes that the first `elements` elements take, which are whole rows or blocks where the encoding wants that.
    pub(super) fn bytes(&self, elements: u64) -> u64 {
        match self {
            Self::Plain(source) => elements * source.info.dtype.size(),
            Self::Fp8 { .. } => elements,
            Self::Mxfp4 { .. } | Self::Packed(_) => elements.div_ceil(2),
        }
    }

    /// Elements that can only be decoded together, from the first one on.
    pub(super) fn blocksize(&self) -> u64 {
        match self {
            Self::Packed(packed) => packed.state().blocksize as u64,
            _ => 1,
        }
    }

    /// Whether only whole rows can be decoded.
    pub(super) fn by_rows(&self) -> bool {
        matches!(self, Self::Fp8 { .. } | Self::Mxfp4 { .. })
    }

    /// Read the scales.
    pub(super) fn decoder(&self) -> Result<Decoder<'_>> {
        Ok(match self {
            Self::Plain(_) => Decoder::Plain(self.float()),
            Self::Fp8 { codes, weight, .. } => {
                let columns = codes.info.shape.last().copied().unwrap_or(1);
                Decoder::Fp8 { scales: weight.read_scales()?, columns }
            }
            Self::Mxfp4 { scales, .. } => Decoder::Mxfp4 { scales: scales.read()? },
            Self::Packed(packed) => Decoder::Packed { packed, scales: packed.read_scales()? },
        })
    }
}

impl Decoder<'_> {
    /// The `len` elements from number `first` of the source on, whose bytes are `bytes`.
    pub(super) fn read<'b>(&'b self, first: u64, len: u64, bytes: &'b [u8]) -> Elements<'b> {
        let bf16 = |out| Elements::Plain(Some(Float::BF16), Cow::Owned(out));
        match self {
            Self::Plain(float) => Elements::Plain(*float, Cow::Borrowed(bytes)),
            Self::Fp8 { scales, columns } => {
                let mut out = vec![0; 2 * bytes.len()];
                scales.decode_rows(bytes, (first / columns) as usize, &mut out);
                bf16(out)
            }
            Self::Mxfp4 { scales } => {
                let mut out = vec![0; 4 * bytes.len()];
                let (first, groups) = (first as usize / mxfp4::GROUP, out.len() / (2 * mxfp4::GROUP));
                mxfp4::decode(bytes, &scales[first..][..groups], &mut out);
                bf16(out)
            }
            Self::Packed { packed, scales } => {
                Elements::Packed { packed, scales, first, len: len as usize, codes: bytes }
            }
        }
    }
}

impl Elements<'_> {
    /// Their bytes, as values of type `to`, rounded once; as they are if that is None.
    pub(super) fn to_bytes(&self, to: Option<Float>) -> Cow<'_, [u8]> {
        match (self, to) {
            (Self::Plain(Some(from), bytes), Some(to)) if *from != to => Cow::Owned(from.convert(bytes, to)),
            (Self::Plain(_, bytes), _) => Cow::Borrowed(bytes),
            (Self::Packed { packed, scales, first, len, codes }, to) => {
                let to = to.unwrap_or(Float::F32);
                let mut out = vec![0; len * to.size()];
                packed.decode_to(to, scales, *first, codes, &mut out);
                Cow::Owned(out)
            }
        }
    }

    /// Decode those from number `at` on to f32.
    #[inline(always)]
    pub(super) fn decode(&self, at: usize, out: &mut [f32]) {
        match self {
            Self::Plain(Some(float), bytes) => {
                float.decode(&bytes[at * float.size()..][..out.len() * float.size()], out);
            }
            Self::Plain(None, _) => unreachable!("only floats are changed"),
            Self::Packed { packed, scales, first, codes, .. } => packed.decode(scales, *first, codes, at, out),
        }
    }

    /// The codes and scales that are decoded, where they are packed.
    pub(super) fn codes(&self) -> Option<Codes<'_>> {
        let Self::Packed { packed, scales, first, codes, .. } = self else { return None };
        let blocksize = packed.state().blocksize;
        Some(Codes { packed: codes, scales: &scales[(first / blocksize as u64) as usize..], blocksize })
    }
}
