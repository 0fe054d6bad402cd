//! The change that a `LoRA` adapter makes to one weight: `scale * B @ A` (Hu et al., arXiv 2106.09685).

use crate::Result;
use crate::safetensors::Tensor;

/// A low-rank change of one weight of shape (`out_features`, `in_features`), in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    a: Vec<f32>, // (r, in_features)
    b: Vec<f32>, // (out_features, r)
    scale: f32,
    r: usize,
    in_features: usize,
}

impl Delta {
    /// Read both factors of a change of a weight of shape `shape`.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] if the factors do not have the shapes (r, `in_features`) and (`out_features`, r).
    pub fn read(a: Tensor<'_>, b: Tensor<'_>, scale: f32, shape: &[u64]) -> Result<Self> {
        let &[out_features, in_features] = shape else {
            return Err(a.error(format!("changes a weight of shape {shape:?}, expected two dimensions")));
        };
        let &[r, columns] = a.info.shape.as_slice() else {
            return Err(a.error(format!("has shape {:?}, expected (r, in_features)", a.info.shape)));
        };
        if columns != in_features {
            return Err(a.error(format!("has in_features {columns}, the base has {in_features}")));
        }
        if b.info.shape != [out_features, r] {
            return Err(b.error(format!("has shape {:?}, expected [{out_features}, {r}]", b.info.shape)));
        }
        let (r, in_features) = (r as usize, in_features as usize);
        Ok(Self { a: a.read_floats()?, b: b.read_floats()?, scale, r, in_features })
    }

    /// Add rows `first_row..` of the change to `rows`, which holds whole rows of the weight.
    ///
    /// Each row of `B @ A` is summed in f32 in the order of the rank, scaled, then added: per value `r` products and
    /// `r + 1` sums, none of them reordered.
    pub fn add_to(&self, rows: &mut [f32], first_row: usize) {
        let mut delta = vec![0.0; self.in_features];
        for (row, b) in rows.chunks_exact_mut(self.in_features).zip(self.b[first_row * self.r..].chunks_exact(self.r)) {
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
    }
}
