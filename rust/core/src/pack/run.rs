//! A source tensor on its way: chunks are decoded, changed, cut into parts, and packed or kept.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::chunks::{Chunk, Work};
use super::encoding::{Decoder, Elements};
use super::weight::{Piece, Weight};
use super::{Output, Pack, Part};
use crate::merge::{Applied, Codes, Norms, OpenChange, Values};
use crate::stream::{Run, Sink, WeightError};
use crate::{Dtype, Float, Result};

/// What reads the elements of a source.
pub(super) struct Reader<'p> {
    pack: &'p Pack<'p>,
    decoder: Decoder<'p>,
    change: Option<Applied>,
}

impl<'p> Reader<'p> {
    pub(super) fn new(pack: &'p Pack<'p>) -> Result<Self> {
        let change = pack.change.as_ref().map(OpenChange::read).transpose()?;
        Ok(Self { pack, decoder: pack.encoding.decoder()?, change })
    }

    fn elements<'b>(&'b self, chunk: &Chunk, bytes: &'b [u8]) -> Elements<'b> {
        self.decoder.read(chunk.first, chunk.len, bytes)
    }

    /// The elements of `chunk`, changed, as values of type `to`; of one that is no float as they are.
    fn read<'b>(&self, chunk: &Chunk, elements: &'b Elements<'b>, to: Option<Float>) -> Cow<'b, [u8]> {
        match (&self.change, to) {
            (Some(change), Some(to)) => {
                let mut out = vec![0; chunk.len as usize * to.size()];
                change.apply(&Read(chunk, elements), to, &mut out);
                Cow::Owned(out)
            }
            _ => elements.to_bytes(to),
        }
    }

    /// Decode a chunk and hand each part in it its elements, with the number of the first one. Returns the chunks that
    /// `put` wants once more.
    pub(super) fn cut(
        &self,
        chunk: &Chunk,
        bytes: &[u8],
        mut put: impl FnMut(usize, u64, &[u8]) -> Result<Vec<usize>>,
    ) -> Result<Vec<usize>> {
        let elements = self.elements(chunk, bytes);
        match &chunk.work {
            Work::Run { part, first } => put(*part, *first, &self.read(chunk, &elements, self.pack.taken_as(*part))),
            Work::Matrix { parts, rows, columns } => {
                let mut gathered = Vec::new();
                let mut read: Option<(Option<Float>, Cow<'_, [u8]>)> = None;
                for part in parts.clone() {
                    let to = self.pack.taken_as(part);
                    let (_, all) = match read.take_if(|(as_before, _)| *as_before == to) {
                        Some(read_before) => read.insert(read_before),
                        None => read.insert((to, self.read(chunk, &elements, to))),
                    };
                    let size = to.map_or(self.pack.source.info.dtype.size() as usize, Float::size);
                    gather(&self.pack.parts[part].0, all, [*rows, *columns], size, &mut gathered);
                    let again = put(part, 0, &gathered)?;
                    debug_assert!(again.is_empty(), "a part that comes whole is done at once");
                }
                Ok(Vec::new())
            }
        }
    }
}

/// The elements of a chunk, for a change.
struct Read<'e>(&'e Chunk, &'e Elements<'e>);

impl Values for Read<'_> {
    fn first(&self) -> u64 {
        self.0.first
    }

    fn len(&self) -> usize {
        self.0.len as usize
    }

    #[inline(always)]
    fn decode(&self, at: usize, out: &mut [f32]) {
        self.1.decode(at, out);
    }

    fn codes(&self) -> Option<Codes<'_>> {
        self.1.codes()
    }
}

pub(super) struct PackRun<'p> {
    pack: &'p Pack<'p>,
    reader: Reader<'p>,
    made: Vec<Made<'p>>,
    /// Chunks that the change has not measured yet.
    to_measure: AtomicUsize,
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
                Output::Packed { state, values } => {
                    let belongs = |work: &Work| match work {
                        Work::Run { part, .. } => *part == index,
                        Work::Matrix { parts, .. } => parts.contains(&index),
                    };
                    let first = pack.chunks.iter().position(|chunk| belongs(&chunk.work)).unwrap_or(0);
                    let count = pack.chunks[first..].iter().take_while(|chunk| belongs(&chunk.work)).count();
                    let step = match pack.chunks[first..first + count] {
                        [_, Chunk { work: Work::Run { first, .. }, .. }, ..] => first,
                        _ => part.elements(),
                    };
                    let chunks = first..first + count;
                    let weight = Weight::new(&part.name, state, *values, pack.options, output, chunks, step);
                    output += state.tensors(&part.name, pack.options.storage).len();
                    Made::Packed(Box::new(weight))
                }
                Output::Kept(dtype) => {
                    output += 1;
                    Made::Kept { output: output - 1, dtype: *dtype }
                }
            });
        }
        Ok(Self { pack, reader: Reader::new(pack)?, made, to_measure: AtomicUsize::new(pack.chunks.len()) })
    }

    /// Hand elements of `part` to where they go.
    fn put(&self, part: usize, piece: Piece<'_>, sink: &Sink<'_>) -> Result<Vec<usize>> {
        match &self.made[part] {
            Made::Packed(weight) => {
                weight.put(piece, sink, |index| self.pack.source.non_finite(&self.pack.parts[part].0.name, index))
            }
            Made::Kept { output, dtype } => {
                if let Some(index) = Float::from_dtype(*dtype).and_then(|float| float.first_non_finite(piece.bytes)) {
                    let name = &self.pack.parts[part].0.name;
                    return Err(self.pack.source.non_finite(name, piece.first + index as u64));
                }
                sink.write_at(*output, piece.first * dtype.size(), piece.bytes)?;
                Ok(Vec::new())
            }
        }
    }
}

impl Run for PackRun<'_> {
    fn chunk(&self, index: usize, bytes: &[u8], sink: &Sink<'_>) -> Result<Vec<usize>> {
        let chunk = &self.pack.chunks[index];
        if let Some(change) = self.reader.change.as_ref().filter(|change| change.to_measure()) {
            change.measure(&Read(chunk, &self.reader.elements(chunk, bytes)));
            if self.to_measure.fetch_sub(1, Ordering::AcqRel) > 1 {
                return Ok(Vec::new());
            }
            change.measured().map_err(|reason| self.pack.source.error(reason))?;
            return Ok((0..self.pack.chunks.len()).collect());
        }
        self.reader.cut(chunk, bytes, |part, first, bytes| self.put(part, Piece { chunk: index, first, bytes }, sink))
    }

    fn comes_again(&self, chunk: usize) -> bool {
        let measured = self.reader.change.as_ref().is_some_and(Applied::to_measure);
        measured
            || match &self.pack.chunks[chunk].work {
                Work::Run { part, .. } => {
                    matches!(&self.made[*part], Made::Packed(weight) if weight.comes_again(chunk))
                }
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

    fn change(&self) -> Option<(String, Norms)> {
        self.reader.change.as_ref().map(|change| (change.name().to_owned(), change.norms()))
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
