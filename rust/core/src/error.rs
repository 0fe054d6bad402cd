//! The errors of this crate. Messages follow the house rule: lower case, no full stop, the file or tensor first.

use std::io;
use std::path::{Path, PathBuf};

/// Everything that can go wrong while reading, packing, merging or writing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a read or a write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file being read or written.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is not the safetensors file that it should be, or lacks a tensor, or holds one of the wrong kind.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file at fault.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A weight that is NaN or infinite, or would be in the type that it is written in.
    #[error("{}: tensor {tensor} is not finite at flat index {index}", path.display())]
    NonFinite {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's full name.
        tensor: String,
        /// Index into the row-major flattened tensor.
        index: u64,
    },
    /// A source file that should have been supplied was not (see [`crate::stream::Supply`]).
    #[error("{}: {source}", path.display())]
    Supply {
        /// The file.
        path: PathBuf,
        /// What its supplier said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The caller asked to stop (see [`crate::Job::cancel`]).
    #[error("cancelled")]
    Cancelled,
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An adapter for `map_err` that adds the path to an I/O error.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    /// A [`Error::Malformed`] for `path`.
    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), reason: reason.into() }
    }
}
