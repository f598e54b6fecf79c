#![no_main]

#[path = "../parsers.rs"]
#[expect(dead_code, reason = "each target uses one of them")]
mod parsers;

libfuzzer_sys::fuzz_target!(|data: &[u8]| parsers::names(data));
