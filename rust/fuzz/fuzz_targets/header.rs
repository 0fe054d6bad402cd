//! A safetensors header of any bytes is refused, or its tensors fill the data without holes or overlaps.
//!
//! The first eight bytes of the input say how long the data is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qpack_core::safetensors::parse_header;

fuzz_target!(|input: &[u8]| {
    let Some((length, json)) = input.split_first_chunk() else { return };
    let data_len = u64::from_le_bytes(*length);
    let Ok(tensors) = parse_header(json, data_len) else { return };
    let mut end = 0;
    for tensor in &tensors {
        assert_eq!(tensor.range.start, end);
        assert_eq!(tensor.elements() * tensor.dtype.size(), tensor.bytes());
        end = tensor.range.end;
    }
    assert_eq!(end, data_len);
    let mut names: Vec<_> = tensors.iter().map(|tensor| &tensor.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), tensors.len());
});
