//! The JSON header: parsed strictly, checked against the file's size, so that later reads need no checks.
//!
//! Refused, each with the tensor's name: unknown dtypes, sizes that overflow or disagree with their byte range, ranges
//! that overlap, leave holes or leave the file, names given twice, unknown fields.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use crate::Dtype;

/// The reference implementation's limit on the header's length in bytes.
pub(super) const MAX_HEADER_LEN: u64 = 100_000_000;

/// The header key that holds free-form strings instead of a tensor.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// One tensor of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Byte range, counted from the end of the header.
    pub range: Range<u64>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// The tensors of a file whose header is `json` and whose data has `data_len` bytes, in the order of their bytes.
///
/// # Errors
/// One line saying what is wrong, without the file's name.
pub fn parse(json: &[u8], data_len: u64) -> Result<Vec<TensorInfo>, String> {
    let raw: RawHeader = serde_json::from_slice(json).map_err(|error| format!("header is not valid: {error}"))?;
    let mut tensors = raw.0.into_iter().map(|(name, entry)| entry.check(name)).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
    let mut end = 0;
    for tensor in &tensors {
        let Range { start, end: next } = tensor.range;
        if start < end {
            return Err(format!(
                "tensor {} overlaps the tensor before it (starts at {start}, expected {end})",
                tensor.name
            ));
        }
        if start > end {
            return Err(format!("hole before tensor {} (starts at {start}, expected {end})", tensor.name));
        }
        if next > data_len {
            return Err(format!(
                "tensor {} ends at byte {next} of the data, which has {data_len}: truncated?",
                tensor.name
            ));
        }
        end = next;
    }
    if end != data_len {
        return Err(format!("{} bytes after the last tensor belong to none", data_len - end));
    }
    Ok(tensors)
}

/// A header as it stands in the file, names in file order.
struct RawHeader(Vec<(String, RawTensor)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn check(self, name: String) -> Result<TensorInfo, String> {
        let (start, end) = self.data_offsets;
        let dtype =
            Dtype::parse(&self.dtype).ok_or_else(|| format!("tensor {name} has unknown dtype {:?}", self.dtype))?;
        let bytes = self
            .shape
            .iter()
            .try_fold(dtype.size(), |product, &dim| product.checked_mul(dim))
            .ok_or_else(|| format!("tensor {name} of shape {:?} has too many bytes to count", self.shape))?;
        if end.checked_sub(start) != Some(bytes) {
            return Err(format!(
                "tensor {name} of shape {:?} and dtype {} needs {bytes} bytes, its offsets are {start}..{end}",
                self.shape, self.dtype
            ));
        }
        Ok(TensorInfo { name, dtype, shape: self.shape, range: start..end })
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut seen = BTreeMap::new();
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if seen.insert(name.clone(), ()).is_some() {
                        return Err(serde::de::Error::custom(format!("{name} is given twice")));
                    }
                    if name == METADATA_KEY {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(tensors))
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}
