//! Files: what is written is read back, what is malformed is refused with its reason, nothing half-written stays.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use qpack_core::Dtype;
use qpack_core::safetensors::{Checkpoint, File, Layout, TensorSpec, Writer};
use tempfile::tempdir;

fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

fn write_raw(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(path, bytes).unwrap();
}

fn refusal(header: &str, data: usize) -> String {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    write_raw(&path, header, data);
    let message = File::open(&path).unwrap_err().to_string();
    message.strip_prefix(&format!("{}: ", path.display())).expect("the path comes first").to_owned()
}

#[test]
fn tensors_are_laid_out_by_size_then_name_and_read_back() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let specs = [spec("b", Dtype::U8, &[3]), spec("z", Dtype::F32, &[1]), spec("a", Dtype::BF16, &[1, 2])];
    let writer = Writer::open(&path, Arc::new(Layout::new(specs.to_vec()))).unwrap();
    writer.write_at(0, 0, &[1, 2, 3]).unwrap();
    writer.write_at(2, 2, &[6, 7]).unwrap();
    writer.write_at(2, 0, &[4, 5]).unwrap();
    writer.write_at(1, 0, &[8, 9, 10, 11]).unwrap();
    assert!(!path.exists());
    writer.finish().unwrap();

    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[bytes.len() - 11..], [8, 9, 10, 11, 4, 5, 6, 7, 1, 2, 3]);
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
    let checkpoint = Checkpoint::open(&[path]).unwrap();
    let names: Vec<_> = checkpoint.tensors().map(|tensor| tensor.info.name.as_str()).collect();
    assert_eq!(names, ["z", "a", "b"]);
    assert_eq!(checkpoint.tensor("b").unwrap().read().unwrap(), [1, 2, 3]);
}

#[test]
fn a_file_that_was_not_finished_is_gone_on_with_if_it_has_the_same_header() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let layout = |length| Arc::new(Layout::new(vec![spec("a", Dtype::U8, &[length])]));
    let read_back = |length| {
        let writer = Writer::open(&path, layout(length)).unwrap();
        writer.finish().unwrap();
        Checkpoint::open(std::slice::from_ref(&path)).unwrap().tensor("a").unwrap().read().unwrap()
    };
    let writer = Writer::open(&path, layout(3)).unwrap();
    writer.write_at(0, 0, &[1, 2, 3]).unwrap();
    drop(writer);
    assert!(!path.exists());
    assert_eq!(read_back(3), [1, 2, 3]); // left unfinished
    assert_eq!(read_back(3), [1, 2, 3]); // finished
    assert_eq!(read_back(4), [0; 4]);
}

#[test]
fn malformed_headers_are_refused_with_their_reason() {
    let tensor = |name: &str, dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let one = |dtype, shape, start, end| format!("{{{}}}", tensor("a", dtype, shape, start, end));
    let two = |second: String| format!("{{{},{second}}}", tensor("a", "U8", "[4]", 0, 4));
    for (header, data, reason) in [
        ("{".to_owned(), 0, "header is not valid: EOF"),
        ("[]".to_owned(), 0, "expected an object of tensors"),
        (one("U9", "[4]", 0, 4), 4, r#"tensor a has unknown dtype "U9""#),
        (one("U8", "[5]", 0, 4), 4, "tensor a of shape [5] and dtype U8 needs 5 bytes, its offsets are 0..4"),
        (one("U8", "[4]", 4, 0), 4, "its offsets are 4..0"),
        (one("U8", "[-1]", 0, 4), 4, "header is not valid: invalid value"),
        (one("F32", "[4294967296,4294967296]", 0, 4), 4, "has too many bytes to count"),
        (one("U8", "[4]", 0, 4), 3, "tensor a ends at byte 4 of the data, which has 3: truncated?"),
        (one("U8", "[4]", 0, 4), 5, "1 bytes after the last tensor belong to none"),
        (one("U8", "[4]", 1, 5), 5, "hole before tensor a (starts at 1, expected 0)"),
        (two(tensor("b", "U8", "[4]", 3, 7)), 7, "tensor b overlaps the tensor before it (starts at 3, expected 4)"),
        (two(tensor("b", "U8", "[4]", 6, 10)), 10, "hole before tensor b"),
        (two(tensor("a", "U8", "[4]", 4, 8)), 8, "a is given twice"),
        (r#"{"__metadata__":{"a":1}}"#.to_owned(), 0, "header is not valid: invalid type: integer"),
        (r#"{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":1}}"#.to_owned(), 1, "unknown field `x`"),
    ] {
        let found = refusal(&header, data);
        assert!(found.contains(reason), "{header}: found {found:?}, expected {reason:?}");
    }
}

#[test]
fn a_header_longer_than_its_file_or_the_limit_is_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    for (length, reason) in [
        (16_u64, "header of 16 bytes does not fit in a file of 10: truncated?"),
        (u64::MAX, "header length 18446744073709551615 is over the limit of 100000000"),
    ] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        fs::write(&path, bytes).unwrap();
        assert!(File::open(&path).unwrap_err().to_string().ends_with(reason));
    }
}

#[test]
fn a_name_in_two_files_is_refused() {
    let dir = tempdir().unwrap();
    let paths: Vec<PathBuf> = ["x", "y"].iter().map(|name| dir.path().join(name)).collect();
    for path in &paths {
        write_raw(path, r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1);
    }
    let message = Checkpoint::open(&paths).unwrap_err().to_string();
    assert_eq!(message, format!("{}: tensor a is in {} too", paths[1].display(), paths[0].display()));
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(header in ".{0,200}", length in any::<Option<u64>>(), data in 0_usize..50) {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write_raw(&path, &header, data);
        if let Some(length) = length {
            let mut bytes = fs::read(&path).unwrap();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            fs::write(&path, bytes).unwrap();
        }
        // `{}` is the one header of this alphabet that is likely and legal.
        let legal = header.trim() == "{}";
        prop_assert!(File::open(&path).is_err() || legal);
    }

    #[test]
    fn any_layout_reads_back(sizes in prop::collection::vec((0_u64..40, prop::sample::select(vec![
        Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::F64,
    ])), 1..12)) {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let specs: Vec<_> =
            sizes.iter().enumerate().map(|(index, &(length, dtype))| spec(&index.to_string(), dtype, &[length])).collect();
        let writer = Writer::open(&path, Arc::new(Layout::new(specs.clone()))).unwrap();
        for (index, spec) in specs.iter().enumerate() {
            writer.write_at(index, 0, &vec![index as u8 + 1; spec.bytes() as usize]).unwrap();
        }
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(&[path]).unwrap();
        for (index, spec) in specs.iter().enumerate() {
            let tensor = checkpoint.tensor(&spec.name).unwrap();
            prop_assert_eq!((tensor.info.dtype, &tensor.info.shape), (spec.dtype, &spec.shape));
            prop_assert_eq!(tensor.info.range.start % spec.dtype.size(), 0);
            prop_assert_eq!(tensor.read().unwrap(), vec![index as u8 + 1; spec.bytes() as usize]);
        }
    }
}
