//! Chunks on their way from the reader to the workers.
//!
//! The reader waits for a free buffer, of which there are few: that bounds the memory. Fresh chunks come first, so that
//! the disk is never waited for in vain; but once [`MANY_AGAIN`] chunks wait to be seen again, while their bytes are
//! still in the page cache, those do.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::sync::lock;
use crate::{Error, Result};

/// Chunks that wait to be seen again before fresh ones have to.
const MANY_AGAIN: usize = 256;

/// One chunk of one run.
pub(super) struct Task<R> {
    pub(super) run: R,
    pub(super) chunk: usize,
    /// None where the worker is to read them itself.
    pub(super) bytes: Option<Vec<u8>>,
}

pub(super) struct Queue<R> {
    state: Mutex<State<R>>,
    changed: Condvar,
}

struct State<R> {
    fresh: VecDeque<Task<R>>,
    again: VecDeque<Task<R>>,
    buffers: Vec<Vec<u8>>,
    reading: bool,
    /// Tasks that workers are at.
    running: usize,
    closed: bool,
    resumed: u64,
    failure: Option<Error>,
}

impl<R> Queue<R> {
    /// A queue whose reader gets `buffers` buffers.
    pub(super) fn new(buffers: usize) -> Self {
        let state = State {
            fresh: VecDeque::new(),
            again: VecDeque::new(),
            buffers: (0..buffers).map(|_| Vec::new()).collect(),
            reading: true,
            running: 0,
            closed: false,
            resumed: 0,
            failure: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// A free buffer, or None if something has failed.
    pub(super) fn buffer(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if state.failure.is_some() {
                return None;
            }
            if let Some(buffer) = state.buffers.pop() {
                return Some(buffer);
            }
            state = self.wait(state);
        }
    }

    pub(super) fn push(&self, task: Task<R>) {
        self.lock().fresh.push_back(task);
        self.changed.notify_all();
    }

    pub(super) fn push_again(&self, task: Task<R>) {
        self.lock().again.push_back(task);
        self.changed.notify_all();
    }

    /// The next task, or None when there will be none.
    pub(super) fn next(&self) -> Option<Task<R>> {
        let mut state = self.lock();
        loop {
            if state.failure.is_some() {
                return None;
            }
            let State { fresh, again, .. } = &mut *state;
            let task = if again.len() < MANY_AGAIN { fresh.pop_front() } else { None };
            if let Some(task) = task.or_else(|| again.pop_front()).or_else(|| fresh.pop_front()) {
                state.running += 1;
                return Some(task);
            }
            if !state.reading && state.running == 0 {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// A task is done: its buffer is free again.
    pub(super) fn done(&self, buffer: Option<Vec<u8>>, result: Result<()>) {
        let mut state = self.lock();
        state.running -= 1;
        state.buffers.extend(buffer);
        state.fail(result);
        drop(state);
        self.changed.notify_all();
    }

    /// The reader has nothing more to hand out.
    pub(super) fn end_of_reading(&self, result: Result<()>) {
        let mut state = self.lock();
        state.reading = false;
        state.fail(result);
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn count_resumed(&self, bytes: u64) {
        self.lock().resumed += bytes;
    }

    /// What to hold while working: should it be dropped by a panic, everyone else stops too, instead of waiting for ever.
    pub(super) fn stop_on_panic(&self) -> StopOnPanic<'_, R> {
        StopOnPanic(self)
    }

    /// Wait until everything that was pushed is done, or something has failed.
    pub(super) fn wait_idle(&self) {
        let busy = |state: &mut State<R>| {
            state.failure.is_none() && !(state.fresh.is_empty() && state.again.is_empty() && state.running == 0)
        };
        let _idle = self.changed.wait_while(self.lock(), busy).unwrap_or_else(PoisonError::into_inner);
    }

    /// All workers have ended.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Wait for at most `interval`, and say whether the queue is closed.
    pub(super) fn wait_closed(&self, interval: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), interval, |state| !state.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    /// The bytes that were counted as resumed, or the first error.
    pub(super) fn into_result(self) -> Result<u64> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.failure.map_or(Ok(state.resumed), Err)
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        lock(&self.state)
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State<R>>) -> MutexGuard<'a, State<R>> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct StopOnPanic<'q, R>(&'q Queue<R>);

impl<R> Drop for StopOnPanic<'_, R> {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut state = self.0.lock();
            state.fail(Err(Error::Cancelled));
            state.closed = true;
            drop(state);
            self.0.changed.notify_all();
        }
    }
}

impl<R> State<R> {
    fn fail(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.failure.get_or_insert(error);
        }
    }
}
