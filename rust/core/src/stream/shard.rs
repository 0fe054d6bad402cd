//! One output file, open only while recipes write to it.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::Result;
use crate::safetensors::{Layout, TensorSpec, Writer};
use crate::sync::lock;

/// Where one recipe's bytes go.
#[derive(Debug)]
pub struct Sink<'a> {
    /// The file, and the index of the recipe's first output in it.
    place: Option<(&'a Writer, usize)>,
}

impl<'a> Sink<'a> {
    pub(super) fn new(writer: &'a Writer, first: usize) -> Self {
        Self { place: Some((writer, first)) }
    }

    /// A sink that takes everything and keeps nothing.
    pub(crate) fn nowhere() -> Self {
        Self { place: None }
    }

    /// Write `bytes` at byte `offset` of the recipe's output number `index`.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn write_at(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.place.map_or(Ok(()), |(writer, first)| writer.write_at(first + index, offset, bytes))
    }
}

pub(super) struct Shard {
    file_name: String,
    layout: Arc<Layout>,
    recipes: usize,
    open: Mutex<Option<Arc<Writer>>>,
    recipes_done: AtomicUsize,
}

impl Shard {
    pub(super) fn new(file_name: String, specs: Vec<TensorSpec>, recipes: usize) -> Self {
        let layout = Arc::new(Layout::new(specs));
        Self { file_name, layout, recipes, open: Mutex::new(None), recipes_done: AtomicUsize::new(0) }
    }

    pub(super) fn file_name(&self) -> &str {
        &self.file_name
    }

    pub(super) fn header(&self) -> &[u8] {
        self.layout.header()
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.layout.file_bytes()
    }

    /// The file in `dir`, opened by the first to ask.
    pub(super) fn open(&self, dir: &Path) -> Result<Arc<Writer>> {
        let mut open = lock(&self.open);
        if let Some(writer) = &*open {
            return Ok(writer.clone());
        }
        let writer = Arc::new(Writer::open(&dir.join(&self.file_name), self.layout.clone())?);
        *open = Some(writer.clone());
        Ok(writer)
    }

    /// One recipe has written everything; the last one finishes the file.
    pub(super) fn recipe_done(&self) -> Result<()> {
        if self.recipes_done.fetch_add(1, Ordering::AcqRel) + 1 < self.recipes {
            return Ok(());
        }
        lock(&self.open).take().map_or(Ok(()), |writer| writer.finish())
    }

    /// Flush what has been written so far.
    pub(super) fn flush(&self) -> Result<()> {
        let writer = lock(&self.open).clone();
        writer.map_or(Ok(()), |writer| writer.flush())
    }
}
