//! The change that a `LoRA` adapter makes to one weight: `scale * B @ A` (Hu et al., arXiv 2106.09685).

use crate::Result;
use crate::isa::vectorized;
use crate::safetensors::Tensor;

/// The factors of a change in an adapter's file, their shapes checked.
#[derive(Debug, Clone, Copy)]
pub struct Factors<'a> {
    a: Tensor<'a>, // (r, in_features)
    b: Tensor<'a>, // (out_features, r)
    scale: f32,
}

/// A low-rank change of one weight of shape (`out_features`, `in_features`), in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    a: Vec<f32>, // (r, in_features)
    b: Vec<f32>, // (out_features, r)
    scale: f32,
    r: usize,
    in_features: usize,
}

impl<'a> Factors<'a> {
    /// The factors of a change of a weight of shape `shape`.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] if they do not have the shapes (r, `in_features`) and (`out_features`, r), with no
    /// dimension of 0, or are not BF16, F16 or F32.
    pub fn open(a: Tensor<'a>, b: Tensor<'a>, scale: f32, shape: &[u64]) -> Result<Self> {
        let &[out_features, in_features] = shape else {
            return Err(a.error(format!("changes a weight of shape {shape:?}, expected two dimensions")));
        };
        let r = a.info.shape.first().copied().unwrap_or(0);
        if r == 0 || a.info.shape != [r, in_features] {
            return Err(a.error(format!("has shape {:?}, expected [r, {in_features}]", a.info.shape)));
        }
        if b.info.shape != [out_features, r] {
            return Err(b.error(format!("has shape {:?}, expected [{out_features}, {r}]", b.info.shape)));
        }
        a.float()?;
        b.float()?;
        Ok(Self { a, b, scale })
    }

    /// Read both factors.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn read(&self) -> Result<Delta> {
        let [r, in_features] = [0, 1].map(|dimension: usize| self.a.info.shape[dimension] as usize);
        Ok(Delta { a: self.a.read_floats()?, b: self.b.read_floats()?, scale: self.scale, r, in_features })
    }
}

impl Delta {
    /// Add rows `first_row..` of the change to `rows`, which holds whole rows of the weight.
    ///
    /// Each row of `B @ A` is summed in f32 in the order of the rank, scaled, then added: per value `r` products and
    /// `r + 1` sums, none of them reordered.
    pub fn add_to(&self, rows: &mut [f32], first_row: usize) {
        let mut delta = vec![0.0; self.in_features];
        let rows = rows.chunks_exact_mut(self.in_features).zip(self.b[first_row * self.r..].chunks_exact(self.r));
        vectorized(
            #[inline(always)]
            || {
                for (row, b) in rows {
                    delta.fill(0.0);
                    for (a, &factor) in self.a.chunks_exact(self.in_features).zip(b) {
                        for (sum, &value) in delta.iter_mut().zip(a) {
                            *sum += factor * value;
                        }
                    }
                    for (value, &change) in row.iter_mut().zip(&delta) {
                        *value += self.scale * change;
                    }
                }
            },
        );
    }
}
