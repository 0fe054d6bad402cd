//! One thread of decoding one encoded weight of 4096 x 1024, in bytes of bfloat16 out: `cargo bench --bench encoded`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qpack_core::Dtype;
use qpack_core::encoded::{fp8, mxfp4};

const SHAPE: [u64; 2] = [4096, 1024];
const ELEMENTS: usize = 4096 * 1024;

fn bench(criterion: &mut Criterion) {
    // Bytes of all values, from a fixed generator; FP8's NaN among them, which cost the same as any.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as u8
    };
    let codes: Vec<u8> = (0..ELEMENTS).map(|_| byte()).collect();
    let mut out = vec![0; 2 * ELEMENTS];
    let mut group = criterion.benchmark_group("encoded");
    group.throughput(Throughput::Bytes(out.len() as u64));

    let grid = fp8::Grid::new(&SHAPE, Some([128, 128])).expect("a legal shape");
    let scales = 0.01_f32.to_le_bytes().repeat(32 * 8);
    let scales = fp8::Scales::new(&scales, Dtype::F32, grid).expect("as many scales as blocks");
    group.bench_function("fp8", |bencher| bencher.iter(|| scales.decode_rows(black_box(&codes), 0, &mut out)));

    let (blocks, scales) = (&codes[..ELEMENTS / 2], vec![120; ELEMENTS / mxfp4::GROUP]);
    group.bench_function("mxfp4", |bencher| bencher.iter(|| mxfp4::decode(black_box(blocks), &scales, &mut out)));
}

criterion_group!(benches, bench);
criterion_main!(benches);
