//! One thread of merging a packed weight of 4096 x 11008, 90 MB in bfloat16: `cargo bench --bench merge`.
//!
//! Beside it is decoding alone, which reads and writes as much.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qpack_core::merge::{Factors, merge_nf4};
use qpack_core::{Float, nf4};

const SIZE: [usize; 2] = [4096, 11008];
const BLOCKSIZE: usize = 64;

/// A sum of uniform numbers, near Gaussian, from a fixed generator.
fn gaussian(count: usize, deviation: f32) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 1.414 * deviation).collect()
}

fn bench(criterion: &mut Criterion) {
    let [rows, columns] = SIZE;
    let elements = rows * columns;
    let mut source = vec![0; elements * 2];
    Float::BF16.encode(&gaussian(elements, 0.02), &mut source);
    let (mut absmax, mut codes) = (vec![0.0; elements / BLOCKSIZE], vec![0; elements / 2]);
    nf4::quantize(&source, Float::BF16, BLOCKSIZE, &mut absmax, &mut codes).expect("finite");
    drop(source);

    let mut group = criterion.benchmark_group("merge");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(2));
    for float in [Float::BF16, Float::F16, Float::F32] {
        let mut out = vec![0; elements * float.size()];
        group.throughput(Throughput::Bytes(out.len() as u64));
        group.bench_function(format!("decode {}", float.torch_name()), |bencher| {
            bencher.iter(|| nf4::dequantize_to(float, black_box(&codes), &absmax, BLOCKSIZE, &mut out));
        });
        for r in [1, 16, 64, 256] {
            let (left, right) = (gaussian(rows * r, 0.01), gaussian(r * columns, 0.02));
            let factors = Factors { left: &left, right: &right, r, scale: 2.0 };
            group.bench_function(format!("rank {r} {}", float.torch_name()), |bencher| {
                bencher.iter(|| merge_nf4(black_box(&codes), &absmax, BLOCKSIZE, factors, float, &mut out));
            });
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
