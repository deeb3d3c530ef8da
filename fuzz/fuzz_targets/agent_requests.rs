#![no_main]
// Included files use a part of each other.
#![allow(dead_code)]

// The tool has no library, so its files are included by path.
#[path = "../../cli/src/serve/command.rs"]
mod command;
#[path = "../../cli/src/serve/command_table.rs"]
mod command_table;
#[path = "../../cli/src/serve/fuzzing.rs"]
mod fuzzing;
#[path = "../../cli/src/serve/requests.rs"]
mod requests;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzing::agent_requests(data));
