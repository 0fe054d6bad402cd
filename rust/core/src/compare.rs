//! How far stored tensors are from what they were made from.
//!
//! A packed weight is decoded and subtracted; with `x` the values before packing and `x'` those decoded,
//!
//! ```text
//! relative = sqrt(sum (x - x')^2 / sum x^2)      over the whole weight, or over one block
//! ```
//!
//! every square and sum in f64, in an order that does not depend on the number of threads. A tensor that was kept must
//! be equal, bit for bit, to its source rounded once to the stored type. What a weight is compared with is anything
//! that gives [`Values`]: a tensor, or part of one that is decoded on the way.

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::isa::vectorized;
use crate::merge::Packed;
use crate::safetensors::{Checkpoint, Tensor};
use crate::stream::CHUNK;
use crate::{Float, Job, Result, nf4};

/// Sums that a block's squares are added up in, element by element in turn.
const LANES: usize = 16;

/// Values in f32, found by their index in a row-major flattened weight.
pub trait Values: Sync {
    /// Number of values.
    fn elements(&self) -> u64;

    /// Fill `out` with the values from `first` on, through `bytes` as scratch.
    ///
    /// # Errors
    /// Whatever reading or decoding runs into.
    fn read_at(&self, first: u64, out: &mut [f32], bytes: &mut Vec<u8>) -> Result<()>;
}

impl Values for Tensor<'_> {
    fn elements(&self) -> u64 {
        self.info.elements()
    }

    fn read_at(&self, first: u64, out: &mut [f32], bytes: &mut Vec<u8>) -> Result<()> {
        self.read_floats_at(first, out, bytes)
    }
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Found {
    /// How far a packed weight is from its source.
    Packed(Distance),
    /// The index of the first element of a kept tensor that differs from its source, if one does.
    Kept(Option<u64>),
}

/// The error of a packed weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    /// Over the whole weight; 0 for a weight of zeros.
    pub relative: f64,
    /// Of the block where it is largest.
    pub worst: f64,
    /// The first such block.
    pub worst_block: u64,
}

/// Compare the weight `name` of `stored` with the tensor `original`. Progress is counted in the source's bytes.
///
/// # Errors
/// [`crate::Error::Malformed`] if the shapes differ, the types cannot be compared, or the source of a packed weight is
/// not finite; [`crate::Error::Io`], [`crate::Error::Cancelled`].
pub fn compare(stored: &Checkpoint, name: &str, original: Tensor<'_>, job: &Job) -> Result<Found> {
    if Packed::is(stored, name) {
        original.float()?;
        same_shape(stored.tensor(name)?, &Packed::open(stored, name)?.state().shape, &original)?;
        let distance = distance(stored, name, &original, original.info.dtype.size(), job)?;
        return distance.map(Found::Packed).ok_or_else(|| original.error("holds values that are not finite"));
    }
    let kept = stored.tensor(name)?;
    same_shape(kept, &kept.info.shape, &original)?;
    first_difference(kept, original, job).map(Found::Kept)
}

/// How far the packed weight `name` is from `original`, whose elements have `size` bytes each; None if a value of it is
/// not finite.
///
/// # Errors
/// As [`Packed::open`]; [`crate::Error::Io`], [`crate::Error::Cancelled`].
///
/// # Panics
/// If the numbers of elements differ.
pub fn distance(
    stored: &Checkpoint,
    name: &str,
    original: &impl Values,
    size: u64,
    job: &Job,
) -> Result<Option<Distance>> {
    let codes = stored.tensor(name)?;
    let packed = Packed::open(stored, name)?;
    let (blocksize, total) = (packed.state().blocksize, packed.state().elements());
    assert_eq!(total, original.elements(), "{name} and its source differ in number");
    let scales = packed.read_scales()?;
    let chunks = (0..total.div_ceil(CHUNK as u64)).into_par_iter();
    let parts = chunks.map_init(Scratch::default, |Scratch { bytes, decoded, values }, chunk| {
        let first = chunk * CHUNK as u64;
        let len = (total - first).min(CHUNK as u64) as usize;
        decoded.resize(len, 0.0);
        values.resize(len, 0.0);
        bytes.resize(len.div_ceil(2), 0);
        codes.read_at(first / 2, bytes)?;
        let first_block = (first / blocksize as u64) as usize;
        nf4::dequantize(bytes, &scales[first_block..][..len.div_ceil(blocksize)], blocksize, decoded);
        original.read_at(first, values, bytes)?;
        job.advance(len as u64 * size)?;
        Ok(Squares::of(values, decoded, blocksize, first_block as u64))
    });
    let parts: Vec<Squares> = parts.collect::<Result<_>>()?;
    let all = parts.into_iter().reduce(Squares::and).unwrap_or_default();
    Ok(all.values.is_finite().then(|| Distance {
        relative: ratio(all.differences, all.values).sqrt(),
        worst: all.worst.sqrt(),
        worst_block: all.worst_block,
    }))
}

/// Sums of squares over some blocks.
#[derive(Debug, Clone, Copy, Default)]
struct Squares {
    differences: f64,
    values: f64,
    /// The largest ratio of the two over one block.
    worst: f64,
    worst_block: u64,
}

impl Squares {
    fn of(values: &[f32], decoded: &[f32], blocksize: usize, first_block: u64) -> Self {
        vectorized(
            #[inline(always)]
            || {
                let blocks = values.chunks(blocksize).zip(decoded.chunks(blocksize));
                let blocks = (first_block..).zip(blocks).map(
                    #[inline(always)]
                    |(block, (values, decoded))| Self::of_block(block, values, decoded),
                );
                blocks.fold(Self::default(), Self::and)
            },
        )
    }

    #[inline(always)]
    fn of_block(block: u64, values: &[f32], decoded: &[f32]) -> Self {
        let (mut differences, mut squares) = ([0.0; LANES], [0.0; LANES]);
        for (values, decoded) in values.chunks(LANES).zip(decoded.chunks(LANES)) {
            let lanes = squares.iter_mut().zip(&mut differences).zip(values.iter().zip(decoded));
            for ((square, difference), (&value, &decoded)) in lanes {
                let (value, decoded) = (f64::from(value), f64::from(decoded));
                *square += value * value;
                *difference += (value - decoded) * (value - decoded);
            }
        }
        let (differences, values) = (differences.iter().sum(), squares.iter().sum());
        Self { differences, values, worst: ratio(differences, values), worst_block: block }
    }

    /// These blocks and the `later` ones.
    #[inline(always)]
    fn and(self, later: Self) -> Self {
        let worse = if later.worst > self.worst { later } else { self };
        Self { differences: self.differences + later.differences, values: self.values + later.values, ..worse }
    }
}

/// `differences / values`; 0 where there are no values but zeros, which NF4 stores exactly.
#[inline(always)]
fn ratio(differences: f64, values: f64) -> f64 {
    if values > 0.0 { differences / values } else { 0.0 }
}

fn first_difference(kept: Tensor<'_>, original: Tensor<'_>, job: &Job) -> Result<Option<u64>> {
    let total = kept.info.elements();
    let (to, from) = (kept.info.dtype, original.info.dtype);
    let floats = Float::from_dtype(to).zip(Float::from_dtype(from));
    if to != from && floats.is_none() {
        return Err(kept.error(format!("is {}, which is no rounding of {}", to.name(), from.name())));
    }
    let first_different = AtomicU64::new(u64::MAX);
    let chunks = (0..total.div_ceil(CHUNK as u64)).into_par_iter();
    chunks.try_for_each_init(
        || (Vec::new(), Scratch::default()),
        |(stored, Scratch { bytes, values, .. }), chunk| {
            let first = chunk * CHUNK as u64;
            let len = (total - first).min(CHUNK as u64) as usize;
            stored.resize(len * to.size() as usize, 0);
            kept.read_at(first * to.size(), stored)?;
            if let Some((to, _)) = floats.filter(|_| to != from) {
                values.resize(len, 0.0);
                original.read_floats_at(first, values, bytes)?;
                bytes.resize(stored.len(), 0);
                to.encode(values, bytes);
            } else {
                bytes.resize(stored.len(), 0);
                original.read_at(first * from.size(), bytes)?;
            }
            if let Some(byte) = stored.iter().zip(&*bytes).position(|(stored, expected)| stored != expected) {
                first_different.fetch_min(first + byte as u64 / to.size(), Ordering::Relaxed);
            }
            job.advance(len as u64 * from.size())
        },
    )?;
    let first_different = first_different.into_inner();
    Ok((first_different != u64::MAX).then_some(first_different))
}

fn same_shape(stored: Tensor<'_>, shape: &[u64], original: &Tensor<'_>) -> Result<()> {
    if shape == original.info.shape {
        return Ok(());
    }
    Err(stored.error(format!("has shape {shape:?}, its source {:?}", original.info.shape)))
}

/// Buffers that a thread keeps from chunk to chunk.
#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    decoded: Vec<f32>,
    values: Vec<f32>,
}
