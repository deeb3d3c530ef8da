#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shardlock::fuzzing::shard_maps(data));
