#![no_main]

// The tool has no library, so its files are included by path.
#[path = "../../cli/src/load/counters.rs"]
#[allow(unreachable_pub)]
mod counters;
#[path = "../../cli/src/load/fuzzing.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzing::metrics_page(data));
