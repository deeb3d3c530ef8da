//! The report of a call for the textfile collector of node_exporter.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use support::{RedisServer, prometheus};
use tempfile::TempDir;

use crate::serve::Agent;
use crate::tool::{Ended, Holder, Notes, PATIENT, Run, bare, is_held, patient, run, tool};

/// The reports in a directory.
struct Reports(TempDir);

impl Reports {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Runs the tool under the key `k` with these options and this command.
    #[track_caller]
    fn run(&self, server: &RedisServer, options: &[&str], command: &[&str]) -> Ended {
        let args = [&["exec", "--textfile", self.text()], options, &["k"], command].concat();
        run(patient(server, &args))
    }

    fn text(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// All files in the directory, also hidden ones.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(format!("shardlock_exec_{name}.prom"))
    }

    fn read(&self) -> Report {
        Report::read(&self.path("k"))
    }
}

/// The values of a report by metric; outcomes by name.
#[derive(Debug)]
struct Report {
    values: BTreeMap<String, f64>,
    outcomes: BTreeMap<String, f64>,
    labels: String,
}

impl Report {
    #[track_caller]
    fn read(path: &Path) -> Self {
        let checked = Command::new(prometheus::promtool())
            .args(["check", "metrics"])
            .stdin(File::open(path).unwrap())
            .output()
            .unwrap();
        assert!(
            checked.status.success() && checked.stdout.is_empty() && checked.stderr.is_empty(),
            "{checked:?}"
        );
        let (mut values, mut outcomes, mut all) = (BTreeMap::new(), BTreeMap::new(), String::new());
        for line in fs::read_to_string(path)
            .unwrap()
            .lines()
            .filter(|line| !line.starts_with('#'))
        {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.strip_suffix('}').unwrap().split_once('{').unwrap();
            let value: f64 = value.parse().unwrap();
            match labels.split_once(",outcome=") {
                Some((_, outcome)) => drop(outcomes.insert(outcome.trim_matches('"').to_owned(), value)),
                None => {
                    let name = name.strip_prefix("shardlock_exec_").unwrap();
                    values.insert(name.to_owned(), value);
                    all = labels.to_owned();
                }
            }
        }
        Self {
            values,
            outcomes,
            labels: all,
        }
    }

    #[track_caller]
    fn value(&self, name: &str) -> f64 {
        *self.values.get(name).unwrap_or_else(|| panic!("no {name} in {self:?}"))
    }

    /// The only outcome.
    #[track_caller]
    fn outcome(&self) -> &str {
        assert_eq!(self.outcomes.len(), 6, "{self:?}");
        let mut set = self.outcomes.iter().filter(|(_, value)| **value == 1.0);
        let (outcome, _) = set.next().expect("an outcome");
        assert!(set.next().is_none(), "{self:?}");
        outcome
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

#[test]
fn report_has_the_times_the_exit_code_and_the_outcome() {
    let (server, reports) = (RedisServer::start(), Reports::new());
    let before = now();
    let ended = reports.run(&server, &[], &["sh", "-c", "sleep 0.2; exit 3"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (3, ""), "{ended:?}");
    assert_eq!(reports.files(), ["shardlock_exec_k.prom"]);
    let report = reports.read();
    assert_eq!(report.labels, "name=\"k\",key=\"k\"");
    assert_eq!((report.outcome(), report.value("exit_status")), ("acquired", 3.0));
    let last = report.value("last_time_seconds");
    assert!(before < last + 0.001 && last < now() + 0.001, "{before} {last}");
    let ran = report.value("duration_seconds");
    assert!((0.2..now() - before).contains(&ran), "{report:?}");
    assert!(
        (0.0..now() - before).contains(&report.value("wait_seconds")),
        "{report:?}"
    );
    // The command has not succeeded yet.
    assert!(!report.values.contains_key("last_success_time_seconds"), "{report:?}");
    // Node_exporter runs as another user.
    let mode = fs::metadata(reports.path("k")).unwrap().permissions().mode();
    assert_eq!(mode & 0o444, 0o444, "{mode:o}");
}

#[test]
fn time_of_the_last_success_outlasts_calls_that_do_not_run_the_command() {
    let (server, reports) = (RedisServer::start(), Reports::new());
    let success = |report: &Report| report.value("last_success_time_seconds");
    assert_eq!(reports.run(&server, &[], &["true"]).code, 0);
    let first = success(&reports.read());

    let holder = Holder::with(&server, &PATIENT, "k");
    assert_eq!(reports.run(&server, &["-n", "-E", "0"], &["true"]).code, 0);
    let busy = reports.read();
    assert_eq!((busy.outcome(), busy.value("exit_status")), ("busy", 0.0));
    assert_eq!((success(&busy), busy.value("duration_seconds")), (first, 0.0));
    assert!(busy.value("last_time_seconds") >= first);

    assert_eq!(reports.run(&server, &["-w", "300ms"], &["true"]).code, 1);
    let late = reports.read();
    assert_eq!((late.outcome(), late.value("exit_status")), ("timeout", 1.0));
    assert!(late.value("wait_seconds") >= 0.3 && success(&late) == first, "{late:?}");
    holder.go();

    assert_eq!(reports.run(&server, &[], &["false"]).code, 1);
    assert_eq!(success(&reports.read()), first);
    assert_eq!(reports.run(&server, &[], &["no-such-command-here"]).code, 127);
    let report = reports.read();
    assert_eq!((report.outcome(), report.value("exit_status")), ("acquired", 127.0));

    server.kill();
    assert_eq!(reports.run(&server, &["-n"], &["true"]).code, 69);
    let report = reports.read();
    assert_eq!((report.outcome(), report.value("exit_status")), ("failed", 69.0));
    assert_eq!(success(&report), first);

    server.restart();
    assert_eq!(reports.run(&server, &[], &["true"]).code, 0);
    assert!(success(&reports.read()) > first);
    assert_eq!(reports.files(), ["shardlock_exec_k.prom"]);
}

#[test]
fn loss_of_the_lock_is_reported() {
    let (server, reports, notes) = (RedisServer::start(), Reports::new(), Notes::new());
    let script = "echo $$ > pid; cat";
    let args = [
        "exec",
        "--ttl",
        "1s",
        "--textfile",
        reports.text(),
        "k",
        "sh",
        "-c",
        script,
    ];
    let mut command = tool(&server, &args);
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    let mut tool = Run::start(command);
    notes.line("pid");
    server.command(&["DEL", "lock:k"]);
    assert_eq!(tool.end().code, 117);
    let report = reports.read();
    assert_eq!((report.outcome(), report.value("exit_status")), ("lost", 117.0));
}

#[test]
fn signal_that_ends_the_wait_is_reported() {
    let (server, reports) = (RedisServer::start(), Reports::new());
    let holder = Holder::with(&server, &PATIENT, "k");
    let mut waiting = Run::start(tool(&server, &["exec", "--textfile", reports.text(), "k", "true"]));
    crate::tool::wait_until_waiting(&server, "k", 1);
    waiting.signal(rustix::process::Signal::TERM);
    assert_eq!(waiting.end().code, 143);
    assert_eq!(reports.read().outcome(), "interrupted");
    holder.go();
}

#[test]
fn lock_of_an_agent_is_reported() {
    let (server, reports) = (RedisServer::start(), Reports::new());
    let agent = Agent::start(&server);
    let exec = |wait| {
        let mut exec = bare(&["exec", "--textfile", reports.text(), "--agent"]);
        exec.arg(&agent.socket).args(["-w", wait, "k", "true"]);
        run(exec).code
    };
    assert_eq!(exec("20s"), 0);
    assert_eq!(reports.read().outcome(), "acquired");
    let holder = Holder::with(&server, &PATIENT, "k");
    assert_eq!(exec("200ms"), 1);
    assert_eq!(reports.read().outcome(), "timeout");
    holder.go();
}

#[test]
fn report_names_of_keys_are_safe_and_distinct() {
    let (server, reports) = (RedisServer::start(), Reports::new());
    let exec = |options: &[&str]| {
        let args = [&["exec", "--textfile", reports.text()], options, &["true"]].concat();
        let ended = run(patient(&server, &args));
        assert_eq!(ended.code, 0, "{ended:?}");
    };
    exec(&["../a \"b\""]);
    exec(&["../a 'b'"]);
    exec(&["-k", "x", "-k", "y"]);
    exec(&["--textfile-name", "backup", "backup:2026-11-30"]);
    let files = reports.files();
    assert_eq!(files.len(), 4, "{files:?}");
    assert!(files.iter().all(|file| !file.contains(['"', '\'', ' '])), "{files:?}");
    let labels: Vec<_> = files
        .iter()
        .map(|file| Report::read(&reports.0.path().join(file)).labels)
        .collect();
    assert!(
        labels[0].ends_with("key=\"../a \\\"b\\\"\"") || labels[1].ends_with("key=\"../a \\\"b\\\"\""),
        "{labels:?}"
    );
    assert_eq!(labels[2], "name=\"backup\",key=\"backup:2026-11-30\"");
    assert!(labels[3].ends_with("key=\"x,y\""), "{labels:?}");

    for name in ["", "a/b", "../a"] {
        let ended = reports.run(&server, &["--textfile-name", name], &["true"]);
        assert_eq!(ended.code, 64, "{name}: {ended:?}");
    }
    let ended = run(tool(&server, &["exec", "--textfile-name", "a", "k", "true"]));
    assert_eq!(ended.code, 64, "{ended:?}");
}

#[test]
fn directory_that_is_missing_is_an_error_before_the_lock_is_taken() {
    let server = RedisServer::start();
    let holder = Holder::with(&server, &PATIENT, "k");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for missing in [dir.path().join("missing"), file] {
        let args = ["exec", "--textfile", missing.to_str().unwrap(), "k", "true"];
        // It does not wait for the lock.
        let ended = run(tool(&server, &args));
        assert_eq!(ended.code, 71, "{ended:?}");
        assert!(
            ended.stderr.contains("--textfile") && ended.stderr.contains(missing.to_str().unwrap()),
            "{ended:?}"
        );
    }
    holder.go();
}

#[test]
fn report_that_can_not_be_written_is_a_warning() {
    let server = RedisServer::start();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("reports");
    fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    let ended = run(tool(
        &server,
        &[
            "exec",
            "--textfile",
            dir,
            "k",
            "sh",
            "-c",
            "rmdir \"$0\" && exit 5",
            dir,
        ],
    ));
    assert_eq!(ended.code, 5, "{ended:?}");
    assert!(
        ended.stderr.contains("is not reported") && ended.stderr.contains(dir),
        "{ended:?}"
    );
    assert!(!is_held(&server, "k"));
}

#[test]
fn number_of_reports_in_a_directory_is_bounded() {
    let (server, reports) = (RedisServer::start(), Reports::new());
    for number in 0..1000 {
        File::create(reports.path(&format!("job-{number}"))).unwrap();
    }
    let ended = reports.run(&server, &[], &["sh", "-c", "exit 5"]);
    assert_eq!(ended.code, 5, "{ended:?}");
    assert!(
        ended.stderr.contains("1000 reports") && ended.stderr.contains("--textfile-name"),
        "{ended:?}"
    );
    assert!(!reports.path("k").exists());
    // A file that is there is replaced.
    let ended = reports.run(&server, &["--textfile-name", "job-7"], &["true"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
    assert_eq!(Report::read(&reports.path("job-7")).outcome(), "acquired");
    assert_eq!(reports.files().len(), 1000);
}
