//! One thread of `best` mode on one weight of 4096 x 1024 in bf16, step by step and in all, beside `exact`:
//! `cargo bench --bench search`. `QPACK_ISA` holds the instructions down.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qpack_core::search::{self, Candidates, Map, Values};
use qpack_core::{Float, nf4};

const ELEMENTS: usize = 4096 * 1024;
const BLOCKSIZE: usize = 64;

/// Values that look like a layer's weights: a sum of uniform numbers, near Gaussian, from a fixed generator.
fn weights() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..ELEMENTS).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.02).collect();
    let mut bytes = vec![0; 2 * ELEMENTS];
    Float::BF16.encode(&values, &mut bytes);
    bytes
}

fn bench(criterion: &mut Criterion) {
    let source = weights();
    let values = Values::Stored(&source, Float::BF16);
    let mut scales = vec![0.0; ELEMENTS / BLOCKSIZE];
    let mut nested = vec![0; ELEMENTS / BLOCKSIZE];
    let mut codes = vec![0; ELEMENTS / 2];
    let candidates = Candidates::default();

    let mut group = criterion.benchmark_group("search");
    group.throughput(Throughput::Bytes(source.len() as u64));
    group.bench_function("exact", |bencher| {
        bencher.iter(|| nf4::quantize(black_box(&source), Float::BF16, BLOCKSIZE, &mut scales, &mut codes));
    });
    group.bench_function("scales", |bencher| {
        bencher.iter(|| search::scales(black_box(values), None, BLOCKSIZE, &candidates, f32::MAX, &mut scales));
    });
    let ones = vec![1.0; 1024];
    group.bench_function("scales, weighted", |bencher| {
        let mut scales = scales.clone();
        bencher.iter(|| search::scales(black_box(values), Some(&ones), BLOCKSIZE, &candidates, f32::MAX, &mut scales));
    });
    group.bench_function("fit", |bencher| bencher.iter(|| Map::fit(black_box(&scales), None)));
    let (map, absmax) = (Map::fit(&scales, None), search::absmax(&scales));
    group.bench_function("snap", |bencher| {
        let mut snapped = scales.clone();
        bencher.iter(|| {
            snapped.copy_from_slice(&scales);
            map.snap(black_box(values), BLOCKSIZE, 0, &absmax, &mut snapped, &mut nested, &mut codes);
        });
    });
    group.bench_function("best", |bencher| {
        bencher.iter(|| {
            search::scales(black_box(values), None, BLOCKSIZE, &candidates, f32::MAX, &mut scales)?;
            let map = Map::fit(&scales, None);
            let absmax = search::absmax(&scales);
            map.snap(black_box(values), BLOCKSIZE, 0, &absmax, &mut scales, &mut nested, &mut codes);
            Ok::<_, usize>(())
        });
    });
    group.bench_function("codes", |bencher| {
        bencher.iter(|| search::codes(black_box(values), &scales, BLOCKSIZE, &mut codes));
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
