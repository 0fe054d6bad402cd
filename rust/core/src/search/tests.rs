use super::*;
#[test]
fn temporary() {
    let n = 4096 * 512;
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((state >> 40) as f32 + 0.5) / (1 << 24) as f32
    };
    let values: Vec<f32> =
        (0..n).map(|_| ((-2.0 * uniform().ln()).sqrt() * (6.283_185_3 * uniform()).cos()) * 0.02).collect();
    let mut bytes = vec![0; 2 * n];
    Float::BF16.encode(&values, &mut bytes);
    for dq in [false, true] {
        let exact = {
            let mut s = vec![0.0; n / 64];
            let mut c = vec![0; n / 2];
            nf4::quantize(&bytes, Float::BF16, 64, &mut s, &mut c).unwrap();
            squared_error(Values::Stored(&bytes, Float::BF16), &s, 64, &c)
        };
        let best = quantize(&bytes, Float::BF16, 64, dq).unwrap();
        println!(
            "{dq} {}",
            1.0 - squared_error(Values::Stored(&bytes, Float::BF16), &best.scales, 64, &best.codes) / exact
        );
    }
}
