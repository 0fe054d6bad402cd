//! The codes of given scales, which may be negative or zero, and the error that they leave.

use super::Values;
use super::lanes::{Lanes, Work, run_on};
use crate::Isa;
use crate::nf4::{self, MIN_SCALE, check_lengths};

/// Values that are decoded at a time: 16 kB of f32, which stay in the first-level cache.
pub(super) const TILE: usize = 4096;

/// Pick the code of every value whose level, times the block's scale, is nearest to it.
///
/// The code is the number of thresholds strictly below `value * (1 / scale)`: of equally near levels the lower, and so
/// with a negative scale the greater value. A scale of less than 1e-38 divides as 1e-38 does, and under a scale of zero
/// every code is that of 0.0. With the absmax of a full block these are the codes of [`nf4::quantize`]. `codes` takes two
/// a byte, the even element in the high half; an odd tail is padded with the code of 0.0.
///
/// # Panics
/// If `blocksize` is not one of [`nf4::BLOCKSIZES`] or a length is wrong.
pub fn codes(values: Values, scales: &[f32], blocksize: usize, codes: &mut [u8]) {
    codes_on(Isa::current(), values, scales, blocksize, codes);
}

pub(super) fn codes_on(isa: Isa, values: Values, scales: &[f32], blocksize: usize, codes: &mut [u8]) {
    check_lengths(values.len(), blocksize, scales.len(), codes.len());
    run_on(isa, Pick { values, scales, blocksize, codes });
}

struct Pick<'a> {
    values: Values<'a>,
    scales: &'a [f32],
    blocksize: usize,
    codes: &'a mut [u8],
}

impl Work for Pick<'_> {
    type Result = ();

    #[inline(always)]
    fn run(self, lanes: impl Lanes) {
        let mut tile = [0.0; TILE];
        let tiles = self.scales.chunks(TILE / self.blocksize).zip(self.codes.chunks_mut(TILE / 2));
        for (index, (scales, codes)) in tiles.enumerate() {
            let tile = whole_blocks(self.values, index * TILE, self.blocksize, &mut tile);
            let packed = codes.chunks_mut(self.blocksize / 2);
            for ((block, &scale), packed) in tile.chunks(self.blocksize).zip(scales).zip(packed) {
                pick(lanes, block, scale, packed);
            }
        }
    }
}

/// Decode the tile that starts at value `start`; a short last block is filled up with zeros.
#[inline(always)]
pub(super) fn whole_blocks<'a>(values: Values, start: usize, blocksize: usize, tile: &'a mut [f32; TILE]) -> &'a [f32] {
    let length = TILE.min(values.len() - start);
    values.decode(start, &mut tile[..length]);
    let whole = &mut tile[..length.next_multiple_of(blocksize)];
    whole[length..].fill(0.0);
    whole
}

/// Pack the codes of one whole block, or of as much of it as `packed` takes.
#[inline(always)]
pub(super) fn pick(lanes: impl Lanes, block: &[f32], scale: f32, packed: &mut [u8]) {
    let inverse = lanes.splat(inverse(scale));
    let chunks = block.as_chunks::<16>().0;
    let codes = |values| lanes.codes(lanes.mul(lanes.load(values), inverse));
    let (whole, rest) = packed.as_chunks_mut();
    for (bytes, values) in whole.iter_mut().zip(chunks) {
        *bytes = codes(values);
    }
    if !rest.is_empty() {
        rest.copy_from_slice(&codes(&chunks[whole.len()])[..rest.len()]);
    }
}

/// What to multiply by to divide by `scale`; zero for zero.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale.abs().max(MIN_SCALE).copysign(scale) }
}

/// The sum of `(value - decoded)^2` over all values, in f64, decoded as by [`nf4::dequantize`].
///
/// # Panics
/// As [`codes`].
pub fn squared_error(values: Values, scales: &[f32], blocksize: usize, codes: &[u8]) -> f64 {
    check_lengths(values.len(), blocksize, scales.len(), codes.len());
    let (mut tile, mut decoded) = ([0.0; TILE], [0.0; TILE]);
    let tiles = scales.chunks(TILE / blocksize).zip(codes.chunks(TILE / 2));
    let errors = tiles.enumerate().map(|(index, (scales, codes))| {
        let length = TILE.min(values.len() - index * TILE);
        let (tile, decoded) = (&mut tile[..length], &mut decoded[..length]);
        values.decode(index * TILE, tile);
        nf4::dequantize(codes, scales, blocksize, decoded);
        let mut sums = [0.0_f64; 16];
        for (values, decoded) in tile.chunks(16).zip(decoded.chunks(16)) {
            for ((sum, value), decoded) in sums.iter_mut().zip(values).zip(decoded) {
                let difference = f64::from(*value) - f64::from(*decoded);
                *sum += difference * difference;
            }
        }
        sums.iter().sum::<f64>()
    });
    errors.sum()
}
