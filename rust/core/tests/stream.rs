//! Whole files through recipes: packing, merging, sharding, cancelling.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use qpack_core::merge::{self, FactorNames};
use qpack_core::pack::{self, Options};
use qpack_core::safetensors::{Checkpoint, TensorSpec, Writer};
use qpack_core::{Error, Float, Job};
use tempfile::tempdir;

type Tensors<'a> = &'a [(&'a str, [u64; 2], Vec<f32>)];

fn write_floats(path: &Path, tensors: Tensors<'_>, float: Float) {
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, shape, _)| TensorSpec { name: (*name).to_owned(), dtype: float.dtype(), shape: shape.to_vec() })
        .collect();
    let writer = Writer::create(path, &specs).unwrap();
    for (index, (_, _, values)) in tensors.iter().enumerate() {
        let mut bytes = vec![0; values.len() * float.size()];
        float.encode(values, &mut bytes);
        writer.write_at(index, 0, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn open(paths: &[PathBuf]) -> Checkpoint {
    Checkpoint::open(paths).unwrap()
}

fn ramp(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|index| ((index * 7919) % 1000) as f32 * step - 1.0).collect()
}

#[test]
fn a_cancelled_job_ends_with_nothing_written() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    write_floats(&source, &[("w", [64, 64], ramp(4096, 0.002))], Float::BF16);
    let checkpoint = open(&[source]);
    let options = Options { blocksize: 64, double_quant: true };
    let plan = pack::plan(&checkpoint, &HashSet::from(["w".to_owned()]), options, u64::MAX).unwrap();
    let job = Job::default();
    job.cancel();
    assert!(matches!(plan.write(dir.path(), &job), Err(Error::Cancelled)));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_plan_knows_what_it_will_read_and_write() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    let tensors = [("keep", [3, 5], ramp(15, 0.002)), ("w", [50, 70], ramp(3500, 0.002))];
    write_floats(&source, &tensors, Float::F32);
    let checkpoint = open(&[source]);
    let options = Options { blocksize: 128, double_quant: true };
    let plan = pack::plan(&checkpoint, &HashSet::from(["w".to_owned()]), options, u64::MAX).unwrap();
    let job = Job::default();
    let written = plan.write(dir.path(), &job).unwrap();
    assert_eq!((job.done(), plan.source_bytes()), (4 * 3515, 4 * 3515));
    let result = open(&[dir.path().join(&written.files[0])]);
    assert_eq!(written.tensor_bytes, result.tensors().map(|tensor| tensor.info.bytes()).sum::<u64>());
}

#[test]
fn a_weight_that_is_not_there_is_refused() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    write_floats(&source, &[("w", [2, 2], ramp(4, 0.1))], Float::F32);
    let checkpoint = open(&[source]);
    let options = Options { blocksize: 64, double_quant: true };
    let plan = pack::plan(&checkpoint, &HashSet::from(["v".to_owned()]), options, u64::MAX);
    assert!(plan.err().unwrap().to_string().ends_with("no tensor v"));
    let factors = HashMap::from([("v".to_owned(), FactorNames { a: "a".into(), b: "b".into(), scale: 1.0 })]);
    let plan = merge::plan(&checkpoint, &checkpoint, &factors, Float::F32, u64::MAX);
    assert!(plan.err().unwrap().to_string().ends_with("no tensor v"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Packed weights come back as their codes say, whatever the shape, blocksize and split into files; and a merge
    /// adds `scale * B @ A`.
    #[test]
    fn packing_then_merging_gives_the_decoded_weights(
        rows in 1_u64..40,
        columns in 1_u64..150,
        blocksize in prop::sample::select(qpack_core::nf4::BLOCKSIZES.to_vec()),
        double_quant in any::<bool>(),
        max_shard_bytes in prop::sample::select(vec![1, 2000, u64::MAX]),
    ) {
        let dir = tempdir().unwrap();
        let (packed_dir, merged_dir) = (dir.path().join("packed"), dir.path().join("merged"));
        fs::create_dir(&packed_dir).unwrap();
        fs::create_dir(&merged_dir).unwrap();
        let source = dir.path().join("source.safetensors");
        let weights = ramp((rows * columns) as usize, 0.002);
        write_floats(&source, &[("w", [rows, columns], weights.clone()), ("n", [1, 3], vec![1.0; 3])], Float::F32);
        let adapter = dir.path().join("adapter.safetensors");
        let (a, b) = (ramp(2 * columns as usize, 0.001), ramp(2 * rows as usize, 0.001));
        write_floats(&adapter, &[("a", [2, columns], a.clone()), ("b", [rows, 2], b.clone())], Float::F32);

        let checkpoint = open(&[source]);
        let options = Options { blocksize, double_quant };
        let plan = pack::plan(&checkpoint, &HashSet::from(["w".to_owned()]), options, max_shard_bytes).unwrap();
        let files = plan.write(&packed_dir, &Job::default()).unwrap().files;
        let packed = open(&files.iter().map(|file| packed_dir.join(file)).collect::<Vec<_>>());

        let adapter = open(&[adapter]);
        let factors = HashMap::from([("w".to_owned(), FactorNames { a: "a".into(), b: "b".into(), scale: 0.5 })]);
        let plan = merge::plan(&packed, &adapter, &factors, Float::F32, max_shard_bytes).unwrap();
        let files = plan.write(&merged_dir, &Job::default()).unwrap().files;
        let merged = open(&files.iter().map(|file| merged_dir.join(file)).collect::<Vec<_>>());
        prop_assert_eq!(merged.tensor("n").unwrap().read_floats().unwrap(), vec![1.0; 3]);

        let found = merged.tensor("w").unwrap().read_floats().unwrap();
        let columns = columns as usize;
        for (index, value) in found.iter().enumerate() {
            let (row, column) = (index / columns, index % columns);
            let change = 0.5 * (b[2 * row] * a[column] + b[2 * row + 1] * a[columns + column]);
            // Weights lie in [-1, 1]: half the widest gap between levels, and the nested scale's own error of 0.7 % of
            // the range of scales.
            prop_assert!((value - change - weights[index]).abs() < 0.16, "{} {} {}", value, change, weights[index]);
        }
    }
}
