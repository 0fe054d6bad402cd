//! A source tensor on its way: chunks are decoded, cut into parts, and packed or kept.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use super::chunks::Work;
use super::encoding::Decoder;
use super::weight::Weight;
use super::{Output, Pack, Part};
use crate::stream::{Run, Sink, WeightError};
use crate::{Dtype, Float, Result};

pub(super) struct PackRun<'p> {
    pack: &'p Pack<'p>,
    decoder: Decoder,
    made: Vec<Made<'p>>,
}

/// One part at work, with the index of its first output.
enum Made<'p> {
    Packed(Box<Weight<'p>>),
    Kept { output: usize, dtype: Dtype },
}

impl<'p> PackRun<'p> {
    pub(super) fn new(pack: &'p Pack<'p>) -> Result<Self> {
        let mut output = 0;
        let mut made = Vec::new();
        for (index, (part, how)) in pack.parts.iter().enumerate() {
            made.push(match how {
                Output::Packed(state) => {
                    let belongs = |work: &Work| match work {
                        Work::Run { part, .. } => *part == index,
                        Work::Matrix { parts, .. } => parts.contains(&index),
                    };
                    let first = pack.chunks.iter().position(|chunk| belongs(&chunk.work)).unwrap_or(0);
                    let count = pack.chunks[first..].iter().take_while(|chunk| belongs(&chunk.work)).count();
                    let weight = Weight::new(&part.name, state, pack.options, output, first..first + count);
                    output += state.tensors(&part.name, pack.options.storage).len();
                    Made::Packed(Box::new(weight))
                }
                Output::Kept(dtype) => {
                    output += 1;
                    Made::Kept { output: output - 1, dtype: *dtype }
                }
            });
        }
        Ok(Self { pack, decoder: pack.encoding.decoder()?, made })
    }

    /// Hand the elements of `part` from `first` on, decoded, to where they go.
    fn put(&self, part: usize, first: u64, floats: &[u8], sink: &Sink<'_>) -> Result<Range<usize>> {
        match &self.made[part] {
            Made::Packed(weight) => {
                weight.put(first, floats, sink, |index| self.pack.non_finite(&self.pack.parts[part].0, index))
            }
            Made::Kept { output, dtype } => {
                let from = self.pack.encoding.float();
                let kept = match (from, Float::from_dtype(*dtype)) {
                    (Some(from), Some(to)) if from != to => Cow::Owned(from.convert(floats, to)),
                    _ => Cow::Borrowed(floats),
                };
                sink.write_at(*output, first * dtype.size(), &kept)?;
                Ok(0..0)
            }
        }
    }
}

/// Decode a chunk of `pack` and hand each part in it its elements as floats, with the number of the first one. Returns
/// the chunks that `put` wants once more.
pub(super) fn cut(
    pack: &Pack<'_>,
    decoder: &Decoder,
    chunk: usize,
    bytes: &[u8],
    mut put: impl FnMut(usize, u64, &[u8]) -> Result<Range<usize>>,
) -> Result<Range<usize>> {
    let chunk = &pack.chunks[chunk];
    let floats = decoder.decode(chunk.first, bytes);
    match &chunk.work {
        Work::Run { part, first } => put(*part, *first, &floats),
        Work::Matrix { parts, rows, columns } => {
            let size = pack.encoding.float().map_or(pack.source.info.dtype.size() as usize, Float::size);
            let mut gathered = Vec::new();
            for part in parts.clone() {
                gather(&pack.parts[part].0, &floats, [*rows, *columns], size, &mut gathered);
                let again = put(part, 0, &gathered)?;
                debug_assert!(again.is_empty(), "a part that comes whole is done at once");
            }
            Ok(0..0)
        }
    }
}

impl Run for PackRun<'_> {
    fn chunk(&self, chunk: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Range<usize>> {
        cut(self.pack, &self.decoder, chunk, bytes, |part, first, floats| self.put(part, first, floats, sink))
    }

    fn comes_again(&self, chunk: usize) -> bool {
        match &self.pack.chunks[chunk].work {
            Work::Run { part, .. } => matches!(&self.made[*part], Made::Packed(weight) if weight.comes_again()),
            Work::Matrix { .. } => false,
        }
    }

    fn errors(&self) -> BTreeMap<String, WeightError> {
        let errors = self.made.iter().filter_map(|made| match made {
            Made::Packed(weight) => Some((weight.name().to_owned(), weight.error())),
            Made::Kept { .. } => None,
        });
        errors.collect()
    }
}

/// Collect the rows of `part` out of a matrix of `rows` times `columns` elements of `size` bytes (or of its transpose).
fn gather(part: &Part, matrix: &[u8], [rows, columns]: [u64; 2], size: usize, out: &mut Vec<u8>) {
    let [rows, columns] = [rows as usize, columns as usize];
    let taken = (0..part.row_count() as usize).map(|row| part.rows.0 as usize + row * part.rows.1 as usize);
    out.clear();
    for row in taken {
        if part.transpose {
            let elements = (0..columns).map(|column| &matrix[(column * rows + row) * size..][..size]);
            elements.for_each(|element| out.extend_from_slice(element));
        } else {
            out.extend_from_slice(&matrix[row * columns * size..][..columns * size]);
        }
    }
}
