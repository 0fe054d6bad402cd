//! Examples of the rule, and every path against the rule as plain code.

use super::*;

fn quantize(values: &[f32], blocksize: usize, absmax: &mut [f32], codes: &mut [u8]) -> Result<(), usize> {
    let mut bytes = vec![0; 4 * values.len()];
    Float::F32.encode(values, &mut bytes);
    super::quantize(&bytes, Float::F32, blocksize, absmax, codes)
}

#[test]
fn a_zero_block_is_seven_seven_and_decodes_to_zero() {
    let (mut absmax, mut codes) = ([1.0], [0; 32]);
    quantize(&[0.0; 64], 64, &mut absmax, &mut codes).unwrap();
    assert_eq!((absmax, codes), ([0.0], [0x77; 32]));
    let mut out = [1.0; 64];
    dequantize(&codes, &absmax, 64, &mut out);
    assert_eq!(out, [0.0; 64]);
}

#[test]
fn every_level_is_its_own_code_and_ties_go_down() {
    let mut values = [0.0; 32];
    values[..16].copy_from_slice(&LEVELS);
    values[16..31].copy_from_slice(&THRESHOLDS);
    let (mut absmax, mut codes) = ([0.0], [0; 16]);
    quantize(&values, 32, &mut absmax, &mut codes).unwrap();
    assert_eq!(codes[..8], [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
    assert_eq!(codes[8..], [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xe7]);
}

#[test]
fn an_odd_tail_is_padded_with_the_code_of_zero() {
    let (mut absmax, mut codes) = ([0.0], [0; 2]);
    quantize(&[1.0, -1.0, 1.0], 32, &mut absmax, &mut codes).unwrap();
    assert_eq!(codes, [0xf0, 0xf7]);
    let mut out = [0.0; 3];
    dequantize(&codes, &absmax, 32, &mut out);
    assert_eq!(out, [1.0, -1.0, 1.0]);
}

#[test]
fn non_finite_values_are_refused_by_index() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = [0.5; 100];
        values[70] = bad;
        assert_eq!(quantize(&values, 64, &mut [0.0; 2], &mut [0; 50]), Err(70));
    }
}

/// The instruction sets that this processor has, saying which are left out.
fn instruction_sets() -> Vec<Isa> {
    let (present, absent): (Vec<_>, Vec<_>) =
        [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().partition(|&isa| isa <= Isa::detect());
    for isa in absent {
        println!("not tested, this processor lacks it: {}", isa.name());
    }
    present
}

/// Quantize by the rule, value by value.
fn expected(values: &[f32], blocksize: usize) -> (Vec<u32>, Vec<u8>) {
    let mut codes = vec![0; values.len().div_ceil(2)];
    let absmax = values.chunks(blocksize).zip(codes.chunks_mut(blocksize / 2)).map(|(block, codes)| {
        let absmax = if block.len() == blocksize { quantize_block(block, codes) } else { quantize_tail(block, codes) };
        absmax.to_bits()
    });
    (absmax.collect(), codes)
}

/// Quantize `bytes` with every instruction set and compare with the rule.
fn check_quantize(bytes: &[u8], float: Float, blocksize: usize, what: &str) {
    let mut values = vec![0.0; bytes.len() / float.size()];
    float.decode(bytes, &mut values);
    let (scales, expected) = expected(&values, blocksize);
    for isa in instruction_sets() {
        let (mut absmax, mut codes) = (vec![0.0; scales.len()], vec![0; expected.len()]);
        quantize_on(isa, bytes, float, blocksize, &mut absmax, &mut codes).unwrap();
        let differs = absmax.iter().zip(&scales).position(|(absmax, scale)| absmax.to_bits() != *scale);
        assert_eq!(differs, None, "absmax of {isa:?}, {float:?}, blocksize {blocksize}, {what}");
        let differs = codes.iter().zip(&expected).position(|(code, expected)| code != expected);
        assert_eq!(differs, None, "codes of {isa:?}, {float:?}, blocksize {blocksize}, {what}");
    }
}

/// A fixed stream of random bits.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Below `end`.
    fn below(&mut self, end: u32) -> u32 {
        ((u64::from(self.bits()) * u64::from(end)) >> 32) as u32
    }

    /// A power of two of the range of f32, denormals included, or of f16.
    fn power(&mut self, float: Float) -> f32 {
        let (low, count) = if float == Float::F16 { (-24, 40) } else { (-149, 277) };
        2.0_f64.powi(low + self.below(count).cast_signed()) as f32
    }

    /// 0 to 1.
    fn unit(&mut self) -> f32 {
        self.bits() as f32 / u32::MAX as f32
    }
}

/// Blocks of hard values: any bit patterns, bell-shaped weights, products of absmax and thresholds and their neighbours,
/// all with absmax of any size; denormals; zeros of both signs; one spike. Then an odd tail.
fn adversarial(float: Float, blocksize: usize, elements: usize) -> Vec<u8> {
    let mut random = Random(blocksize as u64);
    let mut values = Vec::with_capacity(elements + blocksize);
    let mut kind = 0;
    while values.len() < elements {
        kind = (kind + 1) % 8;
        let scale = random.power(float) * (1.0 + random.unit());
        match kind {
            0 => values.extend((0..blocksize).map(|_| f32::from_bits(random.bits()))),
            1 => values.extend((0..blocksize).map(|index| if index % 3 == 0 { -0.0 } else { 0.0 })),
            2 => {
                let spike = random.below(blocksize as u32) as usize;
                values.extend((0..blocksize).map(|index| if index == spike { -scale } else { 0.0 }));
            }
            3 => values.extend((0..blocksize).map(|_| f32::from_bits(random.bits() & 0x80ff_ffff))),
            4 | 5 => {
                let bell = |random: &mut Random| (0..4).map(|_| random.unit() - 0.5).sum::<f32>() * scale;
                values.extend((0..blocksize).map(|_| bell(&mut random)));
            }
            _ => {
                // The bits of the type's value nearest to the threshold, and of two on each side.
                let ulp = match float {
                    Float::BF16 => 1 << 16,
                    Float::F16 => 1 << 13,
                    Float::F32 => 1,
                };
                values.push(scale);
                values.extend((1..blocksize).map(|_| {
                    let near = THRESHOLDS[random.below(15) as usize] * scale;
                    f32::from_bits(near.to_bits().wrapping_add(ulp * random.below(5)).wrapping_sub(2 * ulp))
                }));
            }
        }
    }
    values.truncate(elements);
    let mut bytes = vec![0; elements * float.size()];
    float.encode(&values, &mut bytes);
    float.decode(&bytes, &mut values);
    for (raw, value) in bytes.chunks_exact_mut(float.size()).zip(values) {
        if !value.is_finite() {
            raw.fill(0);
        }
    }
    bytes
}

/// 24 million values of each type, in all blocksizes.
#[test]
fn every_path_quantizes_by_the_rule() {
    for float in [Float::BF16, Float::F16, Float::F32] {
        for blocksize in BLOCKSIZES {
            // The tail is longer than a block of the smaller sizes.
            let bytes = adversarial(float, blocksize, 3_000_000 + 33);
            check_quantize(&bytes, float, blocksize, "adversarial");
            for elements in [1, 2, 31, 32, 33, 64, 65, 4096, 4097] {
                let piece = &bytes[bytes.len() - elements * float.size()..];
                check_quantize(piece, float, blocksize, &format!("the last {elements}"));
            }
        }
    }
}

/// Every finite value of a type of 16 bits that is at most `absmax`, in blocks of 64 that begin with it.
fn under(absmax: u16) -> Vec<u8> {
    let mut values: Vec<u16> = (0..=absmax).chain(0x8000..=0x8000 | absmax).collect();
    values.resize(values.len().next_multiple_of(63), 0);
    values.chunks_exact(63).flat_map(|block| [&[absmax], block].concat()).flat_map(u16::to_le_bytes).collect()
}

/// Every absmax mantissa, in all exponents at which the path changes and some between; under each every value: 140
/// million.
#[test]
fn every_bfloat16_under_every_mantissa_of_absmax() {
    for exponent in [0, 1, 2, 5, 6, 7, 30, 120, 127, 251, 252, 253, 254] {
        for mantissa in 0..128 {
            check_quantize(&under(exponent << 7 | mantissa), Float::BF16, 64, &format!("{exponent}, {mantissa}"));
        }
    }
}

/// Every absmax mantissa of three exponents, one of them the denormals'; under each every value: 66 million.
#[test]
fn every_f16_under_every_mantissa_of_absmax() {
    for exponent in [0, 15, 30] {
        for mantissa in 0..1024 {
            check_quantize(&under(exponent << 10 | mantissa), Float::F16, 64, &format!("{exponent}, {mantissa}"));
        }
    }
}

/// Every instruction set names the first of two offenders, in a full block and in the tail.
#[test]
fn every_path_refuses_by_index() {
    for float in [Float::BF16, Float::F16, Float::F32] {
        for (first, second) in [(0, 1), (70, 4000), (4095, 4096), (9999, 10000), (10000, 10001)] {
            let mut values = vec![0.5; 10_002];
            (values[first], values[second]) = (f32::NAN, f32::INFINITY);
            let mut bytes = vec![0; values.len() * float.size()];
            float.encode(&values, &mut bytes);
            for isa in instruction_sets() {
                let refused = quantize_on(isa, &bytes, float, 64, &mut [0.0; 157], &mut [0; 5001]);
                assert_eq!(refused, Err(first), "{isa:?}, {float:?}");
            }
        }
    }
}

/// Random codes under scales of every kind, in an output large enough to be written past the caches, at both kinds of
/// address.
#[test]
fn every_path_decodes_as_a_table_in_f32() {
    let mut random = Random(7);
    let elements = 4_500_000 + 33;
    let codes: Vec<u8> = (0..code_bytes(elements)).map(|_| random.bits() as u8).collect();
    let elements = elements as usize;
    for blocksize in BLOCKSIZES {
        let mut absmax: Vec<f32> = (0..elements.div_ceil(blocksize))
            .map(|index| match index % 4 {
                0 => f32::from_bits(random.bits()),
                _ => (random.unit() - 0.2) * random.power(if index % 4 == 1 { Float::F16 } else { Float::F32 }),
            })
            .collect();
        absmax[3..6].copy_from_slice(&[f32::INFINITY, f32::NAN, -0.0]);
        let level = |index: usize| LEVELS[usize::from((codes[index / 2] >> (4 * (1 - index % 2))) & 15)];
        let values: Vec<f32> = (0..elements).map(|index| level(index) * absmax[index / blocksize]).collect();
        // The bits of a NaN are nobody's promise.
        let same = |out: &[f32], expected: &[f32]| {
            let mut pairs = out.iter().zip(expected);
            pairs.all(|(out, value)| out.to_bits() == value.to_bits() || out.is_nan() && value.is_nan())
        };
        for isa in instruction_sets() {
            let mut out = vec![1.0; elements];
            dequantize_on(isa, &codes, &absmax, blocksize, &mut out);
            assert!(same(&out, &values), "{isa:?}, blocksize {blocksize}");
        }
        for float in [Float::BF16, Float::F16, Float::F32] {
            let mut bytes = vec![0; elements * float.size() + 128];
            let (mut out, mut expected) = (vec![0.0; elements], vec![0.0; elements]);
            let rounded = &mut bytes[..elements * float.size()];
            float.encode(&values, rounded);
            float.decode(rounded, &mut expected);
            for (isa, offset) in instruction_sets().into_iter().flat_map(|isa| [(isa, 0), (isa, 2)]) {
                bytes.fill(0xff);
                let start = bytes.as_ptr().align_offset(64) + offset;
                let bytes = &mut bytes[start..][..elements * float.size()];
                dequantize_to_on(isa, float, &codes, &absmax, blocksize, bytes);
                float.decode(bytes, &mut out);
                assert!(same(&out, &expected), "{isa:?}, {float:?}, blocksize {blocksize}, offset {offset}");
            }
        }
    }
}

/// The sums of one block in the documented order.
fn expected_moments(values: &[f32], levels: &[f32]) -> [u32; 3] {
    let total = |products: Vec<f32>| {
        let mut sums = [0.0; 16];
        for (index, product) in products.into_iter().enumerate() {
            sums[index % 16] += product;
        }
        let sums: [f32; 8] = std::array::from_fn(|lane| sums[lane] + sums[lane + 8]);
        let sums: [f32; 4] = std::array::from_fn(|lane| sums[lane] + sums[lane + 4]);
        ((sums[0] + sums[2]) + (sums[1] + sums[3])).to_bits()
    };
    let product = |left: &[f32], right: &[f32]| total(left.iter().zip(right).map(|(x, q)| x * q).collect());
    [product(values, values), product(values, levels), product(levels, levels)]
}

/// Three million weights of each type in all blocksizes.
#[test]
fn every_path_sums_moments_in_one_order() {
    for float in [Float::BF16, Float::F16, Float::F32] {
        for blocksize in BLOCKSIZES {
            let elements = 400_000 + 33;
            let bytes = adversarial(float, blocksize, elements);
            let mut values = vec![0.0; elements];
            float.decode(&bytes, &mut values);
            let (mut absmax, mut codes) = (vec![0.0; elements.div_ceil(blocksize)], vec![0; elements.div_ceil(2)]);
            super::quantize(&bytes, float, blocksize, &mut absmax, &mut codes).unwrap();
            let mut levels = vec![0.0; elements];
            dequantize(&codes, &vec![1.0; absmax.len()], blocksize, &mut levels);
            for isa in instruction_sets() {
                let mut out = vec![Moments::default(); absmax.len()];
                moments::moments_on(isa, &bytes, float, &codes, blocksize, &mut out);
                let blocks = values.chunks(blocksize).zip(levels.chunks(blocksize));
                for (Moments { xx, xq, qq }, (values, levels)) in out.into_iter().zip(blocks) {
                    let expected = expected_moments(values, levels);
                    // Sums that overflow may be a NaN of any bits.
                    let same = [xx, xq, qq].into_iter().zip(expected).all(|(sum, expected)| {
                        sum.to_bits() == expected || sum.is_nan() && f32::from_bits(expected).is_nan()
                    });
                    assert!(same, "{isa:?}, {float:?}, blocksize {blocksize}: {xx} {xq} {qq}");
                }
            }
        }
    }
}
