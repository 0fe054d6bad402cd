//! How far stored tensors are from what they were made from.
//!
//! The recipes are those of packing, and the sources are read, decoded and cut in the same way. A packed weight is
//! decoded and subtracted; with `x` the values before packing and `x'` those decoded,
//!
//! ```text
//! relative = sqrt(sum (x - x')^2 / sum x^2)      over the whole weight, or over one block
//! ```
//!
//! every square and sum in f64, in an order that does not depend on the number of threads. A tensor that was kept must
//! be equal, bit for bit, to its source rounded once to the stored type.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::run::Reader;
use super::{Mode, Options, Pack, Packing, Recipe};
use crate::isa::vectorized;
use crate::merge::Changes;
use crate::packed::Packed;
use crate::safetensors::{Checkpoint, Tensor, TensorSpec};
use crate::stream::{self, Plan, Run, Sink, WeightError};
use crate::sync::lock;
use crate::{Dtype, Float, Result, nf4};

/// Sums of squares are taken in this many lanes, whatever the processor has.
const LANES: usize = 16;

/// What a comparison found that is no error of a packed weight.
#[derive(Debug, Default)]
pub struct Differences {
    /// Of kept tensors: the first flat index at which one differs from its source.
    pub kept: BTreeMap<String, u64>,
    /// Why a tensor could not be compared, or what is wrong with its source.
    pub problems: BTreeMap<String, String>,
}

/// Compare the tensors of `stored` with what `recipes` make of those of `originals`. How a part is stored is taken from
/// `stored`, not from the recipe.
///
/// The plan is to be [examined](Plan::examine); [`stream::Written::errors`] then has the error of each packed weight,
/// and everything else is in `differences`.
///
/// # Errors
/// As [`super::plan`].
pub fn compare<'a>(
    stored: &'a Checkpoint,
    originals: &'a Checkpoint,
    recipes: &[Recipe],
    differences: &'a Mutex<Differences>,
) -> Result<Plan<'a>> {
    let mut compared: Vec<Box<dyn stream::Recipe + 'a>> = Vec::new();
    for recipe in recipes {
        let mut recipe = recipe.clone();
        let mut stored_parts = Vec::new();
        for part in &mut recipe.parts {
            let found = StoredPart::open(stored, &part.name, &part.shape);
            part.keep_as = None;
            part.packing = match &found {
                Ok(StoredPart::Packed { packed, .. }) => {
                    Some(Packing { blocksize: packed.state().blocksize, double_quant: false })
                }
                _ => None,
            };
            stored_parts.push(found.unwrap_or_else(|reason| {
                lock(differences).problems.insert(part.name.clone(), reason.to_string());
                StoredPart::Unknown
            }));
        }
        let pack = Pack::new(originals, &recipe, Changes::none(), Options { mode: Mode::Exact, storage: Dtype::U8 })?;
        let unlike = pack.parts.iter().zip(&mut stored_parts);
        for ((part, _), stored) in unlike {
            if let Some(reason) = stored.unlike(pack.encoding.float().map_or(pack.source.info.dtype, Float::dtype)) {
                lock(differences).problems.insert(part.name.clone(), reason);
                *stored = StoredPart::Unknown;
            }
        }
        compared.push(Box::new(Compare { pack, stored: stored_parts, differences }));
    }
    Ok(Plan::new(compared, u64::MAX))
}

/// A tensor that was made by a recipe.
enum StoredPart<'a> {
    Packed {
        packed: Packed<'a>,
        codes: Tensor<'a>,
    },
    Kept(Tensor<'a>),
    /// It cannot be compared, which has been said.
    Unknown,
}

impl<'a> StoredPart<'a> {
    fn open(stored: &'a Checkpoint, name: &str, shape: &[u64]) -> Result<Self> {
        let codes = stored.tensor(name)?;
        let found = if Packed::is(stored, name) {
            let packed = Packed::open(stored, name)?;
            Self::Packed { packed, codes }
        } else {
            Self::Kept(codes)
        };
        let found_shape = match &found {
            Self::Packed { packed, .. } => &packed.state().shape,
            _ => &codes.info.shape,
        };
        if found_shape != shape {
            return Err(codes.error(format!("has shape {found_shape:?}, its source {shape:?}")));
        }
        Ok(found)
    }

    /// Why it cannot be compared with a source of type `dtype`, decoded.
    fn unlike(&self, dtype: Dtype) -> Option<String> {
        match self {
            Self::Packed { codes, .. } if Float::from_dtype(dtype).is_none() => {
                Some(codes.error(format!("is packed, its source {}", dtype.name())).to_string())
            }
            Self::Kept(tensor) => {
                let to = tensor.info.dtype;
                let rounds = Float::from_dtype(to).is_some() && Float::from_dtype(dtype).is_some();
                let reason = || format!("is {}, which is no rounding of {}", to.name(), dtype.name());
                (to != dtype && !rounds).then(|| tensor.error(reason()).to_string())
            }
            _ => None,
        }
    }
}

struct Compare<'a> {
    pack: Pack<'a>,
    stored: Vec<StoredPart<'a>>,
    differences: &'a Mutex<Differences>,
}

impl stream::Recipe for Compare<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    fn source(&self) -> Tensor<'_> {
        self.pack.source
    }

    fn beside(&self) -> Vec<Tensor<'_>> {
        self.pack.beside()
    }

    fn chunks(&self) -> Vec<Range<u64>> {
        self.pack.chunks()
    }

    fn start(&self) -> Result<Box<dyn Run + '_>> {
        let parts = self.stored.iter().map(|stored| {
            let scales = match stored {
                StoredPart::Packed { packed, .. } => packed.read_scales()?,
                _ => Vec::new(),
            };
            Ok(ComparedPart { scales, squares: Mutex::default(), first_difference: AtomicU64::new(u64::MAX) })
        });
        let parts = parts.collect::<Result<_>>()?;
        Ok(Box::new(CompareRun { compare: self, reader: Reader::new(&self.pack)?, parts }))
    }
}

struct CompareRun<'a> {
    compare: &'a Compare<'a>,
    reader: Reader<'a>,
    parts: Vec<ComparedPart>,
}

/// What is known of a part so far.
struct ComparedPart {
    scales: Vec<f32>,
    /// By the index of the first element.
    squares: Mutex<BTreeMap<u64, Squares>>,
    first_difference: AtomicU64,
}

impl CompareRun<'_> {
    fn compare_part(&self, part: usize, first: u64, floats: &[u8]) -> Result<()> {
        let ComparedPart { scales, squares, first_difference } = &self.parts[part];
        let from = self.compare.pack.encoding.float();
        match &self.compare.stored[part] {
            StoredPart::Unknown => {}
            StoredPart::Packed { packed, codes } => {
                let Some(from) = from else { return Ok(()) };
                let blocksize = packed.state().blocksize;
                let mut values = vec![0.0; floats.len() / from.size()];
                from.decode(floats, &mut values);
                let mut bytes = vec![0; values.len().div_ceil(2)];
                codes.read_at(first / 2, &mut bytes)?;
                let mut decoded = vec![0.0; values.len()];
                let block = (first / blocksize as u64) as usize;
                let scales = &scales[block..][..values.len().div_ceil(blocksize)];
                nf4::dequantize(&bytes, scales, blocksize, &mut decoded);
                let found = Squares::of(&values, &decoded, blocksize, block as u64);
                lock(squares).insert(first, found);
            }
            StoredPart::Kept(tensor) => {
                let size = tensor.info.dtype.size();
                let expected = match (from, Float::from_dtype(tensor.info.dtype)) {
                    (Some(from), Some(to)) if from != to => Cow::Owned(from.convert(floats, to)),
                    _ => Cow::Borrowed(floats),
                };
                let mut bytes = vec![0; expected.len()];
                tensor.read_at(first * size, &mut bytes)?;
                if let Some(byte) = bytes.iter().zip(&*expected).position(|(stored, expected)| stored != expected) {
                    first_difference.fetch_min(first + byte as u64 / size, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }
}

impl Run for CompareRun<'_> {
    fn chunk(&self, chunk: usize, bytes: &[u8], _sink: &Sink<'_>) -> Result<Vec<usize>> {
        self.reader.cut(&self.compare.pack.chunks[chunk], bytes, |part, first, floats| {
            self.compare_part(part, first, floats).map(|()| Vec::new())
        })
    }

    fn errors(&self) -> BTreeMap<String, WeightError> {
        let mut errors = BTreeMap::new();
        let mut differences = lock(self.compare.differences);
        let parts = self.compare.pack.parts.iter().zip(&self.compare.stored).zip(&self.parts);
        for (((part, _), stored), found) in parts {
            match stored {
                StoredPart::Unknown => {}
                StoredPart::Packed { .. } => {
                    let squares = lock(&found.squares);
                    let all = squares.values().copied().reduce(Squares::and).unwrap_or_default();
                    if all.values.is_finite() {
                        errors.insert(part.name.clone(), all.error());
                    } else {
                        let problem = self.compare.pack.source.error("holds values that are not finite");
                        differences.problems.insert(part.name.clone(), problem.to_string());
                    }
                }
                StoredPart::Kept(_) => {
                    let first = found.first_difference.load(Ordering::Relaxed);
                    if first != u64::MAX {
                        differences.kept.insert(part.name.clone(), first);
                    }
                }
            }
        }
        errors
    }
}

/// Sums of squares over some blocks.
#[derive(Debug, Clone, Copy, Default)]
struct Squares {
    differences: f64,
    values: f64,
    /// The largest ratio of the two over one block.
    worst: f64,
    worst_block: u64,
}

impl Squares {
    fn of(values: &[f32], decoded: &[f32], blocksize: usize, first_block: u64) -> Self {
        vectorized(
            #[inline(always)]
            || {
                let blocks = values.chunks(blocksize).zip(decoded.chunks(blocksize));
                let blocks = (first_block..).zip(blocks).map(
                    #[inline(always)]
                    |(block, (values, decoded))| Self::of_block(block, values, decoded),
                );
                blocks.fold(Self::default(), Self::and)
            },
        )
    }

    #[inline(always)]
    fn of_block(block: u64, values: &[f32], decoded: &[f32]) -> Self {
        let (mut differences, mut squares) = ([0.0; LANES], [0.0; LANES]);
        for (values, decoded) in values.chunks(LANES).zip(decoded.chunks(LANES)) {
            let lanes = squares.iter_mut().zip(&mut differences).zip(values.iter().zip(decoded));
            for ((square, difference), (&value, &decoded)) in lanes {
                let (value, decoded) = (f64::from(value), f64::from(decoded));
                *square += value * value;
                *difference += (value - decoded) * (value - decoded);
            }
        }
        let (differences, values) = (differences.iter().sum(), squares.iter().sum());
        Self { differences, values, worst: ratio(differences, values), worst_block: block }
    }

    /// These blocks and the `later` ones.
    #[inline(always)]
    fn and(self, later: Self) -> Self {
        let worse = if later.worst > self.worst { later } else { self };
        Self { differences: self.differences + later.differences, values: self.values + later.values, ..worse }
    }

    fn error(self) -> WeightError {
        WeightError {
            relative: ratio(self.differences, self.values).sqrt(),
            norm: self.values.sqrt(),
            worst: self.worst.sqrt(),
            worst_block: self.worst_block,
        }
    }
}

/// `differences / values`; 0 where there are no values but zeros, which NF4 stores exactly.
#[inline(always)]
fn ratio(differences: f64, values: f64) -> f64 {
    if values > 0.0 { differences / values } else { 0.0 }
}
