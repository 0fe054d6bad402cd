//! One thread of the NF4 arithmetic on one weight of 4096 x 1024: `cargo bench`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qpack_core::{Float, nested, nf4};

const ELEMENTS: usize = 4096 * 1024;
const BLOCKSIZE: usize = 64;

/// Values that look like a layer's weights: a sum of uniform numbers, near Gaussian, from a fixed generator.
fn weights() -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..ELEMENTS).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.02).collect()
}

fn bench(criterion: &mut Criterion) {
    let weights = weights();
    let mut absmax = vec![0.0; ELEMENTS / BLOCKSIZE];
    let mut codes = vec![0; ELEMENTS / 2];

    for float in [Float::BF16, Float::F16, Float::F32] {
        let mut source = vec![0; ELEMENTS * float.size()];
        float.encode(&weights, &mut source);
        let mut group = criterion.benchmark_group(float.torch_name());
        group.throughput(Throughput::Bytes(source.len() as u64));
        group.bench_function("quantize", |bencher| {
            bencher.iter(|| nf4::quantize(black_box(&source), float, BLOCKSIZE, &mut absmax, &mut codes));
        });
        group.bench_function("dequantize", |bencher| {
            bencher.iter(|| nf4::dequantize_to(float, black_box(&codes), &absmax, BLOCKSIZE, &mut source));
        });
    }

    let mut group = criterion.benchmark_group("nested");
    group.throughput(Throughput::Bytes(4 * absmax.len() as u64));
    group.bench_function("quantize", |bencher| {
        bencher.iter(|| nested::quantize(black_box(&absmax), nested::offset(&absmax)));
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
