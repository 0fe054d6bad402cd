//! Whole files through recipes: packing, merging, sharding, cancelling.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use qpack_core::merge::{Change, Changes, LowRank, Stored, View};
use qpack_core::pack::{self, Mode, Options, Packing, Part, Recipe};
use qpack_core::safetensors::{Checkpoint, Layout, Tensor, TensorSpec, Writer};
use qpack_core::stream::{self, JOURNAL_NAME, Plan, Supply};
use qpack_core::{Dtype, Error, Float, Job, digest, encoded, nf4};
use tempfile::tempdir;

type Tensors<'a> = &'a [(&'a str, [u64; 2], Vec<f32>)];

fn write_floats(path: &Path, tensors: Tensors<'_>, float: Float) {
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, shape, _)| TensorSpec { name: (*name).to_owned(), dtype: float.dtype(), shape: shape.to_vec() })
        .collect();
    let writer = Writer::open(path, Arc::new(Layout::new(specs))).unwrap();
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

const EXACT: Options = Options { mode: Mode::Exact, storage: Dtype::U8 };

fn part(name: &str, shape: &[u64], packing: Option<Packing>) -> Part {
    let (name, shape) = (name.to_owned(), shape.to_vec());
    Part { name, shape, packing, keep_as: None, matrix: 0, rows: (0, 1), transpose: false }
}

fn recipe(source: &str, parts: Vec<Part>) -> Recipe {
    Recipe { source: source.to_owned(), scale: None, block: None, parts }
}

/// Pack `w`, keep everything else.
fn pack_w(checkpoint: &Checkpoint, packing: Packing, max_shard_bytes: u64) -> Plan<'_> {
    let recipes = checkpoint.tensors().map(|tensor| {
        let name = &tensor.info.name;
        recipe(name, vec![part(name, &tensor.info.shape, (name == "w").then_some(packing))])
    });
    pack::plan(checkpoint, &recipes.collect::<Vec<_>>(), Changes::none(), EXACT, max_shard_bytes).unwrap()
}

fn ramp(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|index| ((index * 7919) % 1000) as f32 * step - 1.0).collect()
}

#[test]
fn a_cancelled_job_ends_without_a_file() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    write_floats(&source, &[("w", [64, 64], ramp(4096, 0.002))], Float::BF16);
    let checkpoint = open(&[source]);
    let plan = pack_w(&checkpoint, Packing { blocksize: 64, double_quant: true }, u64::MAX);
    let job = Job::default();
    job.cancel();
    assert!(matches!(plan.write(dir.path(), "", 2, &(), &job), Err(Error::Cancelled)));
    assert!(!dir.path().join("model.safetensors").exists());
}

/// The files of a directory.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.file_name().unwrap().into(), fs::read(path).unwrap())).collect()
}

#[test]
fn a_run_goes_on_where_an_interrupted_one_ended_and_trusts_nothing() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    let names = ["a", "b", "c", "w"];
    write_floats(&source, &names.map(|name| (name, [64, 64], ramp(4096, 0.002))), Float::F32);
    let checkpoint = open(&[source]);
    let run = |out: &Path, inputs| {
        fs::create_dir_all(out).unwrap();
        let plan = pack_w(&checkpoint, Packing { blocksize: 64, double_quant: true }, 16_384);
        plan.write(out, inputs, 2, &(), &Job::default()).unwrap()
    };
    let whole = dir.path().join("whole");
    let first = run(&whole, "x");
    assert_eq!((first.resumed_bytes, first.files.len()), (0, 4));
    let of_a = digest::of(&checkpoint.tensor("a").unwrap().read().unwrap());
    assert_eq!(first.digests["a"], format!("F32 [64, 64] {of_a}"));
    let expected = contents(&whole);

    // Everything is there already; then with other inputs, nothing is.
    assert_eq!(run(&whole, "x"), stream::Written { resumed_bytes: 4 * 16384, ..first.clone() });
    assert_eq!(run(&whole, "y").resumed_bytes, 0);
    assert_eq!(run(&whole, "x").resumed_bytes, 0);

    let journal = whole.join(JOURNAL_NAME);
    let damages: [(&dyn Fn(), u64); 4] = [
        (
            &|| {
                // A line that was torn in the middle.
                let text = fs::read_to_string(&journal).unwrap();
                let end = text.rfind("{\"recipe\"").unwrap();
                fs::write(&journal, &text[..end + 20]).unwrap();
            },
            3,
        ),
        (&|| fs::write(whole.join("model-00002-of-00004.safetensors"), b"short").unwrap(), 3),
        (
            &|| {
                let path = whole.join("model-00003-of-00004.safetensors");
                let mut bytes = fs::read(&path).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(path, bytes).unwrap();
            },
            3,
        ),
        (&|| fs::remove_file(&journal).unwrap(), 0),
    ];
    for (damage, kept) in damages {
        damage();
        let again = run(&whole, "x");
        assert_eq!(again, stream::Written { resumed_bytes: kept * 16384, ..first.clone() });
        let files = |contents: &[(PathBuf, Vec<u8>)]| contents[1..].to_vec(); // the journal's order depends on the threads
        assert_eq!(files(&contents(&whole)), files(&expected));
    }
}

#[test]
fn parts_are_cut_interleaved_and_transposed_out_of_a_fused_tensor() {
    // Three experts of four rows and six columns; gate in the even rows, up in the odd ones.
    let dir = tempdir().unwrap();
    let (fused, swapped) = (dir.path().join("fused"), dir.path().join("swapped"));
    let values = ramp(72, 0.02);
    let at = |expert: usize, row: usize, column: usize| values[expert * 24 + row * 6 + column];
    let transposed: Vec<f32> = (0..72).map(|index| at(index / 24, index % 4, index / 4 % 6)).collect();
    for (path, shape, values) in [(&fused, [3_u64, 4, 6], &values), (&swapped, [3, 6, 4], &transposed)] {
        let spec = TensorSpec { name: "x".into(), dtype: Dtype::F32, shape: shape.to_vec() };
        let writer = Writer::open(path, Arc::new(Layout::new(vec![spec]))).unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|value: &f32| value.to_le_bytes()).collect();
        writer.write_at(0, 0, &bytes).unwrap();
        writer.finish().unwrap();
    }
    let packing = Some(Packing { blocksize: 32, double_quant: false });
    let cut = |path: &Path, transpose: bool, steps: [(u64, u64); 2], packing| {
        let part = |name: &str, matrix, rows| Part {
            matrix,
            rows,
            transpose,
            ..part(&format!("{name}{matrix}"), &[2, 6], packing)
        };
        let parts = (0..3).flat_map(|expert| [part("gate", expert, steps[0]), part("up", expert, steps[1])]);
        let checkpoint = open(&[path.to_owned()]);
        let out = tempdir().unwrap();
        let plan = pack::plan(&checkpoint, &[recipe("x", parts.collect())], Changes::none(), EXACT, u64::MAX).unwrap();
        plan.write(out.path(), "", 2, &(), &Job::default()).unwrap();
        let made = open(&[out.path().join("model.safetensors")]);
        let read = |name: &str| made.tensor(name).unwrap().read().unwrap();
        (0..3).map(|expert| [read(&format!("gate{expert}")), read(&format!("up{expert}"))]).collect::<Vec<_>>()
    };
    let (even_odd, halves) = ([(0, 2), (1, 2)], [(0, 1), (2, 1)]);
    let rows = |expert, rows: [usize; 2]| -> Vec<u8> {
        let values = rows.into_iter().flat_map(|row| (0..6).map(move |column| (row, column)));
        values.flat_map(|(row, column)| at(expert, row, column).to_le_bytes()).collect()
    };
    let interleaved: Vec<_> = (0..3).map(|expert| [rows(expert, [0, 2]), rows(expert, [1, 3])]).collect();
    let contiguous: Vec<_> = (0..3).map(|expert| [rows(expert, [0, 1]), rows(expert, [2, 3])]).collect();
    assert_eq!(cut(&fused, false, even_odd, None), interleaved);
    assert_eq!(cut(&swapped, true, even_odd, None), interleaved);
    assert_eq!(cut(&fused, false, halves, None), contiguous);
    assert_eq!(cut(&swapped, true, halves, None), contiguous);
    let codes = |parts: &[[Vec<u8>; 2]]| -> Vec<[Vec<u8>; 2]> {
        let quantize = |bytes: &Vec<u8>| {
            let mut codes = vec![0; 6];
            nf4::quantize(bytes, Float::F32, 32, &mut [0.0], &mut codes).unwrap();
            codes
        };
        parts.iter().map(|pair| [quantize(&pair[0]), quantize(&pair[1])]).collect()
    };
    assert_eq!(cut(&fused, false, even_odd, packing), codes(&interleaved));
    assert_eq!(cut(&swapped, true, halves, packing), codes(&contiguous));
}

#[test]
fn a_merge_goes_on_too_and_knows_the_norms_of_what_was_done() {
    let dir = tempdir().unwrap();
    let (source, adapter) = (dir.path().join("source.safetensors"), dir.path().join("adapter.safetensors"));
    // Two chunks a weight.
    let rows = 2048;
    let names = ["w", "x", "y"];
    write_floats(&source, &names.map(|name| (name, [rows, 512], ramp(1 << 20, 0.002))), Float::BF16);
    let factors = [("a", [4, 512]), ("b", [rows, 4]), ("m", [1, rows]), ("z", [3, 5])];
    write_floats(
        &adapter,
        &factors.map(|(name, shape)| (name, shape, ramp((shape[0] * shape[1]) as usize, 0.003))),
        Float::F32,
    );
    let packed = dir.path().join("packed");
    fs::create_dir(&packed).unwrap();
    let checkpoint = open(&[source]);
    let plan = pack_w(&checkpoint, Packing { blocksize: 64, double_quant: true }, u64::MAX);
    plan.write(&packed, "", 2, &(), &Job::default()).unwrap();
    let base = open(&[packed.join("model.safetensors")]);

    let stored = |name: &str| Stored { file: adapter.clone(), name: name.to_owned() };
    let view = |name: &str, columns| View { tensor: stored(name), offset: 0, strides: [columns, 1] };
    let change = |magnitude: Option<&str>| Change::Sum {
        terms: vec![LowRank { left: view("b", 4), right: view("a", 512), r: 4, scale: 0.5, rows: None }],
        magnitude: magnitude.map(stored),
        by_columns: false,
        of: None,
    };
    let changes = [("w", change(None)), ("x", change(Some("m"))), ("z", Change::Replace(stored("z")))];
    let changes = Changes::open(changes.map(|(name, change)| (name.to_owned(), change)).into()).unwrap();
    let shapes = [("w", [rows, 512]), ("x", [rows, 512]), ("y", [rows, 512]), ("z", [3, 5])];
    let kept = |name: &str, shape: &[u64]| Part { keep_as: Some(Float::BF16), ..part(name, shape, None) };
    let recipes = shapes.map(|(name, shape)| recipe(name, vec![kept(name, &shape)]));
    let run = |out: &Path, threads| {
        fs::create_dir_all(out).unwrap();
        let plan = pack::plan(&base, &recipes, &changes, EXACT, 1 << 21).unwrap();
        let total = plan.source_bytes();
        (plan.write(out, "", threads, &(), &Job::default()).unwrap(), total)
    };
    let whole = dir.path().join("whole");
    let (first, total) = run(&whole, 1);
    assert_eq!(first.changes.keys().collect::<Vec<_>>(), ["w", "x"]);
    assert!(first.changes.values().all(|norms| norms.change > 1.0 && norms.weight > 1.0), "{:?}", first.changes);
    let files = |out: &Path| contents(out)[1..].to_vec(); // without the journal
    let expected = files(&whole);
    let journal = fs::read_to_string(whole.join(JOURNAL_NAME)).unwrap();
    let lines: Vec<&str> = journal.split_inclusive('\n').collect();
    // As if it had been killed after each recipe, with a torn line, and whatever in the file that it was at.
    for done in 1..=4 {
        let torn = lines.get(done + 1).map_or("", |line| &line[..line.len() / 2]);
        fs::write(whole.join(JOURNAL_NAME), lines[..=done].concat() + torn).unwrap();
        if done < 4 {
            let path = whole.join(format!("model-0000{}-of-00004.safetensors", done + 1));
            let mut bytes = fs::read(&path).unwrap();
            bytes.truncate(bytes.len() - 7);
            fs::write(path, bytes).unwrap();
        }
        let (again, _) = run(&whole, 2);
        assert_eq!(stream::Written { resumed_bytes: 0, ..again.clone() }, first);
        assert!(if done < 4 { (1..total).contains(&again.resumed_bytes) } else { again.resumed_bytes == total });
        assert_eq!(files(&whole), expected);
    }
}

/// Source files that come from a store, and are only there while they are needed.
struct OneAtATime<'a> {
    store: &'a Path,
    here: &'a Path,
    calls: Mutex<Vec<String>>,
}

impl Supply for OneAtATime<'_> {
    fn fetches(&self) -> bool {
        true
    }

    fn need(&self, file: &Path) -> qpack_core::Result<Option<PathBuf>> {
        let name = file.file_name().unwrap();
        let (known, here) = (self.store.join(name), self.here.join(name));
        if !known.exists() {
            return Err(Error::Supply { path: file.to_owned(), source: "is not in the store".into() });
        }
        self.calls.lock().unwrap().push(format!("need {}", name.display()));
        fs::copy(known, &here).unwrap();
        Ok(Some(here))
    }

    fn done(&self, file: &Path) -> qpack_core::Result<()> {
        let name = file.file_name().unwrap();
        self.calls.lock().unwrap().push(format!("done {}", name.display()));
        fs::remove_file(self.here.join(name)).unwrap();
        Ok(())
    }
}

#[test]
fn source_files_come_and_go_while_the_plan_is_carried_out() {
    let dir = tempdir().unwrap();
    let [store, source, here, out] = ["store", "source", "here", "out"].map(|name| dir.path().join(name));
    for path in [&store, &source, &here, &out] {
        fs::create_dir(path).unwrap();
    }
    for (file, tensor) in [("1", "a"), ("2", "w"), ("3", "c")] {
        write_floats(&store.join(file), &[(tensor, [64, 64], ramp(4096, 0.002))], Float::F32);
        // All that a plan needs: the header, and a file of the right length.
        let bytes = fs::read(store.join(file)).unwrap();
        let mut header = bytes[..bytes.len() - 4 * 4096].to_vec();
        header.resize(bytes.len(), 0);
        fs::write(source.join(file), header).unwrap();
    }
    let checkpoint = open(&["1", "2", "3"].map(|file| source.join(file)));
    let packing = Packing { blocksize: 64, double_quant: true };
    let supply = || OneAtATime { store: &store, here: &here, calls: Mutex::default() };
    let one_at_a_time = supply();
    let plan = pack_w(&checkpoint, packing, u64::MAX);
    let written = plan.write(&out, "", 2, &one_at_a_time, &Job::default()).unwrap();
    let calls = one_at_a_time.calls.into_inner().unwrap();
    assert_eq!(calls, ["need 1", "done 1", "need 2", "done 2", "need 3", "done 3"]);
    let of_a = digest::of(&open(&[store.join("1")]).tensor("a").unwrap().read().unwrap());
    assert_eq!(written.digests["a"], format!("F32 [64, 64] {of_a}"));
    assert_eq!(fs::read_dir(&here).unwrap().count(), 0);

    // A file that is not what the plan was made for, and one that cannot be had.
    let other = || write_floats(&store.join("2"), &[("x", [64, 64], ramp(4096, 0.1))], Float::F32);
    let gone = || fs::remove_file(store.join("2")).unwrap();
    let damages: [(&dyn Fn(), &str); 2] = [(&other, "is not the file that it was"), (&gone, "is not in the store")];
    for (damage, reason) in damages {
        damage();
        let error = pack_w(&checkpoint, packing, u64::MAX).write(&out, reason, 1, &supply(), &Job::default());
        let message = error.unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn a_recipe_that_does_not_fit_its_source_is_refused() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    write_floats(&source, &[("w", [4, 6], ramp(24, 0.1)), ("v", [1, 2], ramp(2, 0.1))], Float::F32);
    let checkpoint = open(&[source]);
    let all_of = |name: &str, shape: &[u64]| recipe(name, vec![part(name, shape, None)]);
    let rows = |name: &str, count, rows| Part { rows, ..part(name, &[count, 6], None) };
    let w = |parts| vec![recipe("w", parts), all_of("v", &[1, 2])];
    for (recipes, reason) in [
        (vec![all_of("w", &[4, 6])], "tensor v: is in no recipe"),
        (vec![all_of("w", &[4, 6]), all_of("w", &[4, 6])], "tensor w: w is used twice"),
        (w(vec![rows("a", 2, (0, 1)), rows("a", 2, (2, 1))]), "a is made twice"),
        (w(vec![part("a", &[4, 5], None)]), "has shape [4, 6], which a of shape [4, 5] is no part of"),
        (w(vec![rows("a", 2, (0, 1))]), "row 2 of matrix 0 is in no part"),
        (w(vec![rows("a", 3, (0, 1)), rows("b", 2, (2, 1))]), "row 2 of matrix 0 is used twice"),
        (w(vec![rows("a", 2, (2, 1)), rows("b", 2, (0, 1))]), "b is not in the order of rows"),
        (w(vec![rows("a", 2, (0, 3))]), "row 1 of matrix 0 is in no part"),
        (w(vec![rows("a", 2, (3, 1))]), "no part of"),
        (w(vec![Part { matrix: 1, ..rows("a", 4, (0, 1)) }]), "no part of"),
    ] {
        let message =
            pack::plan(&checkpoint, &recipes, Changes::none(), EXACT, u64::MAX).err().expect(reason).to_string();
        assert!(message.contains(reason), "{message}: expected {reason}");
    }
}

#[test]
fn a_plan_knows_what_it_will_read_and_write() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    let tensors = [("keep", [3, 5], ramp(15, 0.002)), ("w", [50, 70], ramp(3500, 0.002))];
    write_floats(&source, &tensors, Float::F32);
    let checkpoint = open(&[source]);
    let plan = pack_w(&checkpoint, Packing { blocksize: 128, double_quant: true }, u64::MAX);
    let job = Job::default();
    let (source_bytes, files) = (plan.source_bytes(), plan.files());
    let written = plan.write(dir.path(), "", 2, &(), &job).unwrap();
    assert_eq!((job.done(), source_bytes), (4 * 3515, 4 * 3515));
    let path = dir.path().join("model.safetensors");
    assert_eq!(files, [("model.safetensors".to_owned(), fs::metadata(path).unwrap().len())]);
    let result = open(&[dir.path().join(&written.files[0])]);
    assert_eq!(written.tensor_bytes, result.tensors().map(|tensor| tensor.info.bytes()).sum::<u64>());
}

#[test]
fn a_weight_that_is_not_there_is_refused() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    write_floats(&source, &[("w", [2, 2], ramp(4, 0.1))], Float::F32);
    let checkpoint = open(&[source]);
    let recipes = [recipe("v", vec![part("v", &[2, 2], None)])];
    let plan = pack::plan(&checkpoint, &recipes, Changes::none(), EXACT, u64::MAX);
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
        let plan = pack_w(&checkpoint, Packing { blocksize, double_quant }, max_shard_bytes);
        let files = plan.write(&packed_dir, "", 2, &(), &Job::default()).unwrap().files;
        let packed = open(&files.iter().map(|file| packed_dir.join(file)).collect::<Vec<_>>());

        let view = |name: &str, columns| View {
            tensor: Stored { file: adapter.clone(), name: name.to_owned() },
            offset: 0,
            strides: [columns, 1],
        };
        let term = LowRank { left: view("b", 2), right: view("a", columns), r: 2, scale: 0.5, rows: None };
        let change = Change::Sum { terms: vec![term], magnitude: None, by_columns: false, of: None };
        let changes = Changes::open(BTreeMap::from([("w".to_owned(), change)])).unwrap();
        let recipes = [recipe("w", vec![part("w", &[rows, columns], None)]), recipe("n", vec![part("n", &[1, 3], None)])];
        let plan = pack::plan(&packed, &recipes, &changes, EXACT, max_shard_bytes).unwrap();
        let files = plan.write(&merged_dir, "", 2, &(), &Job::default()).unwrap().files;
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

#[test]
fn encoded_sources_are_packed_as_what_they_decode_to() {
    // FP8 of two experts of 160 x 200 in blocks of 128 x 128, and MXFP4 of two of 6 x 64.
    let dir = tempdir().unwrap();
    let path = dir.path().join("source.safetensors");
    let spec = |name: &str, dtype, shape: &[u64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
    let specs = [
        spec("fp8", Dtype::F8E4M3, &[2, 160, 200]),
        spec("fp8_scale", Dtype::F32, &[2, 2, 2]),
        spec("mx", Dtype::U8, &[2, 6, 2, 16]),
        spec("mx_scale", Dtype::U8, &[2, 6, 2]),
    ];
    let codes: Vec<u8> = (0..64_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8 & 0xbf).collect();
    let scales: Vec<u8> = (1..9_u8).flat_map(|index| (f32::from(index) / 8.0).to_le_bytes()).collect();
    let (mx, mx_scales) = (&codes[..384], &[120_u8, 121, 127, 130, 128, 90, 91, 92, 93, 94, 95, 96].repeat(2)[..]);
    let writer = Writer::open(&path, Arc::new(Layout::new(specs.to_vec()))).unwrap();
    for (index, bytes) in [&codes[..], &scales, mx, mx_scales].into_iter().enumerate() {
        writer.write_at(index, 0, bytes).unwrap();
    }
    writer.finish().unwrap();
    let checkpoint = open(&[path]);

    let mut fp8 = vec![0; 128_000];
    let weight = encoded::fp8::Weight::open(
        checkpoint.tensor("fp8").unwrap(),
        checkpoint.tensor("fp8_scale").unwrap(),
        Some([128, 128]),
    );
    weight.unwrap().read_scales().unwrap().decode_rows(&codes, 0, &mut fp8);
    let mut decoded = vec![0; 1536];
    encoded::mxfp4::decode(mx, mx_scales, &mut decoded);

    let packing = Some(Packing { blocksize: 64, double_quant: false });
    let parts = |name: &str, shape: &[u64], packing: Option<Packing>| {
        let part = |matrix| Part { matrix, ..part(&format!("{name}{matrix}"), shape, packing) };
        vec![part(0), Part { packing: None, ..part(1) }]
    };
    let recipes = [
        Recipe {
            scale: Some("fp8_scale".into()),
            block: Some([128, 128]),
            ..recipe("fp8", parts("f", &[160, 200], packing))
        },
        Recipe { scale: Some("mx_scale".into()), ..recipe("mx", parts("m", &[6, 64], packing)) },
    ];
    let plan = pack::plan(&checkpoint, &recipes, Changes::none(), EXACT, u64::MAX).unwrap();
    plan.write(dir.path(), "", 2, &(), &Job::default()).unwrap();
    let made = open(&[dir.path().join("model.safetensors")]);
    for (name, floats) in [("f", &fp8), ("m", &decoded)] {
        let (first, second) = floats.split_at(floats.len() / 2);
        let mut codes = vec![0; first.len() / 4];
        nf4::quantize(first, Float::BF16, 64, &mut vec![0.0; first.len() / 128], &mut codes).unwrap();
        let read = |name: String| made.tensor(&name).unwrap().read().unwrap();
        assert_eq!(read(format!("{name}0")), codes);
        assert_eq!(read(format!("{name}1")), second);
        assert_eq!(made.tensor(&format!("{name}1")).unwrap().info.dtype, Dtype::BF16);
    }
}

/// A recipe that panics, at work or while it is started.
struct Panics<'a>(Tensor<'a>, bool);

impl stream::Recipe for Panics<'_> {
    fn outputs(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    fn source(&self) -> Tensor<'_> {
        self.0
    }

    fn chunks(&self) -> Vec<std::ops::Range<u64>> {
        (0..64).map(|chunk| chunk * 256..chunk * 256 + 256).collect()
    }

    fn start(&self) -> qpack_core::Result<Box<dyn stream::Run + '_>> {
        assert!(!self.1, "a recipe that panics at the start");
        Ok(Box::new(self))
    }
}

impl stream::Run for &Panics<'_> {
    fn chunk(&self, _: usize, _: &[u8], _: &stream::Sink<'_>) -> qpack_core::Result<Vec<usize>> {
        panic!("a recipe that panics at work")
    }
}

#[test]
fn a_panic_ends_the_work_instead_of_hanging_it() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source.safetensors");
    write_floats(&source, &[("w", [64, 64], ramp(4096, 0.002))], Float::F32);
    let checkpoint = open(&[source]);
    for at_start in [false, true] {
        let recipes: Vec<Box<dyn stream::Recipe>> = vec![Box::new(Panics(checkpoint.tensor("w").unwrap(), at_start))];
        let plan = Plan::new(recipes, u64::MAX);
        let run = std::panic::AssertUnwindSafe(|| plan.examine(2, &(), &Job::default()));
        assert!(std::panic::catch_unwind(run).is_err());
    }
}
