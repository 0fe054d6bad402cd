//! Digests of tensors, and the fingerprint of a checkpoint.
//!
//! A digest is BLAKE3 of a tensor's bytes as stored, in hexadecimal. A fingerprint is the digest of the lines
//! `NAME DTYPE SHAPE DIGEST`, sorted, each ending in a newline, the shape as in `[2, 3]`: it does not depend on how the
//! tensors are spread over files. Reference: <https://github.com/BLAKE3-team/BLAKE3-specs>.

use crate::Dtype;

/// The digest of all of `bytes`.
pub fn of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// What stands behind a tensor's name in a line of the fingerprint.
pub fn line(dtype: Dtype, shape: &[u64], digest: &str) -> String {
    format!("{} {shape:?} {digest}", dtype.name())
}

/// A digest of bytes that come piece by piece.
#[derive(Debug, Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Go on with `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes so far.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

/// The fingerprint of tensors that come in any order.
#[derive(Debug, Default)]
pub struct Fingerprint(Vec<String>);

impl Fingerprint {
    /// Add one tensor.
    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[u64], digest: &str) {
        self.0.push(format!("{name} {}\n", line(dtype, shape, digest)));
    }

    /// The fingerprint of all tensors added.
    pub fn finish(mut self) -> String {
        self.0.sort_unstable();
        of(self.0.concat().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_does_not_depend_on_the_order() {
        let of = |order: [usize; 2]| {
            let tensors = [("a", Dtype::U8, [3_u64].as_slice()), ("b", Dtype::F32, &[2, 3])];
            let mut fingerprint = Fingerprint::default();
            for (name, dtype, shape) in order.map(|index| tensors[index]) {
                fingerprint.add(name, dtype, shape, &super::of(name.as_bytes()));
            }
            fingerprint.finish()
        };
        assert_eq!(of([0, 1]), of([1, 0]));
        let lines = [("a U8 [3]", "a"), ("b F32 [2, 3]", "b")]
            .map(|(head, bytes)| format!("{head} {}\n", super::of(bytes.as_bytes())));
        assert_eq!(of([0, 1]), super::of(lines.concat().as_bytes()));
    }
}
