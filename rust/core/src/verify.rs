//! Is what stands on disk what was written? The digest of every tensor, and the packed weights whose tensors do not
//! fit together.
//!
//! Files are read once, by position, a chunk a thread in memory. Nothing stops at the first problem but a read that the
//! operating system refuses.

use rayon::prelude::*;

use crate::digest::Hasher;
use crate::packed::Packed;
use crate::safetensors::{Checkpoint, Tensor};
use crate::stream::CHUNK;
use crate::{Error, Job, Result, nf4, quant_state};

/// The digest of each of `tensors`, in their order.
///
/// # Errors
/// [`Error::Io`], [`Error::Cancelled`].
pub fn digests<'a>(tensors: Vec<Tensor<'a>>, job: &Job) -> Result<Vec<(Tensor<'a>, String)>> {
    let digests = tensors.into_par_iter().map_init(
        || vec![0; CHUNK],
        |buffer, tensor| {
            let mut hasher = Hasher::default();
            let total = tensor.info.bytes();
            for offset in (0..total).step_by(CHUNK) {
                let bytes = &mut buffer[..(total - offset).min(CHUNK as u64) as usize];
                tensor.read_at(offset, bytes)?;
                hasher.update(bytes);
                job.advance(bytes.len() as u64)?;
            }
            Ok((tensor, hasher.finish()))
        },
    );
    digests.collect()
}

/// A packed weight that cannot be decoded, or not to what it says.
#[derive(Debug)]
pub struct Broken {
    /// Name of the weight.
    pub weight: String,
    /// What is wrong, naming the file and the tensor.
    pub error: Error,
}

/// The packed weights of `checkpoint` whose tensors are missing, do not fit their quant state, or hold scales that are
/// not finite or levels that are not those of NF4; tensors that stand beside no packed weight too.
///
/// # Errors
/// [`Error::Io`].
pub fn broken(checkpoint: &Checkpoint) -> Result<Vec<Broken>> {
    let mut broken = Vec::new();
    for tensor in checkpoint.tensors() {
        let name = &tensor.info.name;
        let Some(weight) = quant_state::weight_of(name) else { continue };
        let checked = match name.ends_with(quant_state::STATE) {
            true => check(checkpoint, weight),
            false if Packed::is(checkpoint, weight) => continue, // checked with the quant state
            false => Err(tensor.error(format!("stands beside no {weight}{}", quant_state::STATE))),
        };
        match checked {
            Ok(()) => {}
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(error) => broken.push(Broken { weight: weight.to_owned(), error }),
        }
    }
    Ok(broken)
}

fn check(checkpoint: &Checkpoint, weight: &str) -> Result<()> {
    let packed = Packed::open(checkpoint, weight)?;
    let levels = checkpoint.tensor(&format!("{weight}{}", quant_state::QUANT_MAP))?;
    // bitsandbytes decodes with its own levels, whatever stands here.
    if levels.read_floats()? != nf4::LEVELS {
        return Err(levels.error("holds other levels than those of NF4"));
    }
    if let Some(block) = packed.read_scales()?.iter().position(|scale| !scale.is_finite()) {
        let absmax = checkpoint.tensor(&format!("{weight}{}", quant_state::ABSMAX))?;
        return Err(absmax.error(format!("the scale of block {block} is not finite")));
    }
    Ok(())
}
