//! The program `throughline`.

use std::process::ExitCode;

fn main() -> ExitCode {
    throughline_platform::main()
}
