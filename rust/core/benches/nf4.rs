//! One thread of the NF4 arithmetic on one weight of 4096 x 11008, 90 MB in bfloat16: `cargo bench`.
//!
//! The roof beside it is the memory's: a loop that reads as many bytes and writes as many as quantizing does, and does
//! nothing else. Criterion times one after the other, minutes apart on a machine that others use; so the ratio of the two
//! is taken at the end, of the least of many turns in which they alternate.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group};
use qpack_core::nf4::{self, Moments};
use qpack_core::{Float, nested};

const ELEMENTS: usize = 4096 * 11008;
const BLOCKSIZE: usize = 64;

/// Of quantizing and its roof, whose least times are compared.
const TURNS: usize = 150;

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

/// Read all of `source`, a block's bytes of it at a time, and write the bytes of codes and scales that make a block.
fn roof(source: &[u8], absmax: &mut [f32], codes: &mut [u8]) {
    let block = source.len() / absmax.len();
    let blocks = source.chunks_exact(block).zip(absmax).zip(codes.as_chunks_mut::<{ BLOCKSIZE / 2 }>().0);
    for ((block, scale), codes) in blocks {
        let mut folded = [0; BLOCKSIZE / 2];
        for part in block.as_chunks::<{ BLOCKSIZE / 2 }>().0 {
            prefetch(part);
            for (folded, byte) in folded.iter_mut().zip(part) {
                *folded |= byte;
            }
        }
        *scale = f32::from(folded[0]);
        *codes = folded;
    }
}

/// As far ahead as is fastest here.
#[allow(unsafe_code, reason = "a prefetch may be of any address")]
fn prefetch(part: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(part.as_ptr().wrapping_add(6144).cast());
    }
}

fn bench(criterion: &mut Criterion) {
    let weights = weights();
    let mut absmax = vec![0.0; ELEMENTS / BLOCKSIZE];
    let mut codes = vec![0; ELEMENTS / 2];
    let mut moments = vec![Moments::default(); ELEMENTS / BLOCKSIZE];

    for float in [Float::BF16, Float::F16, Float::F32] {
        let mut source = vec![0; ELEMENTS * float.size()];
        float.encode(&weights, &mut source);
        let mut group = criterion.benchmark_group(float.torch_name());
        group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
        group.throughput(Throughput::Bytes(source.len() as u64));
        group.bench_function("roof of quantize", |bencher| {
            bencher.iter(|| roof(black_box(&source), &mut absmax, &mut codes));
        });
        group.bench_function("quantize", |bencher| {
            bencher.iter(|| nf4::quantize(black_box(&source), float, BLOCKSIZE, &mut absmax, &mut codes));
        });
        group.bench_function("moments", |bencher| {
            bencher.iter(|| nf4::moments(black_box(&source), float, &codes, BLOCKSIZE, &mut moments));
        });
        group.bench_function("dequantize", |bencher| {
            bencher.iter(|| nf4::dequantize_to(float, black_box(&codes), &absmax, BLOCKSIZE, &mut source));
        });
    }

    let mut group = criterion.benchmark_group("nested");
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Bytes(4 * absmax.len() as u64));
    group.bench_function("offset", |bencher| bencher.iter(|| nested::offset(black_box(&absmax))));
    let offset = nested::offset(&absmax);
    group.bench_function("quantize", |bencher| bencher.iter(|| nested::quantize(black_box(&absmax), offset)));
    let packed = nested::quantize(&absmax, offset);
    group.bench_function("dequantize", |bencher| {
        bencher.iter(|| nested::dequantize(black_box(&packed.codes), &packed.absmax, &nested::QUANT_MAP, offset));
    });
}

/// Quantizing and its roof by turns.
fn of_the_roof() {
    let weights = weights();
    let mut absmax = vec![0.0; ELEMENTS / BLOCKSIZE];
    let mut codes = vec![0; ELEMENTS / 2];
    for float in [Float::BF16, Float::F16, Float::F32] {
        let mut source = vec![0; ELEMENTS * float.size()];
        float.encode(&weights, &mut source);
        let mut least = [f64::INFINITY; 2];
        for _ in 0..TURNS {
            let begin = Instant::now();
            roof(black_box(&source), &mut absmax, &mut codes);
            let between = Instant::now();
            nf4::quantize(black_box(&source), float, BLOCKSIZE, &mut absmax, &mut codes)
                .expect("all values are finite");
            let taken = [between - begin, between.elapsed()].map(|taken| taken.as_secs_f64() * 1e3);
            least = [least[0].min(taken[0]), least[1].min(taken[1])];
        }
        let [roof, quantize] = least;
        let name = float.torch_name();
        println!("{name}: roof {roof:.2} ms, quantize {quantize:.2} ms, {:.2} of the roof", roof / quantize);
    }
}

criterion_group!(benches, bench);

fn main() {
    benches();
    of_the_roof();
}
