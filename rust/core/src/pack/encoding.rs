//! How the elements of a source tensor are stored: as floats, or encoded beside a tensor of scales.

use std::borrow::Cow;

use crate::safetensors::{Checkpoint, Tensor};
use crate::{Float, Result};

/// A source's encoding, its scales checked.
#[derive(Debug)]
pub(super) enum Encoding<'a> {
    /// Floats that can be computed with, or elements of another type, which can only be kept.
    Plain(Tensor<'a>),
}

/// What decodes a source, read into memory.
pub(super) enum Decoder {
    Plain,
}

impl<'a> Encoding<'a> {
    pub(super) fn open(_checkpoint: &'a Checkpoint, source: Tensor<'a>, scale: Option<&str>) -> Result<Self> {
        match scale {
            None => Ok(Self::Plain(source)),
            Some(scale) => Err(source.error(format!("has no encoding that {scale} decodes"))),
        }
    }

    /// The float type that elements decode to; None where they are no floats.
    pub(super) fn float(&self) -> Option<Float> {
        match self {
            Self::Plain(source) => Float::from_dtype(source.info.dtype),
        }
    }

    /// The tensor of scales.
    pub(super) fn scales(&self) -> Option<Tensor<'a>> {
        match self {
            Self::Plain(_) => None,
        }
    }

    /// Dimensions of the decoded tensor.
    pub(super) fn shape(&self) -> Vec<u64> {
        match self {
            Self::Plain(source) => source.info.shape.clone(),
        }
    }

    /// Bytes that `elements` elements take, which fill whole rows where the encoding wants that.
    pub(super) fn bytes(&self, elements: u64) -> u64 {
        match self {
            Self::Plain(source) => elements * source.info.dtype.size(),
        }
    }

    /// Whether only whole rows can be decoded.
    pub(super) fn by_rows(&self) -> bool {
        match self {
            Self::Plain(_) => false,
        }
    }

    /// Read the scales.
    pub(super) fn decoder(&self) -> Result<Decoder> {
        match self {
            Self::Plain(_) => Ok(Decoder::Plain),
        }
    }
}

impl Decoder {
    /// The elements from number `first` of the source on, whose bytes are `bytes`, as floats.
    pub(super) fn decode<'b>(&self, _first: u64, bytes: &'b [u8]) -> Cow<'b, [u8]> {
        match self {
            Self::Plain => Cow::Borrowed(bytes),
        }
    }
}
