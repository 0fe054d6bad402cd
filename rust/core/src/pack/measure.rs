//! Packing in several ways at once without writing anything, to learn what each would cost in error.

use std::collections::BTreeMap;
use std::ops::Range;

use super::run::PackRun;
use super::{Mode, Options, Pack, Packing, Recipe};
use crate::merge::Changes;
use crate::safetensors::{Checkpoint, Tensor, TensorSpec};
use crate::stream::{self, Plan, Run, Sink, WeightError};
use crate::{Dtype, Result};

/// Read the sources of `recipes` once and pack every packed part in each way of `candidates`, exactly.
///
/// The plan is to be [examined](Plan::examine); [`stream::Written::errors`] then has the error of each weight under each candidate, by the
/// weight's name, a tab and the candidate's index.
///
/// # Errors
/// As [`super::plan`].
pub fn measure<'a>(checkpoint: &'a Checkpoint, recipes: &[Recipe], candidates: &[Packing]) -> Result<Plan<'a>> {
    let mut measures: Vec<Box<dyn stream::Recipe + 'a>> = Vec::new();
    for recipe in recipes.iter().filter(|recipe| recipe.parts.iter().any(|part| part.packing.is_some())) {
        let packed = |packing: Packing| {
            let mut recipe = recipe.clone();
            for part in recipe.parts.iter_mut().filter(|part| part.packing.is_some()) {
                part.packing = Some(packing);
            }
            Pack::new(checkpoint, &recipe, Changes::none(), Options { mode: Mode::Exact, storage: Dtype::U8 })
        };
        let mut ways = candidates.iter().map(|&packing| packed(packing)).collect::<Result<Vec<_>>>()?;
        // Chunks of whole large blocks are whole small blocks too.
        let largest = (0..ways.len()).max_by_key(|&way| candidates[way].blocksize);
        if let Some(chunks) = largest.map(|way| ways[way].chunks.clone()) {
            for way in &mut ways {
                way.chunks.clone_from(&chunks);
            }
            measures.push(Box::new(Measure { source: checkpoint.tensor(&recipe.source)?, ways }));
        }
    }
    Ok(Plan::new(measures, u64::MAX))
}

/// One source tensor, packed in several ways.
struct Measure<'a> {
    source: Tensor<'a>,
    ways: Vec<Pack<'a>>,
}

impl stream::Recipe for Measure<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    fn source(&self) -> Tensor<'_> {
        self.source
    }

    fn chunks(&self) -> Vec<Range<u64>> {
        self.ways[0].chunks()
    }

    fn start(&self) -> Result<Box<dyn Run + '_>> {
        Ok(Box::new(MeasureRun(self.ways.iter().map(PackRun::new).collect::<Result<_>>()?)))
    }
}

struct MeasureRun<'a>(Vec<PackRun<'a>>);

impl Run for MeasureRun<'_> {
    fn chunk(&self, chunk: usize, bytes: &[u8], _sink: &Sink<'_>) -> Result<Vec<usize>> {
        let mut again = Vec::new();
        for way in &self.0 {
            again = way.chunk(chunk, bytes, &Sink::nowhere())?;
        }
        Ok(again)
    }

    fn errors(&self) -> BTreeMap<String, WeightError> {
        let ways = self.0.iter().enumerate();
        ways.flat_map(|(index, way)| {
            way.errors().into_iter().map(move |(name, error)| (format!("{name}\t{index}"), error))
        })
        .collect()
    }
}
