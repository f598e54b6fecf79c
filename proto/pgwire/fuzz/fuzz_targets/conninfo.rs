#![no_main]

use highwater_pgwire::{ConnInfo, Environment};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(info) = ConnInfo::resolve_in(Some(text), &Environment::empty()) {
        let _ = info.describe();
    }
});
