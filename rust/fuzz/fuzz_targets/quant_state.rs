//! A quant state of any bytes is refused, or describes tensors whose sizes can be counted, and reads back as it is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qpack_core::Dtype;
use qpack_core::quant_state::QuantState;

fuzz_target!(|json: &[u8]| {
    let Ok(state) = QuantState::parse(json) else { return };
    let tensors = state.tensors("w", Dtype::U8);
    assert_eq!(tensors[0].bytes(), state.elements().div_ceil(2));
    for tensor in &tensors {
        assert!(tensor.bytes() > 0);
    }
    if state.nested_offset.is_none_or(f32::is_finite) {
        let again = QuantState::parse(&state.to_json()).expect("what is written is read");
        assert_eq!(again, state);
    }
});
