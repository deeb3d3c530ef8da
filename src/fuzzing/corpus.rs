//! Runs the corpus of a target in `fuzz/`, for the tests of the library and of the tool.

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

/// The folder of the fuzz targets, or `None` in a published package, which does not contain it.
pub(crate) fn fuzz() -> Option<PathBuf> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    if package.join(".cargo_vcs_info.json").exists() {
        return None;
    }
    // The tool's package is a directory below it.
    let mut places = package.ancestors().map(|place| place.join("fuzz"));
    let found = places.find(|place| place.is_dir());
    Some(found.unwrap_or_else(|| panic!("{} has no fuzz targets", package.display())))
}

/// Runs the corpus of a target.
pub(crate) fn run(target: &str, check: fn(&[u8])) {
    let Some(fuzz) = fuzz() else { return };
    let corpus = fuzz.join("corpus").join(target);
    let inputs = names_in(&corpus);
    assert!(!inputs.is_empty(), "{target} has no corpus");
    for input in inputs {
        let path = corpus.join(input);
        let data = fs::read(&path).unwrap();
        assert!(
            catch_unwind(|| check(&data)).is_ok(),
            "{} does not hold",
            path.display()
        );
    }
}

/// The names of all files in a folder, sorted.
pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
