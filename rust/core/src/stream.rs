//! From recipes to files: plan every header first, then let the recipes fill in the bytes.
//!
//! A [`Recipe`] says which tensors it makes, which follows from shapes alone, and later writes their bytes through a
//! [`Sink`], by position and from any thread. So the sizes of all files are known before the first byte is read, memory
//! is a few chunks a thread whatever the size of the model, and the bytes do not depend on the number of threads.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use serde_json::json;

use crate::safetensors::{Tensor, TensorSpec, Writer};
use crate::{Dtype, Error, Float, Job, Result};

/// Elements that one thread reads, computes and writes at a time; a multiple of every blocksize.
pub(crate) const CHUNK: usize = 1 << 19;

/// How to make one or more output tensors that belong together, and so into one file.
pub trait Recipe: Send + Sync {
    /// The tensors that [`Recipe::run`] writes.
    fn outputs(&self) -> Vec<TensorSpec>;

    /// Bytes of source data that [`Recipe::run`] counts as done on its [`Job`].
    fn source_bytes(&self) -> u64;

    /// Write every byte of every output.
    ///
    /// # Errors
    /// Whatever reading, computing or writing runs into; the file is then discarded.
    fn run(&self, sink: &Sink<'_>, job: &Job) -> Result<()>;
}

/// Where one recipe's bytes go.
#[derive(Debug)]
pub struct Sink<'a> {
    writer: &'a Writer,
    first: usize,
}

impl Sink<'_> {
    /// Write `bytes` at byte `offset` of the recipe's output number `index`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_at(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.writer.write_at(self.first + index, offset, bytes)
    }
}

/// Files to write, each with its recipes.
pub struct Plan<'a> {
    shards: Vec<Shard<'a>>,
}

struct Shard<'a> {
    file_name: String,
    recipes: Vec<Box<dyn Recipe + 'a>>,
}

/// What [`Plan::write`] wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Names of the safetensors files, in order.
    pub files: Vec<String>,
    /// Bytes of all tensors, headers not counted.
    pub tensor_bytes: u64,
}

impl<'a> Plan<'a> {
    /// Share out `recipes`, in order, over files of at most `max_shard_bytes` of tensors each, named as transformers
    /// names them. A recipe whose outputs alone are larger gets a file of its own.
    pub fn new(recipes: Vec<Box<dyn Recipe + 'a>>, max_shard_bytes: u64) -> Self {
        let mut groups: Vec<Vec<Box<dyn Recipe + 'a>>> = Vec::new();
        let mut room = 0;
        for recipe in recipes {
            let bytes = output_bytes(&*recipe);
            match groups.last_mut() {
                Some(group) if bytes <= room => {
                    room -= bytes;
                    group.push(recipe);
                }
                _ => {
                    room = max_shard_bytes.saturating_sub(bytes);
                    groups.push(vec![recipe]);
                }
            }
        }
        let count = groups.len();
        let name = |index: usize| match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let shards = groups.into_iter().enumerate();
        Self { shards: shards.map(|(index, recipes)| Shard { file_name: name(index), recipes }).collect() }
    }

    /// Bytes of source data that writing will go through.
    pub fn source_bytes(&self) -> u64 {
        self.recipes().map(Recipe::source_bytes).sum()
    }

    /// Bytes of all tensors that will be written, headers not counted.
    pub fn tensor_bytes(&self) -> u64 {
        self.recipes().map(output_bytes).sum()
    }

    /// Write all files, and `model.safetensors.index.json` where there are several, into the directory `dir`.
    ///
    /// Runs on the current rayon pool. A file that was begun but not finished is removed.
    ///
    /// # Errors
    /// The first error of a recipe, or [`Error::Cancelled`].
    pub fn write(&self, dir: &Path, job: &Job) -> Result<Written> {
        for shard in &self.shards {
            shard.write(dir, job)?;
        }
        if self.shards.len() > 1 {
            let path = dir.join("model.safetensors.index.json");
            fs::write(&path, self.index()).map_err(Error::io(&path))?;
        }
        let files = self.shards.iter().map(|shard| shard.file_name.clone()).collect();
        Ok(Written { files, tensor_bytes: self.tensor_bytes() })
    }

    fn recipes(&self) -> impl Iterator<Item = &(dyn Recipe + 'a)> {
        self.shards.iter().flat_map(|shard| shard.recipes.iter().map(|recipe| &**recipe))
    }

    fn index(&self) -> String {
        let mut weight_map = BTreeMap::new();
        for shard in &self.shards {
            for spec in shard.recipes.iter().flat_map(|recipe| recipe.outputs()) {
                weight_map.insert(spec.name, &shard.file_name);
            }
        }
        let index = json!({"metadata": {"total_size": self.tensor_bytes()}, "weight_map": weight_map});
        format!("{index:#}\n")
    }
}

impl Shard<'_> {
    fn write(&self, dir: &Path, job: &Job) -> Result<()> {
        let mut specs = Vec::new();
        let mut firsts = Vec::new();
        for recipe in &self.recipes {
            firsts.push(specs.len());
            specs.extend(recipe.outputs());
        }
        let writer = Writer::create(&dir.join(&self.file_name), &specs)?;
        let work = self.recipes.par_iter().zip(firsts);
        work.try_for_each(|(recipe, first)| recipe.run(&Sink { writer: &writer, first }, job))?;
        writer.finish()
    }
}

fn output_bytes(recipe: &dyn Recipe) -> u64 {
    recipe.outputs().iter().map(TensorSpec::bytes).sum()
}

/// A tensor written as it is, whatever its dtype.
#[derive(Debug)]
pub struct Copy<'a>(pub Tensor<'a>);

impl Recipe for Copy<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        vec![same_shape(&self.0, self.0.info.dtype)]
    }

    fn source_bytes(&self) -> u64 {
        self.0.info.bytes()
    }

    fn run(&self, sink: &Sink<'_>, job: &Job) -> Result<()> {
        let total = self.0.info.bytes();
        (0..total.div_ceil(CHUNK as u64)).into_par_iter().try_for_each_init(Vec::new, |bytes, chunk| {
            let offset = chunk * CHUNK as u64;
            bytes.resize((total - offset).min(CHUNK as u64) as usize, 0);
            self.0.read_at(offset, bytes)?;
            sink.write_at(0, offset, bytes)?;
            job.advance(bytes.len() as u64)
        })
    }
}

/// A tensor of floats written in another float type, each value rounded once.
#[derive(Debug)]
pub struct Cast<'a> {
    source: Tensor<'a>,
    from: Float,
    to: Float,
}

impl<'a> Cast<'a> {
    /// A recipe that writes `source` as `to`.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the source is not BF16, F16 or F32.
    pub fn new(source: Tensor<'a>, to: Float) -> Result<Self> {
        Ok(Self { from: source.float()?, source, to })
    }
}

impl Recipe for Cast<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        vec![same_shape(&self.source, self.to.dtype())]
    }

    fn source_bytes(&self) -> u64 {
        self.source.info.bytes()
    }

    fn run(&self, sink: &Sink<'_>, job: &Job) -> Result<()> {
        let total = self.source.info.elements();
        let chunks = (0..total.div_ceil(CHUNK as u64)).into_par_iter();
        chunks.try_for_each_init(Scratch::default, |scratch, chunk| {
            let first = chunk * CHUNK as u64;
            scratch.floats.resize((total - first).min(CHUNK as u64) as usize, 0.0);
            self.source.read_floats_at(first, &mut scratch.floats, &mut scratch.bytes)?;
            scratch.write_floats(self.to, sink, first)?;
            job.advance((scratch.floats.len() * self.from.size()) as u64)
        })
    }
}

/// Buffers that a thread keeps from chunk to chunk.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) bytes: Vec<u8>,
    pub(crate) floats: Vec<f32>,
}

impl Scratch {
    /// Write `floats` as the elements from `first` on of the recipe's only output.
    pub(crate) fn write_floats(&mut self, to: Float, sink: &Sink<'_>, first: u64) -> Result<()> {
        self.bytes.resize(self.floats.len() * to.size(), 0);
        to.encode(&self.floats, &mut self.bytes);
        sink.write_at(0, first * to.size() as u64, &self.bytes)
    }
}

pub(crate) fn same_shape(source: &Tensor<'_>, dtype: Dtype) -> TensorSpec {
    TensorSpec { name: source.info.name.clone(), dtype, shape: source.info.shape.clone() }
}
