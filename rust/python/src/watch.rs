//! Long work on threads of its own, while the calling thread reports progress and listens for Ctrl-C.

use std::panic::resume_unwind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use pyo3::prelude::*;
use qpack_core::{Job, Result};

use crate::errors::to_python;

/// How often progress is reported and signals are looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// Run `work` without the GIL, calling `on_progress(done, total)` now and then and at the end.
///
/// An exception out of `on_progress` or a signal handler cancels the work, waits for it to wind up, and is raised.
pub fn watch<T: Send>(
    py: Python<'_>,
    total: u64,
    on_progress: Option<&Py<PyAny>>,
    work: impl FnOnce(&Job) -> Result<T> + Send,
) -> PyResult<T> {
    let job = Job::default();
    let report = |done: u64| {
        Python::attach(|py| {
            py.check_signals()?;
            on_progress.map_or(Ok(()), |callback| callback.call1(py, (done, total)).map(drop))
        })
    };
    py.detach(|| {
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let job = &job;
            let worker = scope.spawn(move || sender.send(work(job)));
            let mut interrupted = Ok(());
            let result = loop {
                match receiver.recv_timeout(INTERVAL) {
                    Ok(result) => break result,
                    Err(RecvTimeoutError::Timeout) if interrupted.is_err() => {}
                    Err(RecvTimeoutError::Timeout) => {
                        interrupted = report(job.done());
                        if interrupted.is_err() {
                            job.cancel();
                        }
                    }
                    // The worker ends without sending only by a panic, which goes on here.
                    Err(RecvTimeoutError::Disconnected) => match worker.join() {
                        Err(panic) => resume_unwind(panic),
                        Ok(_) => unreachable!("a worker that did not panic has sent"),
                    },
                }
            };
            interrupted?;
            let value = result.map_err(to_python)?;
            report(total)?;
            Ok(value)
        })
    })
}
