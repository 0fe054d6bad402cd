//! One weight being packed: codes chunk by chunk; scales, error and quant state when all of them have been seen.
//!
//! In exact mode once is enough. In best mode with double quantization the levels of the scales are fitted to those of the
//! first chunks, the sample. What is searched before the fit waits for it and is seen once more; everything else is
//! searched and packed in one go. A scale is stored relative to the largest of its group of 256, so where chunks do not
//! hold whole groups, all of them are the sample. Best mode also keeps the sums that tell the error of exact mode, and
//! should that be smaller, which is rare, the chunks are seen once more and packed exactly.

use std::mem::take;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use super::{Mode, Options};
use crate::nested::{self, Nested};
use crate::nf4::{self, Moments};
use crate::quant_state::QuantState;
use crate::search::{self, Candidates, Map, SAMPLE, Values};
use crate::stream::{Sink, WeightError};
use crate::sync::lock;
use crate::{Error, Float, Result};

static CANDIDATES: LazyLock<Candidates> = LazyLock::new(Candidates::default);

/// Of finite values; else the index of the first that is not.
type Checked<T> = std::result::Result<T, usize>;

pub(super) struct Weight<'p> {
    name: &'p str,
    state: &'p QuantState,
    /// What the values that are packed come as.
    float: Float,
    /// Index of the codes among the recipe's outputs; the rest follows, in the order of [`QuantState::tensors`].
    output: usize,
    /// The recipe's chunks that hold this weight.
    chunks: Range<usize>,
    /// The first of them, to whose scales levels are fitted.
    sample: Range<usize>,
    /// Whether each chunk holds whole groups of scales.
    whole_groups: bool,
    progress: Mutex<Progress>,
}

struct Progress {
    mode: Mode,
    /// Chunks that are not packed yet.
    left: usize,
    /// What has been found of every block so far.
    blocks: Blocks,
    /// The same under exact mode, if that is another.
    exact: Blocks,
    /// How far each chunk is from its source, in best mode.
    deviations: Vec<Deviation>,
    levels: Levels,
    result: Option<WeightError>,
}

/// The levels of double quantization in best mode.
enum Levels {
    /// `left` chunks of the sample are not searched yet, `waiting` are those that are.
    Awaited { left: usize, waiting: Vec<usize> },
    /// Those that have `waited` come once more.
    Fitted { map: Arc<Map>, waited: Vec<usize> },
}

#[derive(Default)]
struct Blocks {
    scales: Vec<f32>,
    /// 8-bit codes of the scales.
    nested: Vec<u8>,
    /// The largest of every 256 scales.
    nested_absmax: Vec<f32>,
    moments: Vec<Moments>,
}

/// The elements of a chunk.
#[derive(Clone, Copy)]
pub(super) struct Piece<'b> {
    /// Number of the chunk in its recipe.
    pub(super) chunk: usize,
    /// Number of the first element in the weight.
    pub(super) first: u64,
    /// Of the float type that values come as.
    pub(super) bytes: &'b [u8],
}

/// The block scales of a weight as they are stored.
struct Scales<'s> {
    /// With their levels; None if they are stored as they are.
    nested: Option<(Nested, &'s [f32; 256])>,
    /// As a reader decodes them.
    decoded: Vec<f32>,
}

impl<'p> Weight<'p> {
    /// A weight in `chunks`, each but the last of `step` piece.
    pub(super) fn new(
        name: &'p str,
        state: &'p QuantState,
        float: Float,
        options: Options,
        output: usize,
        chunks: Range<usize>,
        step: u64,
    ) -> Self {
        let blocks = step as usize / state.blocksize;
        let whole_groups = step > 0 && step.is_multiple_of((nested::BLOCKSIZE * state.blocksize) as u64);
        let sample = if whole_groups { SAMPLE.div_ceil(blocks).min(chunks.len()) } else { chunks.len() };
        let progress = Progress {
            mode: options.mode,
            left: chunks.len(),
            blocks: Blocks::default(),
            exact: Blocks::default(),
            deviations: vec![Deviation::default(); chunks.len()],
            levels: Levels::Awaited { left: sample, waiting: Vec::new() },
            result: None,
        };
        let sample = chunks.start..chunks.start + sample;
        Self { name, state, float, output, chunks, sample, whole_groups, progress: Mutex::new(progress) }
    }

    pub(super) fn name(&self) -> &str {
        self.name
    }

    /// How far the packed weight is from its source; known when all chunks have been seen.
    pub(super) fn error(&self) -> WeightError {
        self.lock().result.expect("all chunks have been seen")
    }

    /// Whether `chunk`, which has just been seen, is going to be seen again.
    pub(super) fn comes_again(&self, chunk: usize) -> bool {
        matches!(&self.lock().levels, Levels::Awaited { waiting, .. } if waiting.contains(&chunk))
    }

    /// Pack a chunk. Returns the chunks that have to come once more, none if this is the only one.
    ///
    /// # Errors
    /// `non_finite` of the index of the first value that is NaN or infinite, or what writing runs into.
    pub(super) fn put(
        &self,
        piece: Piece<'_>,
        sink: &Sink<'_>,
        non_finite: impl Fn(u64) -> Error,
    ) -> Result<Vec<usize>> {
        let offender = |index: usize| non_finite(piece.first + index as u64);
        loop {
            let mode = self.lock().mode;
            let again = match mode {
                Mode::Exact => {
                    let (found, codes) = self.exact(piece).map_err(&offender)?;
                    self.packed(piece, &found, &codes, sink)?
                }
                Mode::Best if self.state.nested_offset.is_some() => self.put_nested(piece, sink, &offender)?,
                Mode::Best => {
                    let scales = self.search(piece).map_err(&offender)?;
                    let mut codes = vec![0; piece.bytes.len().div_ceil(2 * self.float.size())];
                    search::codes(self.values(piece), &scales, self.state.blocksize, &mut codes);
                    self.packed(piece, &Blocks { scales, ..Blocks::default() }, &codes, sink)?
                }
            };
            if again.is_empty() || self.chunks.len() > 1 {
                return Ok(again);
            }
        }
    }

    /// Pack a chunk in best mode with double quantization, or leave it waiting for its levels.
    fn put_nested(&self, piece: Piece<'_>, sink: &Sink<'_>, offender: &impl Fn(usize) -> Error) -> Result<Vec<usize>> {
        let has_waited = matches!(&self.lock().levels, Levels::Fitted { waited, .. } if waited.contains(&piece.chunk));
        let mut again = Vec::new();
        if !has_waited {
            let scales = self.search(piece).map_err(offender)?;
            match self.searched(piece, scales) {
                Some(others) => again = others,
                None => return Ok(again),
            }
        }
        let values = self.values(piece);
        let blocksize = self.state.blocksize;
        let (first, count) = (self.first_block(piece), values.len().div_ceil(blocksize));
        let (group, groups) = (first / nested::BLOCKSIZE, (first + count).div_ceil(nested::BLOCKSIZE));
        let (map, mut scales, absmax) = {
            let Progress { levels, blocks, .. } = &*self.lock();
            let Levels::Fitted { map, .. } = levels else {
                unreachable!("levels are fitted before a chunk comes again")
            };
            let (scales, absmax) = (&blocks.scales[first..first + count], &blocks.nested_absmax[group..groups]);
            (map.clone(), scales.to_vec(), absmax.to_vec())
        };
        let (mut nested, mut codes) = (vec![0; count], vec![0; values.len().div_ceil(2)]);
        map.snap(values, blocksize, first % nested::BLOCKSIZE, &absmax, &mut scales, &mut nested, &mut codes);
        let found = Blocks { scales, nested, ..Blocks::default() };
        again.extend(self.packed(piece, &found, &codes, sink)?);
        Ok(again)
    }

    /// What exact mode makes of a chunk.
    ///
    /// # Errors
    /// The index of the first value that is NaN or infinite.
    fn exact(&self, piece: Piece<'_>) -> Checked<(Blocks, Vec<u8>)> {
        let blocksize = self.state.blocksize;
        let count = self.values(piece).len();
        let mut codes = vec![0; count.div_ceil(2)];
        let mut scales = vec![0.0; count.div_ceil(blocksize)];
        nf4::quantize(piece.bytes, self.float, blocksize, &mut scales, &mut codes)?;
        let moments = self.moments(piece, &codes);
        Ok((Blocks { scales, moments, ..Blocks::default() }, codes))
    }

    /// Search the scales of a chunk, and note what exact mode would make of it.
    ///
    /// # Errors
    /// As [`Weight::exact`].
    fn search(&self, piece: Piece<'_>) -> Checked<Vec<f32>> {
        let (exact, _) = self.exact(piece)?;
        let mut scales = vec![0.0; exact.scales.len()];
        let QuantState { blocksize, dtype, .. } = *self.state;
        search::scales(self.values(piece), None, blocksize, &CANDIDATES, dtype.max(), &mut scales)?;
        self.lock().exact.put(self.first_block(piece), self.blocks(), &exact);
        Ok(scales)
    }

    /// The scales of a chunk have been found. Returns the chunks that have waited for the levels until now; nothing if
    /// this one has to wait too.
    fn searched(&self, piece: Piece<'_>, scales: Vec<f32>) -> Option<Vec<usize>> {
        let nested_absmax = if self.whole_groups { search::absmax(&scales) } else { Vec::new() };
        let found = Blocks { scales, nested_absmax, ..Blocks::default() };
        let Progress { levels, blocks, .. } = &mut *self.lock();
        blocks.put(self.first_block(piece), self.blocks(), &found);
        let Levels::Awaited { left, waiting } = levels else { return Some(Vec::new()) };
        *left -= usize::from(self.sample.contains(&piece.chunk));
        if *left > 0 {
            waiting.push(piece.chunk);
            return None;
        }
        if !self.whole_groups {
            blocks.nested_absmax = search::absmax(&blocks.scales);
        }
        let map = Arc::new(Map::fit(&blocks.scales, None));
        let waited = take(waiting);
        *levels = Levels::Fitted { map, waited: waited.clone() };
        Some(waited)
    }

    /// A chunk has been packed: write its codes, and after the last one what stands beside them.
    fn packed(&self, piece: Piece<'_>, found: &Blocks, codes: &[u8], sink: &Sink<'_>) -> Result<Vec<usize>> {
        sink.write_at(self.output, piece.first / 2, codes)?;
        let first = self.first_block(piece);
        let error = if found.moments.is_empty() {
            Deviation::of(&self.moments(piece, codes), &found.scales, first)
        } else {
            Deviation::default()
        };
        let mut progress = self.lock();
        progress.blocks.put(first, self.blocks(), found);
        progress.deviations[piece.chunk - self.chunks.start] = error;
        progress.left -= 1;
        if progress.left > 0 { Ok(Vec::new()) } else { self.finish(&mut progress, sink) }
    }

    /// All chunks have been packed: write what stands beside the codes, or begin anew in exact mode.
    fn finish(&self, progress: &mut Progress, sink: &Sink<'_>) -> Result<Vec<usize>> {
        let double_quant = self.state.nested_offset.is_some();
        let blocks = take(&mut progress.blocks);
        if matches!(progress.mode, Mode::Exact) {
            let scales = Scales::exact(blocks.scales, double_quant);
            progress.result = Some(Deviation::of(&blocks.moments, &scales.decoded, 0).whole());
            self.write_beside(scales, sink)?;
            return Ok(Vec::new());
        }
        let error = take(&mut progress.deviations).into_iter().fold(Deviation::default(), Deviation::and).whole();
        let exact = take(&mut progress.exact);
        let exact = Deviation::of(&exact.moments, &Scales::exact(exact.scales, double_quant).decoded, 0).whole();
        if exact.relative < error.relative {
            progress.mode = Mode::Exact;
            progress.left = self.chunks.len();
            progress.deviations = vec![Deviation::default(); self.chunks.len()];
            return Ok(self.chunks.clone().collect());
        }
        progress.result = Some(error);
        let nested = Nested { codes: blocks.nested, absmax: blocks.nested_absmax, offset: 0.0 };
        let nested = match &progress.levels {
            Levels::Fitted { map, .. } => Some((nested, &map.0)),
            Levels::Awaited { .. } => None,
        };
        self.write_beside(Scales { nested, decoded: blocks.scales }, sink)?;
        Ok(Vec::new())
    }

    /// Write what stands beside the codes.
    fn write_beside(&self, scales: Scales<'_>, sink: &Sink<'_>) -> Result<()> {
        let mut state = self.state.clone();
        let mut rest = match scales.nested {
            Some((nested, levels)) => {
                state.nested_offset = Some(nested.offset);
                vec![nested.codes, le_bytes(&nf4::LEVELS), le_bytes(&nested.absmax), le_bytes(levels)]
            }
            None => vec![le_bytes(&scales.decoded), le_bytes(&nf4::LEVELS)],
        };
        rest.push(state.to_json());
        let outputs = self.output + 1..;
        outputs.zip(&rest).try_for_each(|(output, bytes)| sink.write_at(output, 0, bytes))
    }

    fn values<'b>(&self, piece: Piece<'b>) -> Values<'b> {
        Values::Stored(piece.bytes, self.float)
    }

    fn moments(&self, piece: Piece<'_>, codes: &[u8]) -> Vec<Moments> {
        let blocksize = self.state.blocksize;
        let mut moments = vec![Moments::default(); self.values(piece).len().div_ceil(blocksize)];
        nf4::moments(piece.bytes, self.float, codes, blocksize, &mut moments);
        moments
    }

    /// Number of the block that a chunk begins with.
    fn first_block(&self, piece: Piece<'_>) -> usize {
        (piece.first / self.state.blocksize as u64) as usize
    }

    /// Blocks of the weight.
    fn blocks(&self) -> usize {
        nf4::blocks(self.state.elements(), self.state.blocksize) as usize
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }
}

impl Blocks {
    /// Put what is known of some blocks in its place among `total` ones.
    fn put(&mut self, first: usize, total: usize, found: &Self) {
        put(&mut self.scales, first, total, &found.scales);
        put(&mut self.nested, first, total, &found.nested);
        put(&mut self.moments, first, total, &found.moments);
        let (group, groups) = (first / nested::BLOCKSIZE, total.div_ceil(nested::BLOCKSIZE));
        put(&mut self.nested_absmax, group, groups, &found.nested_absmax);
    }
}

/// Put `found` in its place among `total` items, if there are any.
fn put<T: Copy + Default>(all: &mut Vec<T>, first: usize, total: usize, found: &[T]) {
    if !found.is_empty() {
        all.resize(total, T::default());
        all[first..first + found.len()].copy_from_slice(found);
    }
}

impl Scales<'_> {
    /// The scales as bitsandbytes stores them.
    fn exact(scales: Vec<f32>, double_quant: bool) -> Self {
        if !double_quant {
            return Self { nested: None, decoded: scales };
        }
        let nested = nested::quantize(&scales, nested::offset(&scales));
        let decoded = nested::dequantize(&nested.codes, &nested.absmax, &nested::QUANT_MAP, nested.offset);
        Self { nested: Some((nested, &nested::QUANT_MAP)), decoded }
    }
}

/// How far blocks are from their source.
#[derive(Debug, Clone, Copy, Default)]
struct Deviation {
    /// Sums of squares, of the difference and of the source.
    squares: f64,
    total: f64,
    /// The largest share of a block's sum, and that block's number.
    worst: f64,
    worst_block: u64,
}

impl Deviation {
    /// The error of blocks from number `first` on, which have these moments under these (decoded) scales.
    ///
    /// Per block `sum (x - s q)^2 = sum x^2 - 2 s sum x q + s^2 sum q^2`, in f64; the moments are f32 sums. Blocks where they
    /// overflow, with weights over 1e18, are left out.
    fn of(moments: &[Moments], scales: &[f32], first: usize) -> Self {
        let mut error = Self::default();
        for (block, (moments, &scale)) in (first as u64..).zip(moments.iter().zip(scales)) {
            let Moments { xx, xq, qq } = *moments;
            if !xx.is_finite() {
                continue;
            }
            let [xx, xq, qq, scale] = [xx, xq, qq, scale].map(f64::from);
            let squares = (xx - 2.0 * scale * xq + scale * scale * qq).max(0.0);
            let worst = if xx > 0.0 { squares / xx } else { 0.0 };
            error = error.and(Self { squares, total: xx, worst, worst_block: block });
        }
        error
    }

    /// This and that of later blocks.
    fn and(self, later: Self) -> Self {
        let worst = if later.worst > self.worst { later } else { self };
        Self {
            squares: self.squares + later.squares,
            total: self.total + later.total,
            worst: worst.worst,
            worst_block: worst.worst_block,
        }
    }

    /// As the error of a whole weight.
    fn whole(self) -> WeightError {
        let relative = if self.total > 0.0 { (self.squares / self.total).sqrt() } else { 0.0 };
        WeightError { relative, norm: self.total.sqrt(), worst: self.worst.sqrt(), worst_block: self.worst_block }
    }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
