//! An index of any bytes is refused, or names files that lie in its own directory.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use qpack_core::safetensors::parse_index;

fuzz_target!(|json: &[u8]| {
    let Ok(placed) = parse_index(json) else { return };
    assert!(!placed.is_empty());
    for file in placed.values() {
        assert_eq!(Path::new(file).file_name(), Some(file.as_ref()));
        assert_eq!(Path::new("/model").join(file).parent(), Some(Path::new("/model")));
    }
});
