//! docs/integrations.md shows the code of the programs.

const GUIDE: &str = include_str!("../../../../docs/integrations.md");

const PROGRAMS: &[&str] = &[
    include_str!("../../src/bin/apalis_worker.rs"),
    include_str!("../../src/bin/axum_postgres.rs"),
    include_str!("../../src/bin/cron_scheduler.rs"),
    include_str!("../../src/bin/lapin_consumer.rs"),
    include_str!("../../src/bin/opentelemetry.rs"),
];

/// The text without indentation, which differs between a function and a guide.
fn unindented(text: &str) -> String {
    text.lines().map(str::trim_start).collect::<Vec<_>>().join("\n")
}

#[test]
fn guide_shows_code_of_every_program() {
    let programs: Vec<String> = PROGRAMS.iter().map(|text| unindented(text)).collect();
    let mut is_shown = vec![false; programs.len()];
    for after in GUIDE.split("```rust\n").skip(1) {
        let block = unindented(after.split("```").next().unwrap());
        let found = programs.iter().position(|program| program.contains(block.trim_end()));
        let Some(index) = found else {
            panic!("no program has this code:\n{block}");
        };
        is_shown[index] = true;
    }
    assert!(is_shown.iter().all(|shown| *shown), "{is_shown:?}");
}
