//! The documents: links resolve, the README stays short, lines stay narrow and their English plain.
//! No server is needed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The widest line of prose or comment, in characters.
const COLUMNS_MAX: usize = 100;

const README_WORDS_MAX: usize = 1000;

/// The README shows Rust before this line.
const README_RUST_BEFORE: usize = 40;

/// Folders whose files are generated or not written here.
const SKIPPED: &[&str] = &[
    "target",
    "corpus",
    "artifacts",
    "coverage",
    "node_modules",
    "__pycache__",
];

/// Hidden folders that belong to the repository. All others are skipped.
const HIDDEN: &[&str] = &[".cargo", ".ci", ".github"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All text files of the repository, with paths relative to its root.
fn files() -> Vec<(PathBuf, String)> {
    let (mut found, mut folders) = (Vec::new(), vec![root().to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let is_hidden = name.starts_with('.') && !HIDDEN.contains(&name.as_str());
            if is_hidden || name.starts_with("mutants.out") {
                continue;
            }
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
                folders.push(entry.path());
            } else if kind.is_file()
                && let Ok(text) = fs::read_to_string(entry.path())
            {
                found.push((entry.path().strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

fn markdown() -> Vec<(PathBuf, String)> {
    let mut found = files();
    found.retain(|(path, _)| has_extension(path, "md"));
    assert!(found.len() > 10, "{found:?}");
    found
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// The lines of a Markdown document outside of code blocks, numbered from 1.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let (mut found, mut is_fenced) = (Vec::new(), false);
    // An indented line continues a paragraph, unless it follows an empty line or other code.
    let mut may_be_code = true;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
            continue;
        }
        let is_code = is_fenced || may_be_code && line.starts_with("    ");
        may_be_code = is_code || line.trim().is_empty();
        if !is_code {
            found.push((index + 1, line));
        }
    }
    found
}

/// The line without the contents of inline code, in which nothing is a link.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("``")
}

/// The targets of the links and images in a line.
fn targets(line: &str) -> Vec<String> {
    let line = without_code(line);
    let parts = line.split("](").skip(1);
    parts
        .filter_map(|part| Some(part.split_once(')')?.0.to_owned()))
        .collect()
}

/// The anchors that GitHub gives to the headings of a document.
fn anchors(text: &str) -> Vec<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let headings = prose(text)
        .into_iter()
        .filter(|(_, line)| line.trim_start_matches('#').starts_with(' ') && line.starts_with('#'));
    headings
        .map(|(_, line)| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title
                .chars()
                .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
            let earlier = seen.entry(anchor.clone()).or_default();
            *earlier += 1;
            match *earlier {
                1 => anchor,
                nth => format!("{anchor}-{}", nth - 1),
            }
        })
        .collect()
}

/// Why a link of a document leads nowhere.
fn broken(from: &Path, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = target
        .split_once('#')
        .map_or((target, None), |(path, anchor)| (path, Some(anchor)));
    let file = match path {
        "" => root().join(from),
        path => root().join(from).parent().unwrap().join(path),
    };
    if !file.exists() {
        return Some(format!("{}: {target}: there is no such file", from.display()));
    }
    let anchor = anchor?;
    let text = fs::read_to_string(&file).unwrap();
    let known = anchors(&text);
    (!known.iter().any(|known| known == anchor))
        .then(|| format!("{}: {target}: there is no such heading, only {known:?}", from.display()))
}

#[test]
fn links_of_documents_resolve() {
    let (mut found, mut count) = (Vec::new(), 0);
    for (path, text) in markdown() {
        for (_, line) in prose(&text) {
            for target in targets(line) {
                count += 1;
                found.extend(broken(&path, &target));
            }
        }
    }
    assert!(count > 50, "only {count} links were found");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Code, configuration and documents also name pages without a link.
#[test]
fn pages_that_are_named_anywhere_exist() {
    let (mut found, mut count) = (Vec::new(), 0);
    for (path, text) in files() {
        for after in text.split("docs/").skip(1) {
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let name = after.split(|c| !is_name(c)).next().unwrap().trim_end_matches('.');
            if name.ends_with(".md") {
                count += 1;
                if !root().join("docs").join(name).exists() {
                    found.push(format!("{}: docs/{name}", path.display()));
                }
            }
        }
    }
    assert!(count > 10, "only {count} pages are named");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn readme_is_short_and_shows_code_early() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let words = readme.split_whitespace().count();
    assert!(
        words <= README_WORDS_MAX,
        "README.md has {words} words; move some to docs/"
    );
    let first = readme.lines().position(|line| line.starts_with("```rust")).unwrap() + 1;
    assert!(first < README_RUST_BEFORE, "the first Rust is at line {first}");
}

/// The characters of a line of prose that can be wrapped: a link's target can't.
fn width_of_prose(line: &str) -> usize {
    let is_one_link = line.trim_start_matches('!').starts_with('[') && line.ends_with(')');
    if line.starts_with('|') || is_one_link {
        return 0;
    }
    let hidden: usize = targets(line).iter().map(|target| target.chars().count()).sum();
    line.chars().count() - hidden
}

fn is_comment(path: &Path, line: &str) -> bool {
    let line = line.trim_start();
    let is_makefile = path.file_name().is_some_and(|name| name == "Makefile");
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => line.starts_with("//"),
        Some("lua") => line.starts_with("--"),
        Some("toml" | "sh" | "yml") => line.starts_with('#'),
        // The scripts have no extension.
        None => (is_makefile || path.starts_with("scripts") || path.starts_with(".ci")) && line.starts_with('#'),
        Some(_) => false,
    }
}

#[test]
fn lines_of_prose_and_comments_are_at_most_100_columns_wide() {
    let (mut found, mut count) = (Vec::new(), 0);
    let mut check = |path: &Path, number: usize, width: usize| {
        count += 1;
        if width > COLUMNS_MAX {
            found.push(format!("{}:{number}: {width} columns", path.display()));
        }
    };
    for (path, text) in files() {
        if has_extension(&path, "md") {
            for (number, line) in prose(&text) {
                check(&path, number, width_of_prose(line));
            }
        } else {
            for (index, line) in text.lines().enumerate().filter(|(_, line)| is_comment(&path, line)) {
                // The rows of a table in rustdoc can't be wrapped.
                let is_row = line.trim_start().trim_start_matches(['/', '!', ' ']).starts_with('|');
                check(&path, index + 1, if is_row { 0 } else { line.chars().count() });
            }
        }
    }
    assert!(count > 5000, "only {count} lines were found");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Phrases that are no technical English, or mean something else there.
const PHRASES: &[&str] = &[
    "all the same",
    "are told",
    "be had",
    "given back",
    "goes on",
    "in vain",
    "in words",
    "is had",
    "is told",
    "let go",
    "of no use",
    "of no worth",
    "so many that",
    "stands still",
    "was had",
    "whoever",
    "who asks",
];

/// Whether the line has the phrase, between other words.
fn has_phrase(line: &str, phrase: &str) -> bool {
    let line = line.to_lowercase();
    let is_inside = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(phrase).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + phrase.len()..]);
        !is_inside(before.chars().next_back()) && !is_inside(after.chars().next())
    })
}

#[test]
fn prose_and_comments_are_plain_english() {
    let mut found = Vec::new();
    let mut check = |path: &Path, number: usize, line: &str| {
        for phrase in PHRASES.iter().filter(|phrase| has_phrase(line, phrase)) {
            found.push(format!("{}:{number}: {phrase:?}", path.display()));
        }
    };
    for (path, text) in files() {
        if has_extension(&path, "md") {
            for (number, line) in prose(&text) {
                check(&path, number, &without_code(line));
            }
        } else {
            // Users read all of the rules: their alerts are sent to them.
            let is_read = |line: &str| path.ends_with("alerts.rules.yml") || is_comment(&path, line);
            for (index, line) in text.lines().enumerate().filter(|(_, line)| is_read(line)) {
                check(&path, index + 1, &without_code(line));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The fenced blocks of a document in this language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    let after = text.split(&fence[..]).skip(1);
    after.map(|text| text.split("```").next().unwrap()).collect()
}

#[test]
fn manifests_in_the_guide_to_deployment_are_valid_and_mount_what_they_use() {
    use saphyr::{LoadableYamlNode, YamlOwned};

    let guide = fs::read_to_string(root().join("docs/deployment.md")).unwrap();
    let manifests = blocks(&guide, "yaml");
    assert_eq!(manifests.len(), 2);
    for text in manifests {
        let documents = YamlOwned::load_from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let [manifest] = &documents[..] else {
            panic!("not one document: {text}")
        };
        for key in ["apiVersion", "kind", "metadata", "spec"] {
            assert!(manifest.as_mapping_get(key).is_some(), "no {key}: {text}");
        }
        let file = text.split("SHARDLOCK_PASSWORD_FILE, value: ").nth(1).unwrap();
        let file = file.split('}').next().unwrap();
        let mount = text.split("mountPath: ").nth(1).unwrap().split(',').next().unwrap();
        assert!(file.starts_with(&format!("{mount}/")), "{file} is not in {mount}");
    }
    let workflow = fs::read_to_string(root().join(".github/workflows/ci.yml")).unwrap();
    let workflow = YamlOwned::load_from_str(&workflow).unwrap();
    assert!(workflow[0].as_mapping_get("jobs").is_some());
}

#[cfg(feature = "file")]
#[test]
fn settings_in_the_guide_to_credentials_are_valid() {
    let guide = fs::read_to_string(root().join("docs/credentials.md")).unwrap();
    let settings = blocks(&guide, "toml");
    assert_eq!(settings.len(), 1);
    let config = shardlock::config::Config::from_toml(settings[0]).unwrap();
    config.validate().unwrap();
}

/// Each variable of the environment that is named anywhere is one that exists.
#[test]
fn variables_in_guides_are_settings() {
    let known: Vec<String> = shardlock::tool::fields()
        .map(|(name, _)| format!("SHARDLOCK_{}", name.to_uppercase()))
        .chain(["CONFIG", "LOG", "METRICS", "REDIS_SERVER", "ETCD_SERVER"].map(|name| format!("SHARDLOCK_{name}")))
        .chain(["AGENT", "AGENT_PASSWORD", "AGENT_PASSWORD_FILE"].map(|name| format!("SHARDLOCK_{name}")))
        .collect();
    for name in [
        "getting-started",
        "credentials",
        "deployment",
        "cron",
        "coming-from",
        "upgrading",
        "failures",
    ] {
        let guide = fs::read_to_string(root().join(format!("docs/{name}.md"))).unwrap();
        for after in guide.split("SHARDLOCK_").skip(1) {
            let is_name = |c: char| c.is_ascii_uppercase() || c == '_';
            let variable = after.split(|c| !is_name(c)).next().unwrap();
            let variable = format!("SHARDLOCK_{variable}");
            // `SHARDLOCK_*` stands for all of them.
            let is_known = variable == "SHARDLOCK_" || known.contains(&variable);
            assert!(is_known, "docs/{name}.md: {variable}");
        }
    }
}

#[test]
fn checks_of_documents_find_what_is_wrong() {
    let text = "# A `b`: c_d\n\ntext `[no](link)` [one](x.md#y), ![two](z.svg)\n\n    [code](in.md)\n\n## A b c_d\n```\n# no\n```\n# A b c_d\n";
    assert_eq!(anchors(text), ["a-b-c_d", "a-b-c_d-1", "a-b-c_d-2"]);
    let found: Vec<String> = prose(text).into_iter().flat_map(|(_, line)| targets(line)).collect();
    assert_eq!(found, ["x.md#y", "z.svg"]);
    let from = Path::new("docs/shard-map.md");
    assert!(broken(from, "../README.md").is_none() && broken(from, "#the-shard-map").is_none());
    assert!(broken(from, "none.md").is_some() && broken(from, "../README.md#nowhere").is_some());
    assert!(has_phrase("so it Goes on.", "goes on") && !has_phrase("it goes once", "goes on"));
    assert_eq!(width_of_prose("see [this](a/long/path)"), "see [this]()".len());
    assert_eq!(width_of_prose("| a table |"), 0);
    assert!(is_comment(Path::new("src/lib.rs"), "    // yes") && !is_comment(Path::new("src/lib.rs"), "let no; // no"));
}
