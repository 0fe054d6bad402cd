//! A safetensors file whose header is written first and whose bytes then arrive by position, from any thread.
//!
//! The file grows under a temporary name beside its own and gets that name by an atomic rename in
//! [`Writer::finish`]. So a file under its final name is whole; one that was not finished can be gone on with.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::header::METADATA_KEY;
use crate::{Dtype, Error, Result, digest};

/// Bytes that are read back at a time.
const READ_BACK: usize = 1 << 20;

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

/// Where every byte of a file goes, known before the first one.
///
/// The tensors' bytes are laid out by falling element size, then by name, as the reference writer does: every tensor is
/// then aligned to its element size. The header carries `{"format": "pt"}`, which transformers asks for.
#[derive(Debug)]
pub struct Layout {
    specs: Vec<TensorSpec>,
    /// The header's length in eight bytes, then its JSON.
    header: Vec<u8>,
    /// Position in the file of each tensor's first byte, in the order of `specs`.
    positions: Vec<u64>,
    file_bytes: u64,
}

impl Layout {
    /// The layout of a file of these tensors.
    pub fn new(specs: Vec<TensorSpec>) -> Self {
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
        let header = [(json.len() as u64).to_le_bytes().as_slice(), &json].concat();
        let data_start = header.len() as u64;
        for position in &mut positions {
            *position += data_start;
        }
        Self { specs, header, positions, file_bytes: data_start + end }
    }

    /// What stands before the tensors' bytes.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
}

/// A safetensors file in the making.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    file: fs::File,
    layout: Arc<Layout>,
}

impl Writer {
    /// Create the file and write its header; or go on with the one that an interrupted run left, finished or not, if it
    /// has the same header. Its tensors hold whatever they held.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, layout: Arc<Layout>) -> Result<Self> {
        let partial = partial_path(path);
        match fs::rename(path, &partial) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(path)(error)),
            _ => {}
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&partial).map_err(Error::io(&partial))?;
        let writer = Self { path: path.to_owned(), partial, file, layout };
        if !writer.is_begun() {
            writer.file.set_len(0).map_err(Error::io(&writer.partial))?;
            writer.file.set_len(writer.layout.file_bytes).map_err(Error::io(&writer.partial))?;
            writer.put(&writer.layout.header, 0)?;
        }
        Ok(writer)
    }

    /// Write `bytes` at byte `offset` of the tensor at `index` in the layout.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_at(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.put(bytes, self.layout.positions[index] + offset)
    }

    /// The digests of `count` tensors from `first` on in the layout, of the bytes that are in the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn digests(&self, first: usize, count: usize) -> Result<Vec<String>> {
        let mut buffer = vec![0; READ_BACK];
        (first..first + count)
            .map(|index| {
                let mut hasher = digest::Hasher::default();
                let (mut position, mut left) = (self.layout.positions[index], self.layout.specs[index].bytes());
                while left > 0 {
                    let piece = &mut buffer[..left.min(READ_BACK as u64) as usize];
                    self.file.read_exact_at(piece, position).map_err(Error::io(&self.partial))?;
                    hasher.update(piece);
                    position += piece.len() as u64;
                    left -= piece.len() as u64;
                }
                Ok(hasher.finish())
            })
            .collect()
    }

    /// Flush what has been written so far to disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io(&self.partial))
    }

    /// Flush to disk and give the file its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io(&self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(Error::io(&self.path))
    }

    /// Whether the file has the header and the size of the layout.
    fn is_begun(&self) -> bool {
        let mut header = vec![0; self.layout.header.len()];
        self.file.metadata().is_ok_and(|metadata| metadata.len() == self.layout.file_bytes)
            && self.file.read_exact_at(&mut header, 0).is_ok()
            && header == self.layout.header
    }

    fn put(&self, bytes: &[u8], position: u64) -> Result<()> {
        self.file.write_all_at(bytes, position).map_err(Error::io(&self.partial))
    }
}

fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}
