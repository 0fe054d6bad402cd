//! What an interrupted run had finished, so that the next one need not do it again.
//!
//! A text file beside the outputs: the first line is the digest of plan and inputs, then one JSON object a finished
//! recipe, appended when all its bytes have been handed to the system. Nothing is trusted: a line that does not parse
//! ends the journal (a torn write), and a reader compares the digests with the bytes that are really there.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::WeightError;
use crate::merge::Norms;
use crate::sync::lock;
use crate::{Error, Result};

/// Name of the journal in the output directory.
pub const NAME: &str = ".journal";

/// Its name until it is whole.
const NEW: &str = ".journal.new";

/// One finished recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// The recipe's name, which no other of the plan has.
    pub(super) recipe: String,
    /// Digests of the source tensor and of those read beside it.
    pub(super) sources: Vec<String>,
    /// Digests of the outputs.
    pub(super) outputs: Vec<String>,
    pub(super) errors: BTreeMap<String, WeightError>,
    pub(super) change: Option<(String, Norms)>,
}

pub(super) struct Journal {
    path: PathBuf,
    /// None where nothing outlives the run.
    file: Option<Mutex<fs::File>>,
    entries: Mutex<HashMap<String, Entry>>,
}

impl Journal {
    /// Open the journal in `dir` if it is of the plan `key`; begin a new one if not.
    pub(super) fn open(dir: &Path, key: &str) -> Result<Self> {
        let path = dir.join(NAME);
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let mut kept = format!("{key}\n");
        let mut entries = HashMap::new();
        if let Some(lines) = text.strip_prefix(&kept) {
            for line in lines.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
                let Ok(entry) = serde_json::from_str::<Entry>(line) else { break };
                kept += line;
                entries.insert(entry.recipe.clone(), entry);
            }
        }
        // Written anew without a torn end, so that what is appended stands on a line of its own.
        let new = dir.join(NEW);
        let mut file = fs::File::create(&new).map_err(Error::io(&new))?;
        file.write_all(kept.as_bytes()).map_err(Error::io(&new))?;
        fs::rename(&new, &path).map_err(Error::io(&path))?;
        Ok(Self { path, file: Some(Mutex::new(file)), entries: Mutex::new(entries) })
    }

    /// A journal of what is not gone on with.
    pub(super) fn in_memory() -> Self {
        Self { path: PathBuf::new(), file: None, entries: Mutex::default() }
    }

    pub(super) fn entry(&self, recipe: &str) -> Option<Entry> {
        lock(&self.entries).get(recipe).cloned()
    }

    pub(super) fn forget(&self, recipe: &str) {
        lock(&self.entries).remove(recipe);
    }

    pub(super) fn add(&self, entry: Entry) -> Result<()> {
        if let Some(file) = &self.file {
            let mut line = serde_json::to_vec(&entry).map_err(|error| Error::io(&self.path)(error.into()))?;
            line.push(b'\n');
            let mut file = lock(file);
            file.write_all(&line).map_err(Error::io(&self.path))?;
        }
        lock(&self.entries).insert(entry.recipe.clone(), entry);
        Ok(())
    }

    pub(super) fn into_entries(self) -> HashMap<String, Entry> {
        self.entries.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
