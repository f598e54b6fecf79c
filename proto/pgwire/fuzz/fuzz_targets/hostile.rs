#![no_main]

#[path = "../hostile.rs"]
#[expect(dead_code, reason = "the test in every run uses the rest")]
mod hostile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = hostile::hostile(data);
});
