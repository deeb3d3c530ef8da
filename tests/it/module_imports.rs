//! The modules of the library: none imports another in a circle. No server is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Modules that consist of tests, or that only re-export others.
const LEFT_OUT: &[&str] = &["fuzzing", "lib", "simulation", "tool"];

type Imports = BTreeMap<String, BTreeSet<String>>;

/// The top-level modules of `src/`, each with those that it names.
fn imports() -> Imports {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Imports::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(&root).unwrap();
            let first = relative.iter().next().unwrap().to_str().unwrap();
            let room = first.trim_end_matches(".rs").to_owned();
            let is_test = relative.iter().any(|part| part == "tests" || part == "tests.rs");
            if is_test || LEFT_OUT.contains(&room.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.entry(room).or_default().extend(named(&text));
            }
        }
    }
    let rooms: BTreeSet<String> = found.keys().cloned().collect();
    for (room, others) in &mut found {
        others.retain(|other| other != room && rooms.contains(other));
    }
    found
}

/// The modules that follow `crate::` in code that is not a test.
fn named(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut found = BTreeSet::new();
    for line in lines {
        for after in line.split("crate::").skip(1) {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            found.insert(after[..end.unwrap_or(after.len())].to_owned());
        }
    }
    found
}

/// Takes away what imports nothing that is left, until nothing changes. Returns the rest.
fn in_cycles(mut imports: Imports) -> Imports {
    loop {
        let leaves: Vec<String> = imports
            .iter()
            .filter(|(_, others)| others.is_empty())
            .map(|(room, _)| room.clone())
            .collect();
        if leaves.is_empty() {
            return imports;
        }
        for leaf in leaves {
            imports.remove(&leaf);
            for others in imports.values_mut() {
                others.remove(&leaf);
            }
        }
    }
}

#[test]
fn modules_have_no_import_cycles() {
    let imports = imports();
    assert!(
        imports.len() > 20 && imports["driver"].contains("engine"),
        "{imports:?}"
    );
    let left = in_cycles(imports);
    assert!(left.is_empty(), "circles among these, or below them: {left:#?}");
}

#[test]
fn engine_imports_no_store_and_no_driver() {
    let imports = imports();
    for other in ["driver", "manager", "request", "store", "telemetry"] {
        assert!(!imports["engine"].contains(other), "engine imports {other}");
    }
}

#[test]
fn import_cycles_are_found() {
    let text =
        "use crate::b::B;\n// crate::no\nfn f() { crate::c::g(crate::d) }\n#[cfg(test)]\nmod tests { use crate::no; }";
    assert_eq!(named(text).into_iter().collect::<Vec<_>>(), ["b", "c", "d"]);
    let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let imports = Imports::from([
        ("a".to_owned(), set(&["b"])),
        ("b".to_owned(), set(&["c"])),
        ("c".to_owned(), set(&["b"])),
        ("d".to_owned(), set(&[])),
    ]);
    assert_eq!(in_cycles(imports).len(), 3);
}
