//! Which tensors are taken for encoded weights, and what is refused.

use std::path::Path;
use std::sync::Arc;

use qpack_core::Dtype;
use qpack_core::encoded::{fp8, mxfp4};
use qpack_core::safetensors::{Checkpoint, Layout, TensorSpec, Writer};

/// A file of tensors `a` and `b`, all zero bytes.
fn file(path: &Path, a: (Dtype, &[u64]), b: (Dtype, &[u64])) -> Checkpoint {
    let spec = |name: &str, (dtype, shape): (Dtype, &[u64])| TensorSpec {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let writer = Writer::open(path, Arc::new(Layout::new(vec![spec("a", a), spec("b", b)]))).unwrap();
    writer.finish().unwrap();
    Checkpoint::open(&[path.to_owned()]).unwrap()
}

fn open_fp8(a: (Dtype, &[u64]), b: (Dtype, &[u64]), block: Option<[u64; 2]>) -> Result<(), String> {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = file(&directory.path().join("file"), a, b);
    let (codes, scales) = (checkpoint.tensor("a").unwrap(), checkpoint.tensor("b").unwrap());
    let opened = fp8::Weight::open(codes, scales, block).and_then(|weight| weight.read_scales());
    opened.map(|_| ()).map_err(|error| error.to_string().rsplit_once("file: ").unwrap().1.to_owned())
}

fn open_mxfp4(a: (Dtype, &[u64]), b: (Dtype, &[u64])) -> Result<Vec<u64>, String> {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = file(&directory.path().join("file"), a, b);
    let shape = mxfp4::shape(checkpoint.tensor("a").unwrap(), checkpoint.tensor("b").unwrap());
    shape.map_err(|error| error.to_string().rsplit_once("file: ").unwrap().1.to_owned())
}

#[test]
fn fp8_weights_and_their_scales() {
    let block = Some([128, 128]);
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8E8M0, Dtype::U8] {
        assert_eq!(open_fp8((Dtype::F8E4M3, &[576, 200]), (dtype, &[5, 2]), block), Ok(()));
        assert_eq!(open_fp8((Dtype::F8E4M3, &[3, 128, 130]), (dtype, &[3, 1, 2]), block), Ok(()));
        assert_eq!(open_fp8((Dtype::F8E4M3, &[576, 200]), (dtype, &[]), None), Ok(()));
        assert_eq!(open_fp8((Dtype::F8E4M3, &[3, 64, 64]), (dtype, &[1]), None), Ok(()));
    }
    let refused = [
        (Dtype::F8E5M2, vec![128, 128], Dtype::F32, vec![1, 1], block, "tensor a: is F8_E5M2, expected F8_E4M3"),
        (
            Dtype::F8E4M3,
            vec![128],
            Dtype::F32,
            vec![1],
            block,
            "tensor a: has shape [128], expected at least two dimensions",
        ),
        (
            Dtype::F8E4M3,
            vec![0, 128],
            Dtype::F32,
            vec![0, 1],
            block,
            "tensor a: has shape [0, 128] in blocks of [128, 128], expected no dimension of 0",
        ),
        (
            Dtype::F8E4M3,
            vec![128, 128],
            Dtype::F32,
            vec![1, 1],
            Some([0, 128]),
            "tensor a: has shape [128, 128] in blocks of [0, 128], expected no dimension of 0",
        ),
        (
            Dtype::F8E4M3,
            vec![128, 128],
            Dtype::I32,
            vec![1, 1],
            block,
            "tensor b: is I32, expected F32, BF16, F16, F8_E8M0 or U8",
        ),
        (
            Dtype::F8E4M3,
            vec![576, 200],
            Dtype::F32,
            vec![2, 5],
            block,
            "tensor b: has shape [2, 5], expected [5, 2] for blocks of 128x128 of a of shape [576, 200]",
        ),
        (
            Dtype::F8E4M3,
            vec![128, 128],
            Dtype::F32,
            vec![2],
            None,
            "tensor b: has shape [2], expected a single scale for a",
        ),
    ];
    for (dtype, shape, scale_dtype, scale_shape, block, reason) in refused {
        let opened = open_fp8((dtype, &shape), (scale_dtype, &scale_shape), block);
        assert_eq!(opened, Err(reason.to_owned()));
    }
}

fn bytes(shape: &[u64]) -> (Dtype, &[u64]) {
    (Dtype::U8, shape)
}

#[test]
fn mxfp4_weights_and_their_scales() {
    assert_eq!(open_mxfp4(bytes(&[2, 6, 3, 16]), bytes(&[2, 6, 3])), Ok(vec![2, 6, 96]));
    assert_eq!(open_mxfp4(bytes(&[6, 3, 16]), bytes(&[6, 3])), Ok(vec![6, 96]));
    let expected = "expected [.., out_features, in_features / 32, 16]";
    for shape in [&[][..], &[16], &[3, 16], &[2, 6, 3, 8]] {
        let opened = open_mxfp4(bytes(shape), bytes(&[1]));
        assert_eq!(opened, Err(format!("tensor a: has shape {shape:?}, {expected}")));
    }
    let opened = open_mxfp4(bytes(&[2, 6, 3, 16]), bytes(&[2, 3, 6]));
    assert_eq!(opened, Err("tensor b: has shape [2, 3, 6], expected [2, 6, 3] for a".to_owned()));
    let opened = open_mxfp4((Dtype::I8, &[6, 3, 16]), bytes(&[6, 3]));
    assert_eq!(opened, Err("tensor a: is I8, expected U8".to_owned()));
    let opened = open_mxfp4(bytes(&[6, 3, 16]), (Dtype::F32, &[6, 3]));
    assert_eq!(opened, Err("tensor b: is F32, expected U8".to_owned()));
}
