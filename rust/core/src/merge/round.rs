//! f64 rounded once to a float type of fewer bits.

use crate::Float;

/// Encode `values` as `to`, each rounded to nearest with ties to even. `rounded` is room for as many f32.
///
/// Types of 16 bits are rounded from an f32 that was rounded to odd: its last bit says that something was cut off, so
/// that the second rounding sees on which side of a tie the value was (Boldo and Melquiond, 2008).
#[inline(always)]
pub(super) fn encode(to: Float, values: &[f64], rounded: &mut [f32], out: &mut [u8]) {
    for (rounded, &value) in rounded.iter_mut().zip(values) {
        *rounded = if to == Float::F32 { value as f32 } else { to_odd(value) };
    }
    to.encode(rounded, out);
}

#[inline(always)]
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    // Towards zero, then the last bit set if that is not exact. NaN and infinities stay.
    let cut = nearest.to_bits() - u32::from(back.abs() > value.abs());
    let inexact = u32::from(back.to_bits() != value.to_bits() && !value.is_nan());
    f32::from_bits(cut | inexact)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bf16(value: f64) -> u16 {
        let mut out = [0; 2];
        encode(Float::BF16, &[value], &mut [0.0], &mut out);
        u16::from_le_bytes(out)
    }

    #[test]
    fn values_beside_a_tie_go_to_their_own_side() {
        let tie = 1.0 + 2_f64.powi(-8); // between 0x3f80 and 0x3f81
        let little = 2_f64.powi(-50); // lost in an f32
        assert_eq!([tie - little, tie, tie + little].map(bf16), [0x3f80, 0x3f80, 0x3f81]);
        let odd_tie = 1.0 + 3.0 * 2_f64.powi(-8);
        assert_eq!([odd_tie - little, odd_tie, odd_tie + little].map(bf16), [0x3f81, 0x3f82, 0x3f82]);
        assert_eq!([-tie - little, -tie].map(bf16), [0xbf81, 0xbf80]);
    }

    #[test]
    fn ends_of_the_range_are_rounded_as_any_value() {
        let largest = f64::from(f32::from_bits(0x7f7f_0000));
        let half = 2_f64.powi(119); // of the step above it
        assert_eq!(
            [largest, largest + half * 0.999, largest + half, f64::MAX].map(bf16),
            [0x7f7f, 0x7f7f, 0x7f80, 0x7f80]
        );
        let smallest = 2_f64.powi(-133);
        assert_eq!([smallest, smallest * 0.5, smallest * 0.500_001, 1e-300].map(bf16), [1, 0, 1, 0]);
        assert_eq!([f64::INFINITY, f64::NEG_INFINITY, -0.0].map(bf16), [0x7f80, 0xff80, 0x8000]);
        assert!(half::bf16::from_bits(bf16(f64::NAN)).is_nan());
    }
}
