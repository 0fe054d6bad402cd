//! Bytes and arithmetic of qpack.
//!
//! Data flows one way: a [`safetensors::File`] is validated once, on open; a [`stream::Plan`] fixes every output header
//! before the first byte; [`stream::Plan::write`] then runs one [`stream::Recipe`] per tensor ([`pack`]), chunk by
//! chunk and in any order, since every byte's place is known; a weight may be changed on its way ([`merge`]). Nothing here
//! knows about models, Hugging Face or Python: which tensors to pack, and where an adapter's change goes, is decided by
//! the caller.

#![cfg_attr(test, allow(clippy::float_cmp, reason = "the tests are about exact values"))]

pub mod digest;
mod dtype;
pub mod encoded;
mod error;
mod isa;
mod job;
pub mod merge;
pub mod nested;
pub mod nf4;
pub mod pack;
pub mod packed;
pub mod quant_state;
pub mod safetensors;
pub mod search;
pub mod statistics;
pub mod stream;
mod sync;
pub mod verify;

pub use dtype::{Dtype, Float};
pub use error::{Error, Result};
pub use isa::Isa;
pub use job::Job;
