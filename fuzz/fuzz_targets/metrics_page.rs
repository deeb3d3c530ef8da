#![no_main]

// The tool is no library, so its files are taken by their paths.
#[path = "../../src/bin/shardlock/load/counters.rs"]
#[allow(unreachable_pub)]
mod counters;
#[path = "../../src/bin/shardlock/load/fuzzing.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzing::metrics_page(data));
