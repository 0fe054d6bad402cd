//! The tensors of several safetensors files, found by name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::{File, TensorInfo, TensorSpec};
use crate::{Error, Float, Result};

/// Several open safetensors files whose tensors have distinct names.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<File>,
    /// Indices into `files` and its tensors.
    by_name: HashMap<String, (usize, usize)>,
}

/// One tensor of an open file.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// The file that holds it.
    pub file: &'a File,
    /// Name, dtype, shape and place.
    pub info: &'a TensorInfo,
}

impl Checkpoint {
    /// Open and validate `paths`.
    ///
    /// # Errors
    /// As [`File::open`]; [`Error::Malformed`] if a name occurs twice.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let files = paths.iter().map(|path| File::open(path)).collect::<Result<Vec<_>>>()?;
        let mut by_name = HashMap::new();
        for (file_index, file) in files.iter().enumerate() {
            for (tensor_index, tensor) in file.tensors().iter().enumerate() {
                if let Some((other, _)) = by_name.insert(tensor.name.clone(), (file_index, tensor_index)) {
                    let other: &File = &files[other];
                    let reason = format!("tensor {} is in {} too", tensor.name, other.path().display());
                    return Err(Error::malformed(file.path(), reason));
                }
            }
        }
        Ok(Self { files, by_name })
    }

    /// All tensors, file by file, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.files.iter().flat_map(|file| file.tensors().iter().map(move |info| Tensor { file, info }))
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`Error::Malformed`], naming the first file, if there is none.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.get(name).ok_or_else(|| Error::malformed(self.path(), format!("no tensor {name}")))
    }

    /// Where the first file is.
    pub fn path(&self) -> &Path {
        self.files.first().map_or(Path::new(""), File::path)
    }

    /// The tensor of this name, if there is one.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let &(file, tensor) = self.by_name.get(name)?;
        let file = &self.files[file];
        Some(Tensor { file, info: &file.tensors()[tensor] })
    }
}

impl Tensor<'_> {
    /// A [`Error::Malformed`] that names the file and this tensor.
    pub fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::malformed(self.file.path(), format!("tensor {}: {reason}", self.info.name))
    }

    /// That value `index` of the tensor `name`, which is this one or made of it, is NaN or infinite.
    pub(crate) fn non_finite(&self, name: &str, index: u64) -> Error {
        Error::NonFinite { path: self.file.path().to_owned(), tensor: name.to_owned(), index }
    }

    /// The float type of the elements.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is not one that weights are computed from.
    pub fn float(&self) -> Result<Float> {
        let dtype = self.info.dtype;
        Float::from_dtype(dtype).ok_or_else(|| self.error(format!("is {}, expected BF16, F16 or F32", dtype.name())))
    }

    /// What a file that holds this tensor as it is says of it.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.info.name.clone(), dtype: self.info.dtype, shape: self.info.shape.clone() }
    }

    /// Ask the system to read what stands behind the first `offset` bytes before it is needed.
    pub fn read_ahead(&self, offset: u64) {
        self.file.read_ahead(self.info, offset);
    }

    /// Fill `buffer` with the bytes from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_at(self.info, offset, buffer)
    }

    /// All bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.info.bytes() as usize];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// All elements as f32.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] if the elements are not BF16, F16 or F32.
    pub fn read_floats(&self) -> Result<Vec<f32>> {
        let float = self.float()?;
        let mut out = vec![0.0; self.info.elements() as usize];
        float.decode(&self.read()?, &mut out);
        Ok(out)
    }
}
