//! From recipes to files: plan every header first, then let the recipes fill in the bytes.
//!
//! A [`Recipe`] says which tensors it makes of one source tensor, which follows from shapes alone. So the sizes of all
//! files are known before the first byte is read. Then one thread reads the source tensors front to back, hashing them,
//! and the workers compute what a chunk gives and write it in place, through a [`Sink`]: reading, computing and writing
//! overlap, memory is a few chunks whatever the size of the model, and the bytes do not depend on the number of threads.
//!
//! What is finished is entered in a [`journal`] beside the files. A run that was interrupted, by whatever, goes on from
//! there: see [`Plan::write`].

mod copy;
mod journal;
mod queue;
mod shard;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use std::{fs, thread};

use serde::{Deserialize, Serialize};
use serde_json::json;

pub use copy::Copy;
pub use journal::NAME as JOURNAL_NAME;
use journal::{Entry, Journal};
use queue::{Queue, Task};
use shard::Shard;
pub use shard::Sink;

use crate::digest;
use crate::merge::Norms;
use crate::safetensors::{File, Tensor, TensorSpec, Writer};
use crate::sync::lock;
use crate::{Error, Job, Result};

/// Elements that a worker computes with at a time; a multiple of every blocksize.
pub const CHUNK: usize = 1 << 19;

/// Bytes of chunks that are kept in memory until they are seen again; those beyond are read again.
const KEPT_BYTES: usize = 64 << 20;

/// How often what has been written is flushed to disk while the work goes on.
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);

/// How to make one or more output tensors of one source tensor. All of them go into one file.
pub trait Recipe: Send + Sync {
    /// The tensors that a run writes.
    fn outputs(&self) -> Vec<TensorSpec>;

    /// The tensor that is read front to back.
    fn source(&self) -> Tensor<'_>;

    /// Small tensors that a run reads besides, whole.
    fn beside(&self) -> Vec<Tensor<'_>> {
        Vec::new()
    }

    /// What is read at a time: byte ranges of the source, ascending, which cover it; they may overlap.
    fn chunks(&self) -> Vec<Range<u64>>;

    /// Begin to make the outputs.
    ///
    /// # Errors
    /// Whatever reading what stands beside the source runs into.
    fn start(&self) -> Result<Box<dyn Run + '_>>;
}

/// One recipe at work. Its chunks come in any order and from any thread.
pub trait Run: Send + Sync {
    /// Compute and write what the bytes of chunk number `chunk` give.
    ///
    /// Returns the chunks that are to be handed in once more, now that all of them have been seen; mostly none. When
    /// the last chunk returns none, every byte of every output has been written.
    ///
    /// # Errors
    /// Whatever computing or writing runs into.
    fn chunk(&self, chunk: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Vec<usize>>;

    /// Whether chunk number `chunk`, which has just been seen for the first time, is going to be seen again.
    fn comes_again(&self, _chunk: usize) -> bool {
        false
    }

    /// How far the outputs are from the source, by name, where that is known. Asked for after the last chunk.
    fn errors(&self) -> BTreeMap<String, WeightError> {
        BTreeMap::new()
    }

    /// How much the source was changed on its way, if it was, and the name of what it became. Asked for after the last
    /// chunk.
    fn change(&self) -> Option<(String, Norms)> {
        None
    }

    /// Whether the only output holds the very bytes of the source.
    fn is_copy(&self) -> bool {
        false
    }
}

/// How far a packed weight is from what it was packed from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WeightError {
    /// Frobenius norm of the difference over that of the weight; 0 for a weight of zeros.
    pub relative: f64,
    /// Frobenius norm of the weight.
    pub norm: f64,
    /// The relative error of the block where it is largest.
    pub worst: f64,
    /// Index of that block in the row-major flattened weight.
    pub worst_block: u64,
}

/// Who sees to it that source files are there when they are read. `()` is for files that are.
pub trait Supply: Sync {
    /// Whether files are somewhere else until they are needed. Then what one file gives is finished, and the file done
    /// with if nothing else needs it, before the next one comes.
    fn fetches(&self) -> bool {
        false
    }

    /// `file` is going to be read. Returns where it now is, if that is another place.
    ///
    /// # Errors
    /// [`Error::Supply`] if it cannot be had.
    fn need(&self, _file: &Path) -> Result<Option<PathBuf>> {
        Ok(None)
    }

    /// `file` will not be read any more.
    ///
    /// # Errors
    /// [`Error::Supply`].
    fn done(&self, _file: &Path) -> Result<()> {
        Ok(())
    }
}

impl Supply for () {}

/// Files to write, each with its recipes.
pub struct Plan<'a> {
    shards: Vec<Shard>,
    recipes: Vec<Planned<'a>>,
}

struct Planned<'a> {
    recipe: Box<dyn Recipe + 'a>,
    /// Of its first output, or else of its source: no two recipes of a plan have the same.
    name: String,
    outputs: Vec<TensorSpec>,
    /// Index of the shard, and of the first output in it; None where there are no outputs.
    place: Option<(usize, usize)>,
}

impl Planned<'_> {
    /// The source files that are read.
    fn files(&self) -> impl Iterator<Item = &File> {
        std::iter::once(self.recipe.source()).chain(self.recipe.beside()).map(|tensor| tensor.file)
    }
}

/// What [`Plan::write`] wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Names of the safetensors files, in order.
    pub files: Vec<String>,
    /// Bytes of all tensors, headers not counted.
    pub tensor_bytes: u64,
    /// `DTYPE SHAPE DIGEST` of every stored tensor, as in the lines of a fingerprint.
    pub digests: BTreeMap<String, String>,
    /// The fingerprint of what was written, see [`digest::Fingerprint`].
    pub fingerprint: String,
    /// The fingerprint of what it was made of.
    pub source_fingerprint: String,
    /// How far the packed weights are from their sources.
    pub errors: BTreeMap<String, WeightError>,
    /// How much the weights were changed that were, by name.
    pub changes: BTreeMap<String, Norms>,
    /// Source bytes whose outputs an earlier run had written.
    pub resumed_bytes: u64,
}

impl<'a> Plan<'a> {
    /// Share out `recipes`, in order, over files of at most `max_shard_bytes` of tensors each, named as transformers
    /// names them. A recipe whose outputs alone are larger gets a file of its own.
    pub fn new(recipes: Vec<Box<dyn Recipe + 'a>>, max_shard_bytes: u64) -> Self {
        let mut groups: Vec<Vec<TensorSpec>> = Vec::new();
        let mut counts: Vec<usize> = Vec::new();
        let mut planned = Vec::new();
        let mut room = 0;
        for recipe in recipes {
            let outputs = recipe.outputs();
            let name = outputs.first().map_or(&recipe.source().info.name, |output| &output.name).clone();
            if outputs.is_empty() {
                planned.push(Planned { recipe, name, outputs, place: None });
                continue;
            }
            let bytes: u64 = outputs.iter().map(TensorSpec::bytes).sum();
            if groups.is_empty() || bytes > room {
                groups.push(Vec::new());
                counts.push(0);
                room = max_shard_bytes.saturating_sub(bytes);
            } else {
                room -= bytes;
            }
            let shard = groups.len() - 1;
            let place = Some((shard, groups[shard].len()));
            groups[shard].extend(outputs.iter().cloned());
            counts[shard] += 1;
            planned.push(Planned { recipe, name, outputs, place });
        }
        let total = groups.len();
        let shards = groups.into_iter().zip(counts).enumerate();
        let shards = shards.map(|(index, (specs, recipes))| Shard::new(shard_name(index, total), specs, recipes));
        Self { shards: shards.collect(), recipes: planned }
    }

    /// Bytes of source data that writing will go through.
    pub fn source_bytes(&self) -> u64 {
        self.recipes.iter().map(|planned| planned.recipe.source().info.bytes()).sum()
    }

    /// Bytes of all tensors that will be written, headers not counted.
    pub fn tensor_bytes(&self) -> u64 {
        self.recipes.iter().flat_map(|planned| &planned.outputs).map(TensorSpec::bytes).sum()
    }

    /// The files that will be written, in order, each with its size in bytes.
    pub fn files(&self) -> Vec<(String, u64)> {
        self.shards.iter().map(|shard| (shard.file_name().to_owned(), shard.file_bytes())).collect()
    }

    /// Write all files, and `model.safetensors.index.json` where there are several, into the directory `dir`, on
    /// `threads` workers and one reader.
    ///
    /// A run that ends early leaves its files under temporary names, and a journal. A later run of the same plan with
    /// the same `inputs` (any text that tells source and options from others) goes on where that one ended: what the
    /// journal says is finished is kept if its bytes still have the digest they had, so not even a power cut or a torn
    /// write can slip through. With other inputs everything begins anew. The caller removes the journal.
    ///
    /// # Errors
    /// The first error of a recipe, or [`Error::Cancelled`].
    ///
    /// # Panics
    /// If a recipe panics, or if two recipes make one tensor first, or read one and make nothing.
    pub fn write(self, dir: &Path, inputs: &str, threads: usize, supply: &dyn Supply, job: &Job) -> Result<Written> {
        let journal = Journal::open(dir, &self.key(inputs))?;
        let (entries, resumed_bytes) = self.carry_out(Some(dir), journal, threads, supply, job)?;
        if self.shards.len() > 1 {
            let path = dir.join("model.safetensors.index.json");
            fs::write(&path, self.index()).map_err(Error::io(&path))?;
        }
        Ok(self.written(&entries, resumed_bytes))
    }

    /// Run a plan of recipes without outputs, for what they find.
    ///
    /// # Errors
    /// As [`Plan::write`].
    ///
    /// # Panics
    /// As [`Plan::write`], or if a recipe has outputs.
    pub fn examine(self, threads: usize, supply: &dyn Supply, job: &Job) -> Result<Written> {
        assert!(self.shards.is_empty(), "a plan with outputs is not examined but written");
        let (entries, resumed_bytes) = self.carry_out(None, Journal::in_memory(), threads, supply, job)?;
        Ok(self.written(&entries, resumed_bytes))
    }

    /// The journal of a complete run, and the source bytes that it did not need to go through.
    fn carry_out(
        &self,
        dir: Option<&Path>,
        journal: Journal,
        threads: usize,
        supply: &dyn Supply,
        job: &Job,
    ) -> Result<(HashMap<String, Entry>, u64)> {
        let names: HashSet<_> = self.recipes.iter().map(|planned| &planned.name).collect();
        assert_eq!(names.len(), self.recipes.len(), "two recipes have one name");
        let mut files: HashMap<&Path, AtomicUsize> = HashMap::new();
        for file in self.recipes.iter().flat_map(Planned::files) {
            *files.entry(file.path()).or_default().get_mut() += 1;
        }
        let (queue, spares) = (Queue::new(2 * threads + 2), Spares::default());
        let work =
            Work { plan: self, dir, journal, queue, spares, kept_bytes: AtomicUsize::new(0), supply, files, job };
        thread::scope(|scope| {
            let flusher = scope.spawn(|| work.flush());
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work.compute())).collect();
            work.read();
            for worker in workers {
                worker.join().unwrap_or_else(|panic| resume_unwind(panic));
            }
            work.queue.close();
            flusher.join().unwrap_or_else(|panic| resume_unwind(panic));
        });
        let Work { queue, journal, .. } = work;
        let resumed_bytes = queue.into_result()?;
        Ok((journal.into_entries(), resumed_bytes))
    }

    /// What tells this plan from others: the layout of every output, and the inputs.
    fn key(&self, inputs: &str) -> String {
        let mut text = format!("{} {}\n{inputs}\n", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        for shard in &self.shards {
            text += shard.file_name();
            text.push('\n');
            text += &String::from_utf8_lossy(shard.header());
        }
        digest::of(text.as_bytes())
    }

    fn index(&self) -> String {
        let mut weight_map = BTreeMap::new();
        for (planned, (shard, _)) in self.recipes.iter().filter_map(|planned| Some((planned, planned.place?))) {
            for spec in &planned.outputs {
                weight_map.insert(&spec.name, self.shards[shard].file_name());
            }
        }
        let index = json!({"metadata": {"total_size": self.tensor_bytes()}, "weight_map": weight_map});
        format!("{index:#}\n")
    }

    fn written(&self, entries: &HashMap<String, Entry>, resumed_bytes: u64) -> Written {
        let mut written = Written {
            files: self.shards.iter().map(|shard| shard.file_name().to_owned()).collect(),
            tensor_bytes: self.tensor_bytes(),
            digests: BTreeMap::new(),
            fingerprint: String::new(),
            source_fingerprint: String::new(),
            errors: BTreeMap::new(),
            changes: BTreeMap::new(),
            resumed_bytes,
        };
        let mut seen = HashSet::new(); // two recipes may have one source
        let (mut stored, mut sources) = (digest::Fingerprint::default(), digest::Fingerprint::default());
        for planned in &self.recipes {
            let source = planned.recipe.source();
            let entry = &entries[&planned.name];
            let beside = planned.recipe.beside();
            for (tensor, digest) in std::iter::once(source).chain(beside).zip(&entry.sources) {
                if !seen.insert((tensor.file.path(), &tensor.info.name)) {
                    continue;
                }
                sources.add(&tensor.info.name, tensor.info.dtype, &tensor.info.shape, digest);
            }
            for (spec, digest) in planned.outputs.iter().zip(&entry.outputs) {
                stored.add(&spec.name, spec.dtype, &spec.shape, digest);
                written.digests.insert(spec.name.clone(), digest::line(spec.dtype, &spec.shape, digest));
            }
            written.errors.extend(entry.errors.clone());
            written.changes.extend(entry.change.clone());
        }
        written.fingerprint = stored.finish();
        written.source_fingerprint = sources.finish();
        written
    }
}

/// Let the files or directories `one` and `other` change names, at once and for whoever looks.
///
/// # Errors
/// [`Error::Io`], also where the file system cannot do it.
pub fn exchange(one: &Path, other: &Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(|error| Error::io(one)(error.into()))
}

fn shard_name(index: usize, total: usize) -> String {
    match total {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{total:05}.safetensors", index + 1),
    }
}

/// Everything that the threads of one [`Plan::write`] share.
struct Work<'w> {
    plan: &'w Plan<'w>,
    /// None where nothing is written.
    dir: Option<&'w Path>,
    journal: Journal,
    queue: Queue<Arc<Running<'w>>>,
    spares: Spares,
    /// Bytes of all chunks that are kept.
    kept_bytes: AtomicUsize,
    supply: &'w dyn Supply,
    /// How many recipes still need a source file.
    files: HashMap<&'w Path, AtomicUsize>,
    job: &'w Job,
}

/// A recipe that has been started.
struct Running<'w> {
    planned: &'w Planned<'w>,
    run: Box<dyn Run + 'w>,
    chunks: Vec<Range<u64>>,
    /// Chunks that have not come back yet.
    left: AtomicUsize,
    /// Bytes of chunks that come again, by their number.
    kept: Mutex<HashMap<usize, Vec<u8>>>,
    /// Digests of the source and of what was read beside it; set before the last chunk is handed out.
    sources: OnceLock<Vec<String>>,
}

/// Buffers that nobody needs at the moment.
#[derive(Default)]
struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    /// A buffer with anything in it.
    fn take(&self) -> Vec<u8> {
        lock(&self.0).pop().unwrap_or_default()
    }

    fn put(&self, buffer: Vec<u8>) {
        lock(&self.0).push(buffer);
    }
}

impl<'w> Work<'w> {
    /// The reader: hand out the chunks of every recipe that is not finished yet.
    fn read(&self) {
        let _guard = self.queue.stop_on_panic();
        let result = self.plan.recipes.iter().try_for_each(|planned| self.read_recipe(planned));
        self.queue.end_of_reading(result);
    }

    fn read_recipe(&self, planned: &'w Planned<'w>) -> Result<()> {
        let source = planned.recipe.source();
        if let Some(entry) = self.journal.entry(&planned.name) {
            if self.digests(planned)? == entry.outputs {
                self.queue.count_resumed(source.info.bytes());
                self.job.advance(source.info.bytes())?;
                return self.recipe_done(planned);
            }
            self.journal.forget(&planned.name);
        }
        if self.supply.fetches() && !planned.files().all(File::is_elsewhere) {
            self.queue.wait_idle();
        }
        for file in planned.files() {
            if let Some(path) = self.supply.need(file.path())? {
                file.open_at(&path)?;
            }
        }
        let chunks = planned.recipe.chunks();
        let (left, last) = (AtomicUsize::new(chunks.len()), chunks.len().saturating_sub(1));
        let run = planned.recipe.start()?;
        let running =
            Arc::new(Running { planned, run, chunks, left, kept: Mutex::default(), sources: OnceLock::new() });
        let mut hasher = digest::Hasher::default();
        let mut seen = 0;
        for (index, range) in running.chunks.iter().enumerate() {
            let Some(mut bytes) = self.queue.buffer() else { return Ok(()) };
            bytes.resize((range.end - range.start) as usize, 0);
            source.read_ahead(range.end);
            source.read_at(range.start, &mut bytes)?;
            hasher.update(&bytes[(seen - range.start) as usize..]);
            seen = range.end;
            if index == last {
                let mut digests = vec![std::mem::take(&mut hasher).finish()];
                for tensor in planned.recipe.beside() {
                    digests.push(digest::of(&tensor.read()?));
                }
                running.sources.set(digests).expect("set once");
            }
            self.queue.push(Task { run: running.clone(), chunk: index, bytes: Some(bytes) });
        }
        if running.chunks.is_empty() {
            running.sources.set(vec![hasher.finish()]).expect("set once");
            self.finish(&running)?;
        }
        Ok(())
    }

    /// A worker: compute chunks until there are no more.
    fn compute(&self) {
        let _guard = self.queue.stop_on_panic();
        while let Some(Task { run, chunk, bytes }) = self.queue.next() {
            let fresh = bytes.is_some();
            let bytes = bytes.map_or_else(|| self.bytes_again(&run, chunk), Ok);
            let result = bytes.and_then(|bytes| self.compute_chunk(&run, chunk, bytes, fresh));
            self.queue.done(fresh.then(|| self.spares.take()), result);
        }
    }

    /// The bytes of a chunk that has been seen before.
    fn bytes_again(&self, running: &Running<'w>, chunk: usize) -> Result<Vec<u8>> {
        if let Some(bytes) = lock(&running.kept).remove(&chunk) {
            self.kept_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
            return Ok(bytes);
        }
        let range = &running.chunks[chunk];
        let mut bytes = self.spares.take();
        bytes.resize((range.end - range.start) as usize, 0);
        running.planned.recipe.source().read_at(range.start, &mut bytes)?;
        Ok(bytes)
    }

    fn compute_chunk(&self, running: &Arc<Running<'w>>, chunk: usize, bytes: Vec<u8>, fresh: bool) -> Result<()> {
        let again = match self.output(running.planned)? {
            Some((writer, first)) => running.run.chunk(chunk, &bytes, &Sink::new(&writer, first))?,
            None => running.run.chunk(chunk, &bytes, &Sink::nowhere())?,
        };
        if fresh && running.run.comes_again(chunk) && self.may_keep(bytes.len()) {
            lock(&running.kept).insert(chunk, bytes);
        } else {
            self.spares.put(bytes);
        }
        running.left.fetch_add(again.len(), Ordering::Relaxed);
        for chunk in again {
            self.queue.push_again(Task { run: running.clone(), chunk, bytes: None });
        }
        let read_before = if chunk == 0 { 0 } else { running.chunks[chunk - 1].end };
        self.job.advance(if fresh { running.chunks[chunk].end - read_before } else { 0 })?;
        if running.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish(running)?;
        }
        Ok(())
    }

    /// Whether there is room to keep `bytes` more bytes in memory, which are then counted.
    fn may_keep(&self, bytes: usize) -> bool {
        let kept = self.kept_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if kept > KEPT_BYTES {
            self.kept_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        kept <= KEPT_BYTES
    }

    /// Enter a recipe whose outputs are written in the journal.
    fn finish(&self, running: &Running<'w>) -> Result<()> {
        for (_, bytes) in lock(&running.kept).drain() {
            // Kept in vain: it came again before it was put here, and was read.
            self.kept_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
            self.spares.put(bytes);
        }
        let sources = running.sources.get().expect("set before the last chunk").clone();
        let outputs = if running.run.is_copy() { sources.clone() } else { self.digests(running.planned)? };
        let (errors, change) = (running.run.errors(), running.run.change());
        self.journal.add(Entry { recipe: running.planned.name.clone(), sources, outputs, errors, change })?;
        self.recipe_done(running.planned)
    }

    /// Let go of what only this recipe still needed.
    fn recipe_done(&self, planned: &Planned<'_>) -> Result<()> {
        for file in planned.files() {
            if self.files[file.path()].fetch_sub(1, Ordering::AcqRel) == 1 {
                file.close();
                self.supply.done(file.path())?;
            }
        }
        planned.place.map_or(Ok(()), |(shard, _)| self.plan.shards[shard].recipe_done())
    }

    /// The file that the outputs of a recipe go to, and the index of the first of them in it.
    fn output(&self, planned: &Planned<'_>) -> Result<Option<(Arc<Writer>, usize)>> {
        let Some(((shard, first), dir)) = planned.place.zip(self.dir) else { return Ok(None) };
        Ok(Some((self.plan.shards[shard].open(dir)?, first)))
    }

    /// The digests of what has been written of the outputs of a recipe.
    fn digests(&self, planned: &Planned<'_>) -> Result<Vec<String>> {
        let output = self.output(planned)?;
        output.map_or(Ok(Vec::new()), |(writer, first)| writer.digests(first, planned.outputs.len()))
    }

    /// Flush what has been written now and then, so that little is left to flush at the end.
    fn flush(&self) {
        while !self.queue.wait_closed(FLUSH_INTERVAL) {
            for shard in &self.plan.shards {
                // An error shows again when the file is finished.
                let _ = shard.flush();
            }
        }
    }
}
