use super::codes::codes_on;
use super::scales::scales_on;
use super::*;
use crate::Isa;
use crate::nf4::BLOCKSIZES;

const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

/// A fixed generator of 32 random bits.
fn generator(mut state: u64) -> impl FnMut() -> u32 {
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    }
}

/// Sums of four uniform numbers, each block of 64 with its own magnitude; some blocks of zeros, some of one value.
fn weights(count: usize, seed: u64) -> Vec<f32> {
    let mut random = generator(seed);
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        let magnitude = 0.02 * (1.0 + (random() % 8) as f32);
        let kind = random() % 64;
        for _ in 0..64 {
            let mut uniform = || random() as f32 / 2_f32.powi(32) - 0.5;
            let value = magnitude * (uniform() + uniform() + uniform() + uniform());
            values.push(match kind {
                0 => 0.0,
                1 => magnitude,
                _ => value,
            });
        }
    }
    values.truncate(count);
    values
}

fn encoded(values: &[f32], float: Float) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * float.size()];
    float.encode(values, &mut bytes);
    bytes
}

/// Any finite bit pattern, with or without weights at its side, on every path: scales, snapped scales and codes.
fn assert_agreement(bytes: &[u8], float: Float, weights: Option<&[f32]>, blocksize: usize) {
    let values = Values::Stored(bytes, float);
    let blocks = values.len().div_ceil(blocksize);
    let candidates = Candidates::default();
    let on = |isa| {
        let mut free = vec![0.0; blocks];
        scales_on(isa, values, weights, blocksize, &candidates, f32::MAX, &mut free).unwrap();
        let (mut snapped, mut nested) = (free.clone(), vec![0; blocks]);
        let [mut snapped_codes, mut free_codes] = [(); 2].map(|()| vec![0; values.len().div_ceil(2)]);
        let map = Map::fit(&free, None);
        map.snap_on(isa, values, blocksize, 0, &absmax(&free), &mut snapped, &mut nested, &mut snapped_codes);
        codes_on(isa, values, &free, blocksize, &mut free_codes);
        let bits = |scales: Vec<f32>| scales.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        (bits(free), bits(snapped), nested, snapped_codes, free_codes)
    };
    let portable = on(Isa::Portable);
    assert!(on(Isa::Avx2) == portable, "AVX2 differs: {float:?}, blocksize {blocksize}");
    assert!(on(Isa::Avx512) == portable, "AVX-512 differs: {float:?}, blocksize {blocksize}");
}

/// 16 million values of weights and 12 million of any bits.
#[test]
fn all_instruction_sets_agree() {
    for (seed, float) in [Float::BF16, Float::F16, Float::F32].into_iter().enumerate() {
        for blocksize in BLOCKSIZES {
            // An odd tail, longer than a block of the smaller sizes.
            let count = 500_000 + 33;
            let mut random = generator(seed as u64);
            let mut anything: Vec<u8> =
                (0..count * float.size() / 2).flat_map(|_| (random() as u16).to_le_bytes()).collect();
            let mut values = vec![0.0; count];
            float.decode(&anything, &mut values);
            for (raw, value) in anything.chunks_exact_mut(float.size()).zip(&values) {
                if !value.is_finite() {
                    raw.fill(0);
                }
            }
            assert_agreement(&anything, float, None, blocksize);
            let gaussian = encoded(&weights(count + 200_000, seed as u64), float);
            assert_agreement(&gaussian, float, None, blocksize);
            // Many weights of zero, and whole blocks of them.
            let importance: Vec<f32> =
                (0..8192)
                    .map(|column| {
                        if column < 4096 && random().is_multiple_of(4) { (random() % 1000) as f32 / 100.0 } else { 0.0 }
                    })
                    .collect();
            for bytes in [&gaussian, &anything] {
                assert_agreement(&bytes[..40_960 * float.size()], float, Some(&importance), blocksize);
            }
        }
    }
}

#[test]
fn a_tensor_may_be_cut_between_blocks() {
    for blocksize in BLOCKSIZES {
        let values = weights(100_000, 3);
        let blocks = values.len().div_ceil(blocksize);
        let whole = Values::Floats(&values);
        let mut free = vec![0.0; blocks];
        scales(whole, None, blocksize, &Candidates::default(), f32::MAX, &mut free).unwrap();
        let map = Map::fit(&free, None);
        let (mut snapped, mut nested, mut packed) = (free.clone(), vec![0; blocks], vec![0; 50_000]);
        let absmax = absmax(&free);
        map.snap(whole, blocksize, 0, &absmax, &mut snapped, &mut nested, &mut packed);

        for cut in [1, 7, blocks / 2].into_iter().filter(|&cut| 0 < cut && cut < blocks) {
            for (part, first, last) in [(&values[..cut * blocksize], 0, cut), (&values[cut * blocksize..], cut, blocks)]
            {
                let part = Values::Floats(part);
                let mut parts = vec![0.0; last - first];
                scales(part, None, blocksize, &Candidates::default(), f32::MAX, &mut parts).unwrap();
                assert_eq!(parts, free[first..last]);
                let (mut part_nested, mut part_packed) = (vec![0; last - first], vec![0; part.len().div_ceil(2)]);
                map.snap(
                    part,
                    blocksize,
                    first % 256,
                    &absmax[first / 256..],
                    &mut parts,
                    &mut part_nested,
                    &mut part_packed,
                );
                assert_eq!((&parts[..], &part_nested[..]), (&snapped[first..last], &nested[first..last]));
                assert_eq!(part_packed, packed[first * blocksize / 2..][..part_packed.len()]);
            }
        }
    }
}

#[test]
fn under_absmax_codes_are_those_of_exact_mode() {
    let values = weights(64 * 1000, 4);
    let bytes = encoded(&values, Float::F32);
    let (mut absmax, mut expected, mut found) = (vec![0.0; 1000], vec![0; 32_000], vec![0; 32_000]);
    nf4::quantize(&bytes, Float::F32, 64, &mut absmax, &mut expected).unwrap();
    codes(Values::Floats(&values), &absmax, 64, &mut found);
    assert_eq!(found, expected);
    // A negative scale mirrors the values.
    let mirrored = map(&values, |value| -value);
    codes(Values::Floats(&mirrored), &map(&absmax, |scale| -scale), 64, &mut found);
    assert_eq!(found, expected);
    // A scale of zero leaves zeros.
    codes(Values::Floats(&values), &[0.0; 1000], 64, &mut found);
    assert!(found.iter().all(|&byte| byte == 0x77));
}

fn map(values: &[f32], function: impl Fn(f32) -> f32) -> Vec<f32> {
    values.iter().map(|&value| function(value)).collect()
}

#[test]
fn weights_are_what_errors_count() {
    let (columns, values) = (256, weights(256 * 500, 5));
    let heavy: Vec<f32> = (0..columns).map(|column| if column % 8 == 0 { 100.0 } else { 0.1 }).collect();
    let whole = Values::Floats(&values);
    let error = |weights: Option<&[f32]>| {
        let (mut free, mut packed) = (vec![0.0; 2000], vec![0; values.len() / 2]);
        scales(whole, weights, 64, &Candidates::default(), f32::MAX, &mut free).unwrap();
        codes(whole, &free, 64, &mut packed);
        let mut decoded = vec![0.0; values.len()];
        nf4::dequantize(&packed, &free, 64, &mut decoded);
        let errors = values.iter().zip(&decoded).zip(heavy.iter().cycle());
        errors.map(|((value, decoded), weight)| f64::from(weight * (value - decoded).powi(2))).sum::<f64>()
    };
    assert!(error(Some(&heavy)) < 0.6 * error(None), "{} {}", error(Some(&heavy)), error(None));
    // Equal weights are none, whether given for a row or for all; the search then weighs every candidate exactly.
    let [row, all] = [vec![1.0; columns], vec![1.0; values.len()]];
    assert_eq!(error(Some(&row)).to_bits(), error(Some(&all)).to_bits());
    assert!(error(Some(&row)) < 1.01 * error(None));
}

#[test]
fn what_is_represented_exactly_stays_so() {
    // Weights that were NF4 before, from any scale.
    let mut random = generator(6);
    let scales_before: Vec<f32> = (0..500).map(|index| 0.01 * (1 + index) as f32).collect();
    let packed: Vec<u8> = (0..500 * 32).map(|index| if index % 32 == 0 { 0xf0 } else { random() as u8 }).collect();
    let mut values = vec![0.0; 500 * 64];
    nf4::dequantize(&packed, &scales_before, 64, &mut values);
    let best = quantize(&encoded(&values, Float::F32), Float::F32, 64, false).unwrap();
    assert_eq!((best.scales, best.codes), (scales_before, packed));
}

#[test]
fn few_scales_are_their_own_levels() {
    let few: Vec<f32> = (0..10_000).map(|index| (index % 100) as f32 * 0.01 - 0.3).collect();
    let map = Map::fit(&few, None);
    assert!(map.0.is_sorted());
    for (&scale, absmax) in few.iter().zip(absmax(&few).into_iter().flat_map(|absmax| [absmax; 256])) {
        let nearest = map.0.iter().map(|level| (level * absmax - scale).abs()).fold(1.0, f32::min);
        assert!(nearest <= 1e-7, "{scale} is {nearest} from its level");
    }
    assert_eq!(Map::fit(&[], None), Map([0.0; 256]));
    assert_eq!(Map::fit(&[0.0; 300], None), Map([0.0; 256]));
}

#[test]
fn a_fit_beats_equal_steps_and_follows_its_weights() {
    let mut random = generator(7);
    let mut uniform = || random() as f32 / 2_f32.powi(32);
    let many: Vec<f32> = (0..100_000)
        .map(|_| (0.05 + uniform() * uniform() * uniform()) * if uniform() < 0.5 { -1.0 } else { 1.0 })
        .collect();
    let error = |map: &Map, counted: &dyn Fn(f32) -> bool| {
        let absmax = absmax(&many).into_iter().flat_map(|absmax| [absmax; 256]);
        let errors = many.iter().zip(absmax).filter(|(scale, _)| counted(**scale)).map(|(scale, absmax)| {
            f64::from(map.0.iter().map(|level| (level * absmax - scale).powi(2)).fold(f32::INFINITY, f32::min))
        });
        errors.sum::<f64>()
    };
    let fitted = Map::fit(&many, None);
    assert!(fitted.0.is_sorted());
    let equal = Map(std::array::from_fn(|index| index as f32 / 127.5 - 1.0));
    assert!(error(&fitted, &|_| true) < 0.5 * error(&equal, &|_| true));

    let weights: Vec<f32> = many.iter().map(|&scale| if scale > 0.5 { 1000.0 } else { 1.0 }).collect();
    let weighted = Map::fit(&many, Some(&weights));
    assert!(error(&weighted, &|scale| scale > 0.5) < 0.5 * error(&fitted, &|scale| scale > 0.5));
}

#[test]
fn extremes_are_kept_or_found() {
    for isa in ALL {
        for magnitude in [f32::MAX, 1e30, 1e-30, 1e-37, 1e-39, 1e-44] {
            let values = map(&weights(640, 8), |value| (value / 0.4 * magnitude).clamp(-f32::MAX, f32::MAX));
            let mut free = vec![0.0; 10];
            scales_on(isa, Values::Floats(&values), None, 64, &Candidates::default(), f32::MAX, &mut free).unwrap();
            assert!(free.iter().all(|scale| scale.is_finite()), "{magnitude}: {free:?}");
            let map = Map::fit(&free, None);
            let (mut snapped, mut nested, mut packed) = (free.clone(), vec![0; 10], vec![0; 320]);
            map.snap(Values::Floats(&values), 64, 0, &absmax(&free), &mut snapped, &mut nested, &mut packed);
            for (snapped, free) in snapped.iter().zip(&free) {
                assert!((snapped - free).abs() <= 1e-6 * free.abs() + 1e-45, "{magnitude}: {snapped} is not {free}");
            }
        }
    }
}

#[test]
fn what_is_decoded_stays_finite() {
    // Blocks that have the largest f16: of many the scale of least error is larger.
    let mut values = weights(64 * 200, 11);
    for block in values.chunks_mut(64) {
        let absmax = block.iter().fold(0.0, |max: f32, value| max.max(value.abs()));
        for value in block {
            *value *= 65504.0 / absmax.max(1e-9);
        }
    }
    let (bytes, mut free) = (encoded(&values, Float::F16), vec![0.0; 200]);
    scales(Values::Floats(&values), None, 64, &Candidates::default(), f32::MAX, &mut free).unwrap();
    assert!(free.iter().any(|scale| scale.abs() > 65504.0));
    for double_quant in [false, true] {
        let packed = quantize(&bytes, Float::F16, 64, double_quant).unwrap();
        assert!(packed.scales.iter().any(|scale| *scale < 0.0), "the search has found nothing");
        let mut decoded = vec![0; bytes.len()];
        nf4::dequantize_to(Float::F16, &packed.codes, &packed.scales, 64, &mut decoded);
        let mut floats = vec![0.0; values.len()];
        Float::F16.decode(&decoded, &mut floats);
        assert!(floats.iter().all(|value| value.is_finite()));
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_index() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (index, blocksize) in [(0, 64), (4100, 32), (9000, 4096), (9999, 64)] {
            let mut values = weights(10_000, 9);
            values[index] = bad;
            let mut free = vec![0.0; values.len().div_ceil(blocksize)];
            let found = scales(Values::Floats(&values), None, blocksize, &Candidates::default(), f32::MAX, &mut free);
            assert_eq!(found, Err(index));
        }
    }
}

#[test]
#[should_panic(expected = "100 weights do not fit 640 values")]
fn weights_that_do_not_fit_are_refused() {
    let _ =
        scales(Values::Floats(&[0.0; 640]), Some(&[1.0; 100]), 64, &Candidates::default(), f32::MAX, &mut [0.0; 10]);
}

#[test]
#[should_panic(expected = "is not positive")]
fn ratios_are_positive() {
    let _ = Candidates::new(&[0.9, -1.0]);
}
