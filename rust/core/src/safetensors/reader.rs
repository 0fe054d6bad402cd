//! An open safetensors file: header validated once, bytes read by position from any thread.

use std::fs;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};

use super::header::{self, TensorInfo};
use crate::{Error, Result};

/// How far the system reads ahead of what is asked for.
const READ_AHEAD: NonZero<u64> = NonZero::new(16 << 20).unwrap();

/// An open safetensors file.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    handle: fs::File,
    data_start: u64,
    tensors: Vec<TensorInfo>,
}

impl File {
    /// Open `path` and validate its header against its size.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Malformed`] saying which rule of the format is broken.
    pub fn open(path: &Path) -> Result<Self> {
        let handle = fs::File::open(path).map_err(Error::io(path))?;
        let file_len = handle.metadata().map_err(Error::io(path))?.len();
        if file_len < 8 {
            return Err(Error::malformed(path, format!("{file_len} bytes are too few for a safetensors file")));
        }
        let mut length = [0; 8];
        handle.read_exact_at(&mut length, 0).map_err(Error::io(path))?;
        let header_len = u64::from_le_bytes(length);
        if header_len > header::MAX_HEADER_LEN {
            let limit = header::MAX_HEADER_LEN;
            return Err(Error::malformed(path, format!("header length {header_len} is over the limit of {limit}")));
        }
        let Some(data_len) = (file_len - 8).checked_sub(header_len) else {
            let reason = format!("header of {header_len} bytes does not fit in a file of {file_len}: truncated?");
            return Err(Error::malformed(path, reason));
        };
        let mut json = vec![0; header_len as usize];
        handle.read_exact_at(&mut json, 8).map_err(Error::io(path))?;
        let tensors = header::parse(&json, data_len).map_err(|reason| Error::malformed(path, reason))?;
        Ok(Self { path: path.to_owned(), handle, data_start: 8 + header_len, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, in the order of their bytes.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Ask the system to read what stands behind the first `offset` bytes of `tensor` before it is needed.
    pub fn read_ahead(&self, tensor: &TensorInfo, offset: u64) {
        let position = self.data_start + tensor.range.start + offset;
        // Only advice: where it is not taken, reading is as it was.
        let _ = fadvise(&self.handle, position, Some(READ_AHEAD), Advice::WillNeed);
    }

    /// Fill `buffer` with the bytes of `tensor` from its byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Io`], also when the file has shrunk since it was opened.
    ///
    /// # Panics
    /// If the bytes asked for leave the tensor.
    pub fn read_at(&self, tensor: &TensorInfo, offset: u64, buffer: &mut [u8]) -> Result<()> {
        assert!(offset + buffer.len() as u64 <= tensor.bytes(), "read leaves tensor {}", tensor.name);
        let position = self.data_start + tensor.range.start + offset;
        self.handle.read_exact_at(buffer, position).map_err(Error::io(&self.path))
    }
}
