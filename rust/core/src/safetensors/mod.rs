//! The safetensors container: eight bytes of header length, a JSON header, then the tensors' bytes.
//!
//! Reference: <https://github.com/huggingface/safetensors#format>. Files are read and written by position, never
//! mapped: a file that shrinks underneath gives an error instead of a signal, and memory use is what is asked for.

mod checkpoint;
mod header;
mod index;
mod reader;
mod writer;

pub use checkpoint::{Checkpoint, Tensor};
pub use header::{TensorInfo, parse as parse_header};
pub use index::parse_index;
pub use reader::File;
pub use writer::{Layout, TensorSpec, Writer};
