//! Progress and cancellation, shared between the threads that work and the one that watches.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{Error, Result};

/// One long piece of work: bytes done so far, and whether it should stop.
#[derive(Debug, Default)]
pub struct Job {
    done: AtomicU64,
    cancelled: AtomicBool,
}

impl Job {
    /// Bytes of source data dealt with so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ask the work to stop; it returns [`Error::Cancelled`] within one chunk.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Count `bytes` as done.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once [`Job::cancel`] was called.
    pub(crate) fn advance(&self, bytes: u64) -> Result<()> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
