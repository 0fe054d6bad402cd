//! How the elements of a source tensor are stored: as floats, or encoded beside a tensor of scales.

use std::borrow::Cow;

use super::Recipe;
use crate::encoded::{fp8, mxfp4};
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
}

/// What decodes a source, read into memory.
pub(super) enum Decoder {
    Plain,
    Fp8 { scales: fp8::Scales, columns: u64 },
    Mxfp4 { scales: Vec<u8> },
}

impl<'a> Encoding<'a> {
    pub(super) fn open(checkpoint: &'a Checkpoint, recipe: &Recipe) -> Result<Self> {
        let source = checkpoint.tensor(&recipe.source)?;
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
        }
    }

    /// The tensor of scales.
    pub(super) fn scales(&self) -> Option<Tensor<'a>> {
        match self {
            Self::Plain(_) => None,
            Self::Fp8 { scales, .. } | Self::Mxfp4 { scales, .. } => Some(*scales),
        }
    }

    /// Dimensions of the decoded tensor.
    pub(super) fn shape(&self) -> &[u64] {
        match self {
            Self::Plain(source) | Self::Fp8 { codes: source, .. } => &source.info.shape,
            Self::Mxfp4 { shape, .. } => shape,
        }
    }

    /// Bytes that `elements` elements take, which are whole rows where the encoding wants that.
    pub(super) fn bytes(&self, elements: u64) -> u64 {
        match self {
            Self::Plain(source) => elements * source.info.dtype.size(),
            Self::Fp8 { .. } => elements,
            Self::Mxfp4 { .. } => elements / 2,
        }
    }

    /// Whether only whole rows can be decoded.
    pub(super) fn by_rows(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }

    /// Read the scales.
    pub(super) fn decoder(&self) -> Result<Decoder> {
        Ok(match self {
            Self::Plain(_) => Decoder::Plain,
            Self::Fp8 { codes, weight, .. } => {
                let columns = codes.info.shape.last().copied().unwrap_or(1);
                Decoder::Fp8 { scales: weight.read_scales()?, columns }
            }
            Self::Mxfp4 { scales, .. } => Decoder::Mxfp4 { scales: scales.read()? },
        })
    }
}

impl Decoder {
    /// The elements from number `first` of the source on, whose bytes are `bytes`, as floats.
    pub(super) fn decode<'b>(&self, first: u64, bytes: &'b [u8]) -> Cow<'b, [u8]> {
        match self {
            Self::Plain => Cow::Borrowed(bytes),
            Self::Fp8 { scales, columns } => {
                let mut out = vec![0; 2 * bytes.len()];
                scales.decode_rows(bytes, (first / columns) as usize, &mut out);
                Cow::Owned(out)
            }
            Self::Mxfp4 { scales } => {
                let mut out = vec![0; 4 * bytes.len()];
                let (first, groups) = (first as usize / mxfp4::GROUP, out.len() / (2 * mxfp4::GROUP));
                mxfp4::decode(bytes, &scales[first..][..groups], &mut out);
                Cow::Owned(out)
            }
        }
    }
}
