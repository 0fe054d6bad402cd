//! An open safetensors file: header validated once, bytes read by position from any thread.

use std::fs;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{Advice, fadvise};

use super::header::{self, TensorInfo};
use crate::sync::lock;
use crate::{Error, Result};

/// How far the system reads ahead of what is asked for: the disk goes on while nothing is asked for.
const READ_AHEAD: u64 = 64 << 20;

/// How much more is asked for at a time.
const READ_AHEAD_STEP: u64 = 4 << 20;

/// An open safetensors file.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    /// None between [`File::close`] and the next read.
    handle: Mutex<Option<Arc<Handle>>>,
    /// Length in eight bytes and JSON, by which a file that is opened again is known.
    header: Vec<u8>,
    len: u64,
    /// Up to where the system has been asked to read ahead.
    advised: AtomicU64,
    tensors: Vec<TensorInfo>,
}

/// The file that bytes are read from.
#[derive(Debug)]
struct Handle {
    path: PathBuf,
    file: fs::File,
}

impl File {
    /// Open `path` and validate its header against its size.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Malformed`] saying which rule of the format is broken.
    pub fn open(path: &Path) -> Result<Self> {
        let file = fs::File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let header = read_header(path, &file, len)?;
        let data_len = len - header.len() as u64;
        let tensors = header::parse(&header[8..], data_len).map_err(|reason| Error::malformed(path, reason))?;
        let handle = Handle { path: path.to_owned(), file };
        Ok(Self {
            path: path.to_owned(),
            handle: Mutex::new(Some(Arc::new(handle))),
            header,
            len,
            advised: AtomicU64::new(0),
            tensors,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, in the order of their bytes.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Let go of the file, so that its disk space can be freed. The next read opens it again.
    pub fn close(&self) {
        self.lock().take();
    }

    /// Read from `path` from now on, unless that is already so.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] if it is not a file of the same length and header.
    pub fn open_at(&self, path: &Path) -> Result<()> {
        let mut handle = self.lock();
        if handle.as_ref().is_none_or(|handle| handle.path != path) {
            *handle = Some(Arc::new(self.reopen(path)?));
        }
        Ok(())
    }

    /// Whether it is read from another place than where it was first opened.
    pub fn is_elsewhere(&self) -> bool {
        self.lock().as_ref().is_some_and(|handle| handle.path != self.path)
    }

    /// Ask the system to read what stands behind the first `offset` bytes of `tensor` before it is needed. For one who
    /// reads the file front to back.
    pub fn read_ahead(&self, tensor: &TensorInfo, offset: u64) {
        let wanted = self.position(tensor, offset) + READ_AHEAD;
        let advised = self.advised.load(Ordering::Relaxed).max(wanted - READ_AHEAD);
        if let (Some(len @ READ_AHEAD_STEP..), Ok(handle)) = (wanted.checked_sub(advised), self.handle()) {
            self.advised.store(wanted, Ordering::Relaxed);
            // Only advice: where it is not taken, reading is as it was.
            let _ = fadvise(&handle.file, advised, NonZero::new(len), Advice::WillNeed);
        }
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
        let position = self.position(tensor, offset);
        let handle = self.handle()?;
        handle.file.read_exact_at(buffer, position).map_err(Error::io(&handle.path))
    }

    fn position(&self, tensor: &TensorInfo, offset: u64) -> u64 {
        self.header.len() as u64 + tensor.range.start + offset
    }

    fn handle(&self) -> Result<Arc<Handle>> {
        let mut handle = self.lock();
        if let Some(handle) = &*handle {
            return Ok(handle.clone());
        }
        Ok(handle.insert(Arc::new(self.reopen(&self.path)?)).clone())
    }

    fn reopen(&self, path: &Path) -> Result<Handle> {
        let file = fs::File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        if len != self.len || read_header(path, &file, len)? != self.header {
            return Err(Error::malformed(path, "is not the file that it was when its header was read"));
        }
        Ok(Handle { path: path.to_owned(), file })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Handle>>> {
        lock(&self.handle)
    }
}

/// The first bytes of a file of `file_len` bytes: the header's length and the header.
fn read_header(path: &Path, handle: &fs::File, file_len: u64) -> Result<Vec<u8>> {
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
    if file_len - 8 < header_len {
        let reason = format!("header of {header_len} bytes does not fit in a file of {file_len}: truncated?");
        return Err(Error::malformed(path, reason));
    }
    let mut header = vec![0; 8 + header_len as usize];
    handle.read_exact_at(&mut header, 0).map_err(Error::io(path))?;
    Ok(header)
}
