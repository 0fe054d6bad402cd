//! Which bytes of a source tensor are read together, and which parts they belong to.
//!
//! The source is seen as matrices of rows. Where the parts of a matrix are runs of its rows, each run is split into
//! chunks. Where they are interleaved or transposed, the matrix is one chunk, from which they are gathered.

use std::ops::Range;

use super::encoding::Encoding;
use super::{Packing, Part};
use crate::safetensors::Tensor;
use crate::stream::CHUNK;
use crate::{Result, merge, nested};

/// Bytes that are read together.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chunk {
    pub(super) bytes: Range<u64>,
    /// Number of the first element in the source.
    pub(super) first: u64,
    /// How many there are.
    pub(super) len: u64,
    pub(super) work: Work,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Work {
    /// Elements of one part, from its element number `first` on.
    Run { part: usize, first: u64 },
    /// A whole matrix of which these parts are made.
    Matrix { parts: Range<usize>, rows: u64, columns: u64 },
}

/// How a part sees its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct View {
    matrices: u64,
    rows: u64,
    columns: u64,
}

/// The chunks of `source`, which is `changed` or not, in order. They cover it, and every element of it belongs to exactly one part.
///
/// # Errors
/// [`crate::Error::Malformed`] if a part is not in the source, or they leave something out or overlap.
pub(super) fn split(source: &Tensor<'_>, encoding: &Encoding<'_>, parts: &[Part], changed: bool) -> Result<Vec<Chunk>> {
    let mut chunks = Vec::new();
    let mut next = 0;
    let mut matrix = 0;
    while next < parts.len() {
        let view = View::of(source, encoding, &parts[next])?;
        let end = next + parts[next..].iter().take_while(|part| part.matrix == matrix).count();
        let group = next..end;
        check_cover(source, encoding, view, matrix, &parts[group.clone()])?;
        let in_runs = parts[group.clone()].iter().all(|part| part.rows.1 == 1 && !part.transpose);
        let size = view.rows * view.columns;
        if in_runs {
            for part in group.clone() {
                let first = matrix * size + parts[part].rows.0 * view.columns;
                chunks.extend(runs(encoding, view.columns, part, first, &parts[part], changed));
            }
        } else {
            let first = matrix * size;
            let bytes = encoding.bytes(first)..encoding.bytes(first + size);
            let work = Work::Matrix { parts: group, rows: view.rows, columns: view.columns };
            chunks.push(Chunk { bytes, first, len: size, work });
        }
        matrix += 1;
        if end == parts.len() && matrix != view.matrices {
            return Err(source.error(format!("{matrix} of its {} matrices are used", view.matrices)));
        }
        next = end;
    }
    Ok(chunks)
}

/// The rows of `part`, a chunk at a time, from element `first` of the source on.
fn runs<'a>(
    encoding: &Encoding<'_>,
    columns: u64,
    part: usize,
    first: u64,
    of: &'a Part,
    changed: bool,
) -> impl Iterator<Item = Chunk> + use<'a> {
    let total = of.elements();
    let mut step = CHUNK as u64;
    // Whole rows that make whole blocks, and whole groups of scales (see `weight`) where these are no longer than a chunk.
    let rows_of = |length: u64| columns * (length >> columns.trailing_zeros().min(length.trailing_zeros()));
    let (blocksize, group) = match of.packing {
        Some(Packing { blocksize, .. }) => (blocksize as u64, blocksize as u64 * nested::BLOCKSIZE as u64),
        None => (encoding.blocksize(), encoding.blocksize()),
    };
    if encoding.by_rows() {
        let unit = if rows_of(group) <= step { rows_of(group) } else { rows_of(blocksize) };
        step = (step / unit).max(1) * unit;
    } else if changed {
        // Rows are changed together; those that are cut take longer.
        let unit = [merge::ROWS as u64 * rows_of(group), rows_of(group)].into_iter().find(|&unit| unit <= step);
        step = unit.map_or(step, |unit| step / unit * unit);
    }
    let start = encoding.bytes(first);
    let scale = (encoding.bytes(2 * step), 2 * step); // bytes to elements, whole even for half a byte an element
    (0..total.div_ceil(step)).map(move |index| {
        let from = index * step;
        let to = (from + step).min(total);
        let byte = |element: u64| start + (element * scale.0).div_ceil(scale.1);
        let work = Work::Run { part, first: from };
        Chunk { bytes: byte(from)..byte(to), first: first + from, len: to - from, work }
    })
}

impl View {
    fn of(source: &Tensor<'_>, encoding: &Encoding<'_>, part: &Part) -> Result<Self> {
        let shape = encoding.shape();
        let scalar = [1];
        let wanted = if part.shape.is_empty() { &scalar[..] } else { &part.shape };
        let fails = || {
            source.error(format!("has shape {shape:?}, which {} of shape {:?} is no part of", part.name, part.shape))
        };
        let padded = if shape.is_empty() { scalar.to_vec() } else { shape.to_vec() };
        let Some(outer) = padded.len().checked_sub(wanted.len()) else { return Err(fails()) };
        let mut inner = padded[outer..].to_vec();
        if part.transpose {
            if inner.len() != 2 {
                return Err(fails());
            }
            inner.reverse();
        }
        if inner[1..] != wanted[1..] {
            return Err(fails());
        }
        let view =
            Self { matrices: padded[..outer].iter().product(), rows: inner[0], columns: wanted[1..].iter().product() };
        let (first, step) = part.rows;
        let last = part.row_count().checked_sub(1).map(|count| count * step + first);
        if part.matrix >= view.matrices || step == 0 || last.is_some_and(|last| last >= view.rows) {
            return Err(fails());
        }
        Ok(view)
    }
}

/// Check that `parts` take every row of a matrix once, in order where they are runs.
fn check_cover(source: &Tensor<'_>, encoding: &Encoding<'_>, view: View, matrix: u64, parts: &[Part]) -> Result<()> {
    let mut taken = vec![false; view.rows as usize];
    let mut highest = 0;
    for part in parts {
        if View::of(source, encoding, part)? != view || part.transpose != parts[0].transpose {
            return Err(source.error(format!("{} sees it in another shape than {}", part.name, parts[0].name)));
        }
        let (first, step) = part.rows;
        if part.rows.1 == 1 && first < highest {
            return Err(source.error(format!("{} is not in the order of rows", part.name)));
        }
        highest = first;
        for row in (0..part.row_count()).map(|row| (first + row * step) as usize) {
            if std::mem::replace(&mut taken[row], true) {
                return Err(source.error(format!("row {row} of matrix {matrix} is used twice")));
            }
        }
    }
    match taken.iter().position(|&taken| !taken) {
        Some(row) => Err(source.error(format!("row {row} of matrix {matrix} is in no part"))),
        None => Ok(()),
    }
}
