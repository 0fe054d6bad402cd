//! A safetensors file whose header is written first and whose bytes then arrive by position, from any thread.
//!
//! The file grows under a temporary name beside its own and gets that name by an atomic rename in
//! [`Writer::finish`]; a writer dropped before that removes what it wrote. So a file under its final name is whole.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::header::METADATA_KEY;
use crate::{Dtype, Error, Result};

/// Name, element type and shape of a tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size()
    }
}

/// A safetensors file in the making.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    file: fs::File,
    /// Position in the file of each tensor's first byte, in the order the specs were given.
    positions: Vec<u64>,
    finished: bool,
}

impl Writer {
    /// Create the file and write its header.
    ///
    /// The tensors' bytes are laid out by falling element size, then by name, as the reference writer does: every
    /// tensor is then aligned to its element size. The header carries `{"format": "pt"}`, which transformers asks for.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path, specs: &[TensorSpec]) -> Result<Self> {
        let mut order: Vec<usize> = (0..specs.len()).collect();
        order.sort_by_key(|&index| (std::cmp::Reverse(specs[index].dtype.size()), &specs[index].name));

        let mut header = serde_json::Map::new();
        header.insert(METADATA_KEY.to_owned(), json!({"format": "pt"}));
        let mut positions = vec![0; specs.len()];
        let mut end = 0;
        for index in order {
            let TensorSpec { name, dtype, shape } = &specs[index];
            positions[index] = end;
            let start = end;
            end += specs[index].bytes();
            header.insert(name.clone(), json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [start, end]}));
        }
        let mut json = serde_json::Value::Object(header).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');

        let data_start = 8 + json.len() as u64;
        for position in &mut positions {
            *position += data_start;
        }
        let partial = partial_path(path);
        let file = fs::File::create(&partial).map_err(Error::io(&partial))?;
        let writer = Self { path: path.to_owned(), partial, file, positions, finished: false };
        writer.put(&(json.len() as u64).to_le_bytes(), 0)?;
        writer.put(&json, 8)?;
        writer.file.set_len(data_start + end).map_err(Error::io(&writer.partial))?;
        Ok(writer)
    }

    /// Write `bytes` at byte `offset` of the tensor at `index` in the list given to [`Writer::create`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_at(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.put(bytes, self.positions[index] + offset)
    }

    /// Flush to disk and give the file its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        self.file.sync_all().map_err(Error::io(&self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(Error::io(&self.path))?;
        self.finished = true;
        Ok(())
    }

    fn put(&self, bytes: &[u8], position: u64) -> Result<()> {
        self.file.write_all_at(bytes, position).map_err(Error::io(&self.partial))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            // The error that led here is the one to report.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}
