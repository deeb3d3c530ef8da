#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardlock::fuzzing::owner_tags(data));
