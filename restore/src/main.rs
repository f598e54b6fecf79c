//! `highwater-restore`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    highwater_restore::commands::main()
}
