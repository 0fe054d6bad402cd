//! One weight being packed: codes chunk by chunk; scales, error and quant state when all of them have been seen.
//!
//! In exact mode once is enough. Best mode sees the chunks twice with double quantization, since the levels of the scales
//! are fitted to all of them before the codes can be picked. It also keeps the sums that tell the error of exact mode,
//! and should that be smaller, which is rare, the chunks are seen once more and packed exactly.

use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use super::{Mode, Options};
use crate::nested::{self, Nested};
use crate::nf4::{self, Moments};
use crate::quant_state::QuantState;
use crate::search::{self, Candidates, Map, Values};
use crate::stream::{Sink, WeightError};
use crate::sync::lock;
use crate::{Error, Float, Result};

static CANDIDATES: LazyLock<Candidates> = LazyLock::new(Candidates::default);

pub(super) struct Weight<'p> {
    name: &'p str,
    state: &'p QuantState,
    /// What the values that are packed come as.
    float: Float,
    /// Index of the codes among the recipe's outputs; the rest follows, in the order of [`QuantState::tensors`].
    output: usize,
    /// The recipe's chunks that hold this weight.
    chunks: Range<usize>,
    progress: Mutex<Progress>,
}

struct Progress {
    pass: Pass,
    /// Chunks that this pass has not seen yet.
    left: usize,
    /// What this pass packs or finds.
    blocks: Blocks,
    /// What exact mode would pack, in a pass that searches.
    exact: Blocks,
    /// Error of exact mode, once a search has seen all chunks.
    exact_error: Option<WeightError>,
    error: Option<WeightError>,
}

#[derive(Clone)]
enum Pass {
    /// Pack as bitsandbytes does.
    Exact,
    /// Search the scales, and without double quantization pack by them.
    Search,
    /// Pack by the nearest scales of a map.
    Snap(Arc<Map>),
}

/// What is known of every block.
#[derive(Default)]
struct Blocks {
    scales: Vec<f32>,
    /// 8-bit codes of the scales.
    nested: Vec<u8>,
    moments: Vec<Moments>,
}

/// The block scales of a weight as they are stored.
struct Scales<'s> {
    /// With their levels; None if they are stored as they are.
    nested: Option<(Nested, &'s [f32; 256])>,
    /// As a reader decodes them.
    decoded: Vec<f32>,
}

impl<'p> Weight<'p> {
    pub(super) fn new(
        name: &'p str,
        state: &'p QuantState,
        float: Float,
        options: Options,
        output: usize,
        chunks: Range<usize>,
    ) -> Self {
        let pass = match options.mode {
            Mode::Exact => Pass::Exact,
            Mode::Best => Pass::Search,
        };
        let (blocks, exact) = (Blocks::default(), Blocks::default());
        let progress = Progress { pass, left: chunks.len(), blocks, exact, exact_error: None, error: None };
        Self { name, state, float, output, chunks, progress: Mutex::new(progress) }
    }

    pub(super) fn name(&self) -> &str {
        self.name
    }

    /// How far the packed weight is from its source; known when all chunks have been seen.
    pub(super) fn error(&self) -> WeightError {
        self.lock().error.expect("all chunks have been seen")
    }

    /// Whether a chunk that has been seen once is going to be seen again.
    pub(super) fn comes_again(&self) -> bool {
        let searched = !matches!(self.lock().pass, Pass::Exact);
        searched && self.state.nested_offset.is_some() && self.chunks.len() > 1
    }

    /// Pack the elements from number `first` on, which are a chunk. Returns the chunks that have to come once more, none
    /// if this is the only one.
    pub(super) fn put(
        &self,
        first: u64,
        bytes: &[u8],
        sink: &Sink<'_>,
        non_finite: impl Fn(u64) -> Error,
    ) -> Result<Range<usize>> {
        loop {
            let again = self.pass(first, bytes, sink, &non_finite)?;
            if again.is_empty() || self.chunks.len() > 1 {
                return Ok(again);
            }
        }
    }

    fn pass(
        &self,
        first: u64,
        bytes: &[u8],
        sink: &Sink<'_>,
        non_finite: &impl Fn(u64) -> Error,
    ) -> Result<Range<usize>> {
        let (blocksize, dtype) = (self.state.blocksize, self.float);
        let first_block = (first / blocksize as u64) as usize;
        let elements = bytes.len() / dtype.size();
        let mut codes = vec![0; elements.div_ceil(2)];
        let count = elements.div_ceil(blocksize);
        let scales_alone = || Blocks { scales: vec![0.0; count], ..Blocks::default() };
        let mut found = Blocks { moments: vec![Moments::default(); count], ..scales_alone() };
        let mut exact = Blocks::default();
        let offender = |index: usize| non_finite(first + index as u64);
        let values = Values::Stored(bytes, dtype);
        let pass = self.lock().pass.clone();
        if matches!(pass, Pass::Exact | Pass::Search) {
            nf4::quantize(bytes, dtype, blocksize, &mut found.scales, &mut codes).map_err(offender)?;
            nf4::moments(bytes, dtype, &codes, blocksize, &mut found.moments);
        }
        let packed = match &pass {
            Pass::Exact => true,
            Pass::Search => {
                exact = std::mem::replace(&mut found, scales_alone());
                search::scales(values, None, blocksize, &CANDIDATES, &mut found.scales).map_err(offender)?;
                let packed = self.state.nested_offset.is_none();
                if packed {
                    found.moments.resize(count, Moments::default());
                    search::codes(values, &found.scales, blocksize, &mut codes);
                    nf4::moments(bytes, dtype, &codes, blocksize, &mut found.moments);
                }
                packed
            }
            Pass::Snap(map) => {
                found.nested.resize(count, 0);
                let free = &self.lock().blocks.scales[first_block..][..found.scales.len()];
                found.scales.copy_from_slice(free);
                let Blocks { scales, nested, moments } = &mut found;
                map.snap(values, None, blocksize, first_block, scales, nested, &mut codes);
                nf4::moments(bytes, dtype, &codes, blocksize, moments);
                true
            }
        };
        if packed {
            sink.write_at(self.output, first / 2, &codes)?;
        }
        let mut progress = self.lock();
        let total = nf4::blocks(self.state.elements(), blocksize) as usize;
        progress.blocks.put(first_block, total, &found);
        if matches!(pass, Pass::Search) {
            progress.exact.put(first_block, total, &exact);
        }
        progress.left -= 1;
        if progress.left > 0 { Ok(0..0) } else { self.end_of_pass(&mut progress, sink) }
    }

    /// All chunks have been seen: go on to the next pass, or write what stands beside the codes.
    fn end_of_pass(&self, progress: &mut Progress, sink: &Sink<'_>) -> Result<Range<usize>> {
        let double_quant = self.state.nested_offset.is_some();
        let blocks = std::mem::take(&mut progress.blocks);
        let pass = progress.pass.clone();
        if matches!(pass, Pass::Search) {
            let exact = std::mem::take(&mut progress.exact);
            progress.exact_error = Some(error(&exact.moments, &Scales::exact(exact.scales, double_quant).decoded));
            if double_quant {
                progress.pass = Pass::Snap(Arc::new(Map::fit(&blocks.scales, None)));
                progress.blocks = blocks;
                progress.left = self.chunks.len();
                return Ok(self.chunks.clone());
            }
        }
        let Blocks { scales, nested, moments } = blocks;
        let scales = match &pass {
            Pass::Exact => Scales::exact(scales, double_quant),
            Pass::Search => Scales { nested: None, decoded: scales },
            Pass::Snap(map) => {
                let nested = Nested { codes: nested, absmax: map.absmax.clone(), offset: 0.0 };
                Scales { nested: Some((nested, &map.levels)), decoded: scales }
            }
        };
        let error = error(&moments, &scales.decoded);
        if progress.exact_error.is_some_and(|exact| exact.relative < error.relative) {
            (progress.pass, progress.exact_error) = (Pass::Exact, None);
            progress.left = self.chunks.len();
            return Ok(self.chunks.clone());
        }
        progress.error = Some(error);
        self.write_beside(scales, sink)?;
        Ok(0..0)
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

/// The error of a weight whose blocks have these moments under these (decoded) scales.
///
/// Per block `sum (x - s q)^2 = sum x^2 - 2 s sum x q + s^2 sum q^2`, in f64; the moments are f32 sums. Blocks where they
/// overflow, with weights over 1e18, are left out.
fn error(moments: &[Moments], scales: &[f32]) -> WeightError {
    let (mut squares, mut total) = (0.0, 0.0);
    let (mut worst, mut worst_block) = (0.0, 0);
    for (index, (moments, &scale)) in (0..).zip(moments.iter().zip(scales)) {
        let Moments { xx, xq, qq } = *moments;
        if !xx.is_finite() {
            continue;
        }
        let [xx, xq, qq, scale] = [xx, xq, qq, scale].map(f64::from);
        let square = (xx - 2.0 * scale * xq + scale * scale * qq).max(0.0);
        squares += square;
        total += xx;
        if xx > 0.0 && square / xx > worst {
            (worst, worst_block) = (square / xx, index);
        }
    }
    let relative = if total > 0.0 { (squares / total).sqrt() } else { 0.0 };
    WeightError { relative, norm: total.sqrt(), worst: worst.sqrt(), worst_block }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
