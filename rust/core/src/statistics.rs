//! What the codes and scales of one packed weight look like.

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::packed::Packed;
use crate::safetensors::Checkpoint;
use crate::stream::CHUNK;
use crate::{Job, Result};

/// Counts and ranges over one packed weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Statistics {
    /// How many weights have each of the sixteen codes.
    pub codes: [u64; 16],
    /// The smallest block scale, as decoded.
    pub smallest: f32,
    /// The mean of the block scales, summed in f64.
    pub mean: f64,
    /// The largest block scale.
    pub largest: f32,
    /// Number of negative block scales.
    pub negative: u64,
}

/// Read the codes and scales of the packed weight `name`.
///
/// # Errors
/// As [`Packed::open`]; [`crate::Error::Io`], [`crate::Error::Cancelled`].
pub fn of(checkpoint: &Checkpoint, name: &str, job: &Job) -> Result<Statistics> {
    let packed = Packed::open(checkpoint, name)?;
    let tensor = checkpoint.tensor(name)?;
    let scales = packed.read_scales()?;
    let counts = [const { AtomicU64::new(0) }; 256];
    let total = tensor.info.bytes();
    (0..total.div_ceil(CHUNK as u64)).into_par_iter().try_for_each_init(Vec::new, |bytes, chunk| {
        let offset = chunk * CHUNK as u64;
        bytes.resize((total - offset).min(CHUNK as u64) as usize, 0);
        tensor.read_at(offset, bytes)?;
        let mut found = [0_u64; 256];
        for &byte in &*bytes {
            found[usize::from(byte)] += 1;
        }
        for (count, found) in counts.iter().zip(found) {
            count.fetch_add(found, Ordering::Relaxed);
        }
        job.advance(bytes.len() as u64)
    })?;
    let mut codes = [0; 16];
    for (byte, count) in counts.iter().enumerate() {
        let count = count.load(Ordering::Relaxed);
        codes[byte >> 4] += count;
        codes[byte & 15] += count;
    }
    if packed.state().elements() % 2 == 1 {
        // The low half of the last byte belongs to no weight.
        let mut last = [0];
        tensor.read_at(total - 1, &mut last)?;
        codes[usize::from(last[0] & 15)] -= 1;
    }
    Ok(Statistics {
        codes,
        smallest: scales.iter().copied().fold(f32::INFINITY, f32::min),
        mean: scales.iter().map(|&scale| f64::from(scale)).sum::<f64>() / scales.len().max(1) as f64,
        largest: scales.iter().copied().fold(f32::NEG_INFINITY, f32::max),
        negative: scales.iter().filter(|&&scale| scale < 0.0).count() as u64,
    })
}
