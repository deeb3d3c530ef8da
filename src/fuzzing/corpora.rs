//! Runs the corpora of the fuzz targets through the same functions.

use std::fs;

use super::corpus::{fuzz, names_in, run};

/// Defines a test for each target, and the list of all targets.
macro_rules! targets {
    ($($(#[$cfg:meta])? $target:ident => $test:ident,)*) => {
        $(
            $(#[$cfg])?
            #[test]
            fn $test() {
                run(stringify!($target), super::$target);
            }
        )*

        const TARGETS: &[&str] = &[$(stringify!($target)),*];
    };
}

targets! {
    #[cfg(feature = "etcd")]
    etcd => corpus_of_etcd_holds,
    names => corpus_of_names_holds,
    owner_tags => corpus_of_owner_tags_holds,
    places => corpus_of_places_holds,
    printable => corpus_of_printable_holds,
    pushes => corpus_of_pushes_holds,
    refusals => corpus_of_refusals_holds,
    replies => corpus_of_replies_holds,
    settings => corpus_of_settings_holds,
    shard_maps => corpus_of_shard_maps_holds,
    #[cfg(feature = "file")]
    toml => corpus_of_toml_holds,
    urls => corpus_of_urls_holds,
}

/// Targets whose properties are about the tool, which has a test of its own.
const OF_THE_TOOL: [&str; 2] = ["agent_requests", "metrics_page"];

/// A target missing from one of these places would be fuzzed but not tested, or neither.
#[test]
fn each_fuzz_target_has_a_program_a_corpus_and_a_test() {
    let Some(fuzz) = fuzz() else { return };
    let mut targets = [TARGETS, &OF_THE_TOOL].concat();
    targets.sort_unstable();
    assert_eq!(names_in(&fuzz.join("corpus")), targets);
    let programs: Vec<String> = targets.iter().map(|target| format!("{target}.rs")).collect();
    assert_eq!(names_in(&fuzz.join("fuzz_targets")), programs);
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let readme = fs::read_to_string(fuzz.join("README.md")).unwrap();
    for target in targets {
        assert!(
            manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")),
            "{target}"
        );
        assert!(readme.contains(&format!("| `{target}` |")), "{target}");
    }
}
