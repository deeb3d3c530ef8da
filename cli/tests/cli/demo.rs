//! The demo, from its start to its cleanup.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use support::process::Process;
use support::{RedisServer, server, wait_until};
use tempfile::TempDir;

use crate::tool::bare;

/// Longer than any demo here takes on a loaded machine.
const DEMO_TIMEOUT: Duration = Duration::from_secs(60);

/// The number of child processes of a demo with two workers that starts its own servers.
const CHILDREN: usize = 5;

/// A running demo with its own directory for temporary files.
struct Demo {
    process: Process,
    temp: TempDir,
    /// The first lines of its output, written once everything is set up.
    introduction: String,
    stdout: JoinHandle<String>,
    stderr: File,
}

/// The number of child processes of a load with two workers: it has three more servers, which form
/// a quorum.
const CHILDREN_OF_A_LOAD: usize = CHILDREN + 3;

/// How a demo ended.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Demo {
    /// Starts a small demo and waits until it is set up.
    fn start(args: &[&str]) -> Self {
        Self::start_with(&[&["--json"], args].concat())
    }

    fn start_with(args: &[&str]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let stderr = tempfile::tempfile().unwrap();
        let mut command = bare(&["demo", "--processes", "2", "--tasks", "32", "--keys", "50"]);
        command
            .args(args)
            .env("SHARDLOCK_REDIS_SERVER", &server::binary().path)
            .env("TMPDIR", temp.path())
            .stdout(Stdio::piped())
            .stderr(stderr.try_clone().unwrap());
        let mut process = Process::spawn(command).unwrap();
        let mut stdout = BufReader::new(process.take_stdout().unwrap());
        let mut introduction = String::new();
        for _ in 0..2 {
            stdout.read_line(&mut introduction).unwrap();
        }
        Self {
            process,
            temp,
            introduction,
            stdout: read_on_a_thread(stdout),
            stderr,
        }
    }

    /// The process ids of all descendants, each with its command line.
    fn descendants(&self) -> Vec<(Pid, String)> {
        self.process.descendants()
    }

    /// Waits for the demo to end, and checks that neither these processes nor any file is left.
    fn end_without_a_trace(mut self, descendants: &[(Pid, String)]) -> Ended {
        let status = self.process.wait(DEMO_TIMEOUT);
        for (pid, words) in descendants {
            assert!(test_kill_process(*pid).is_err(), "{words} still runs");
        }
        assert_eq!(fs::read_dir(self.temp.path()).unwrap().count(), 0);
        let mut stderr = String::new();
        self.stderr.rewind().unwrap();
        self.stderr.read_to_string(&mut stderr).unwrap();
        Ended {
            code: status.code(),
            stdout: self.introduction + &self.stdout.join().unwrap(),
            stderr,
        }
    }
}

impl Ended {
    /// The figures of a completed demo, after checking those that must hold in every run.
    #[track_caller]
    fn figures(&self) -> Value {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        let figures: Value = serde_json::from_str(self.stdout.lines().last().unwrap()).unwrap();
        assert!(number(&figures, "/unlocked/claimed") > 10.0, "{figures}");
        assert_eq!(number(&figures, "/locked/claimed"), 10.0, "{figures}");
        assert_eq!(number(&figures, "/locked/left"), 0.0, "{figures}");
        assert_eq!(number(&figures, "/locked/token_regressions"), 0.0, "{figures}");
        let calls = number(&figures, "/partner/calls");
        assert!(number(&figures, "/partner/without_permits/refused") > 0.0, "{figures}");
        assert!(
            number(&figures, "/partner/without_permits/most_at_once") > 10.0,
            "{figures}"
        );
        assert_eq!(number(&figures, "/partner/with_permits/served"), calls, "{figures}");
        assert!(
            number(&figures, "/partner/with_permits/most_at_once") <= 10.0,
            "{figures}"
        );
        assert!(number(&figures, "/jobs/completed") > 0.0, "{figures}");
        assert_eq!(number(&figures, "/jobs/lost_updates"), 0.0, "{figures}");
        assert_eq!(number(&figures, "/jobs/token_regressions"), 0.0, "{figures}");
        figures
    }
}

fn number(figures: &Value, pointer: &str) -> f64 {
    let number = figures.pointer(pointer).and_then(Value::as_f64);
    number.unwrap_or_else(|| panic!("{pointer} is no number in {figures}"))
}

fn read_on_a_thread(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    })
}

#[test]
fn coupons_are_claimed_too_often_without_the_lock_and_never_with_it() {
    // Both processes run at the same time for a while, even if one starts a second late.
    let demo = Demo::start(&["--seconds", "3"]);
    let descendants = demo.descendants();
    assert_eq!(descendants.len(), CHILDREN, "{descendants:?}");
    let ended = demo.end_without_a_trace(&descendants);
    let figures = ended.figures();

    let paths = ["uncontended", "local", "remote"].map(|path| number(&figures, &format!("/jobs/paths/{path}")));
    assert!(paths.iter().all(|&count| count > 0.0), "{figures}");
    assert_eq!(
        paths.iter().sum::<f64>(),
        number(&figures, "/jobs/completed"),
        "{figures}"
    );
    let waits = ["p50", "p99", "max"].map(|wait| number(&figures, &format!("/jobs/wait_ms/{wait}")));
    assert!(waits.is_sorted() && waits[2] > 0.0, "{figures}");
    assert!(number(&figures, "/jobs/publishes_per_lock") > 0.0, "{figures}");
    // A lock needs at most two round trips, one of which is a script. Renewals and the like are
    // added to these.
    let (scripts, requests) = (
        number(&figures, "/jobs/script_calls_per_lock"),
        number(&figures, "/jobs/store_requests_per_lock"),
    );
    assert!(
        scripts > 0.0 && scripts <= requests + 0.1 && requests < 3.0,
        "{figures}"
    );
}

#[test]
fn given_servers_keep_their_own_keys_and_none_of_the_demo() {
    let servers = [RedisServer::start(), RedisServer::start()];
    for server in &servers {
        server.command(&["SET", "demo:mine", "stays"]);
    }
    let urls = servers.each_ref().map(RedisServer::url);
    // It still runs when the test looks at its processes.
    let demo = Demo::start(&["--seconds", "2", "--shard", &urls[0], "--shard", &urls[1]]);
    let descendants = demo.descendants();
    assert_eq!(descendants.len(), 2, "{descendants:?}");
    demo.end_without_a_trace(&descendants).figures();
    for server in &servers {
        assert_eq!(server.keys(), ["demo:mine"]);
        assert!(server.script_calls() > 0, "the server was not used");
    }
}

#[test]
fn a_demo_that_is_interrupted_on_given_servers_leaves_no_key() {
    let server = RedisServer::start();
    let demo = Demo::start(&["--seconds", "30", "--shard", &server.url()]);
    let descendants = demo.descendants();
    let jobs_run = || server.keys().iter().any(|key| key.ends_with(":q"));
    wait_until("tasks wait for locks", DEMO_TIMEOUT, jobs_run);
    demo.process.signal(Signal::TERM);
    let ended = demo.end_without_a_trace(&descendants);
    assert_eq!(ended.code, Some(143), "{}", ended.stderr);
    assert_eq!(server.keys(), [""; 0]);
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing() {
    let demo = Demo::start(&["--seconds", "30"]);
    let descendants = demo.descendants();
    assert_eq!(descendants.len(), CHILDREN, "{descendants:?}");
    demo.process.signal(Signal::INT);
    let ended = demo.end_without_a_trace(&descendants);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert!(ended.stderr.contains("stopped by SIGINT"), "{}", ended.stderr);
}

#[test]
fn load_runs_until_stopped_and_lists_its_metrics_endpoints() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("targets.json");
    let demo = Demo::start_with(&["--load", "--targets", file.to_str().unwrap()]);
    let descendants = demo.descendants();
    assert_eq!(descendants.len(), CHILDREN_OF_A_LOAD, "{descendants:?}");

    let groups: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let targets = groups[0]["targets"].as_array().unwrap();
    assert_eq!((groups.as_array().unwrap().len(), targets.len()), (1, 2), "{groups}");
    for target in targets {
        let address = target.as_str().unwrap();
        wait_until("locks of every class are acquired and handed off", DEMO_TIMEOUT, || {
            let page = get(address, "/metrics");
            let classes = ["jobs", "sale", "reports", "cron", "default", "prices", "mail"];
            let is_had = |class: &str| counted(&page, &[&format!("class=\"{class}\""), "outcome=\"acquired\""]) > 0.0;
            let is_handed =
                |kind: &str| counted(&page, &["shardlock_hand_offs_total{", &format!("kind=\"{kind}\"")]) > 0.0;
            let has_mode = |mode: &str| counted(&page, &[&format!("mode=\"{mode}\",outcome=\"acquired\"")]) > 0.0;
            classes.into_iter().all(is_had)
                && ["exclusive", "shared", "permits"].into_iter().all(has_mode)
                && ["local", "remote"].into_iter().all(is_handed)
                && counted(&page, &["outcome=\"timeout\""]) > 0.0
        });
    }
    demo.process.signal(Signal::INT);
    let ended = demo.end_without_a_trace(&descendants);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

/// The body of a page of an endpoint.
fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEMO_TIMEOUT)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{head}");
    body.to_owned()
}

/// The sum over the lines that contain all of these texts.
fn counted(page: &str, texts: &[&str]) -> f64 {
    let lines = page.lines().filter(|line| texts.iter().all(|text| line.contains(text)));
    lines
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum()
}

#[test]
fn worker_that_dies_ends_the_demo_with_an_error() {
    let demo = Demo::start(&["--seconds", "30"]);
    let descendants = demo.descendants();
    let worker = descendants
        .iter()
        .find(|(_, words)| words.trim_end().ends_with("worker"));
    kill_process(worker.unwrap().0, Signal::KILL).unwrap();
    let ended = demo.end_without_a_trace(&descendants);
    // The exact exit code is up to the tool.
    assert!(ended.code.is_some_and(|code| code != 0), "{:?}", ended.code);
    assert!(
        ended.stderr.contains("died in the middle of the demo"),
        "{}",
        ended.stderr
    );
}

#[cfg(target_os = "linux")]
#[test]
fn killed_demo_leaves_no_running_process() {
    let mut demo = Demo::start(&["--seconds", "30"]);
    let descendants = demo.descendants();
    assert_eq!(descendants.len(), CHILDREN, "{descendants:?}");
    demo.process.kill();
    // The process that inherits the children may take a moment to reap them.
    let is_over = |pid: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        stat.map_or(true, |stat| stat.contains(") Z "))
    };
    wait_until("its children are gone", DEMO_TIMEOUT, || {
        descendants.iter().all(|(pid, _)| is_over(pid))
    });
}

#[test]
fn missing_server_is_an_error_that_explains_how_to_get_one() {
    let output = bare(&["demo"]).env("PATH", "/nowhere").output().unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("make demo") && stderr.contains("SHARDLOCK_REDIS_SERVER"),
        "{stderr}"
    );
}

#[test]
fn shards_of_another_kind_are_refused() {
    for url in ["memory://", "redis://", "nonsense"] {
        let output = bare(&["demo", "--shard", url]).output().unwrap();
        assert!(!output.status.success(), "{url}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{url}");
    }
}
