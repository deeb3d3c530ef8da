//! The bench with real processes and servers: its figures, its plot, and how it ends.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use roxmltree::Document;
use rustix::process::{Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;
use support::process::Process;
use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{Run, bare, run};

/// The figures of a run with these arguments, after checking those that must hold in every run.
#[track_caller]
fn figures(args: &[&str]) -> Value {
    let ended = run(bare(&[&["bench", "--json"], args].concat()));
    assert_eq!(ended.code, 0, "{ended:?}");
    let line = ended.stdout.strip_suffix('\n').unwrap();
    assert!(!line.contains('\n'), "{line}");
    consistent(line)
}

#[track_caller]
fn consistent(line: &str) -> Value {
    assert_eq!(shape(line), LINE);
    let figures: Value = serde_json::from_str(line).unwrap();
    let locks = number(&figures, "/locks");
    assert!(locks > 0.0, "{figures}");
    let paths = ["local", "remote", "uncontended"].map(|path| number(&figures, &format!("/handoffs/{path}")));
    assert_eq!(paths.iter().sum::<f64>(), locks, "{figures}");
    let rate = locks / number(&figures, "/seconds");
    assert!(
        (number(&figures, "/locks_per_s") / rate - 1.0).abs() < 0.01,
        "{figures}"
    );
    for per in ["/per_process", "/per_task"] {
        let bounds = ["min", "max"].map(|bound| number(&figures, &format!("{per}/{bound}")));
        assert!(bounds[0] <= bounds[1] && bounds[1] <= locks, "{figures}");
    }
    let jain = number(&figures, "/per_process/jain");
    assert!(jain > 0.0 && jain <= 1.0, "{figures}");
    let waits = ["p50", "p99", "max"].map(|wait| number(&figures, &format!("/wait_ms/{wait}")));
    assert!(waits[0] > 0.0 && waits.is_sorted(), "{figures}");
    figures
}

/// The format that scripts rely on, with `#` for each number and each null.
const LINE: &str = concat!(
    r##"{"locks":#,"seconds":#,"locks_per_s":#,"per_process":{"min":#,"max":#,"jain":#},"per_task":{"min":#,"max":#},"##,
    r##""wait_ms":{"p50":#,"p99":#,"max":#},"hold_ms":{"mean":#},"handoffs":{"local":#,"remote":#,"uncontended":#},"##,
    r##""server":{"scripts_per_lock":#,"publishes_per_lock":#,"cpu_us_per_lock":#}}"##,
);

fn shape(line: &str) -> String {
    let mut parts = line.split(':');
    let mut shape = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "+-.".contains(c));
        shape.push_str(if rest.len() < part.len() { ":#" } else { ":" });
        shape.push_str(rest);
    }
    shape
}

#[track_caller]
fn number(figures: &Value, pointer: &str) -> f64 {
    let number = figures.pointer(pointer).and_then(Value::as_f64);
    number.unwrap_or_else(|| panic!("{pointer} is no number in {figures}"))
}

#[test]
fn hand_offs_between_processes_cost_two_scripts_and_a_message_and_take_turns() {
    let figures = figures(&["--processes", "2", "--tasks", "1", "--hold", "50ms", "--duration", "6s"]);
    let locks = number(&figures, "/locks");
    // While the machine stalls one process, the other finds the queue empty.
    let [remote, uncontended] = ["remote", "uncontended"].map(|path| number(&figures, &format!("/handoffs/{path}")));
    assert!(remote > 0.5 * locks, "{figures}");
    // A free key costs one script or two. The servers' statistics are read just before the window
    // opens and just before it closes, and the machine may stall a process in between for a second.
    let scripts = number(&figures, "/server/scripts_per_lock") * locks;
    let least = 2.0 * remote + uncontended;
    assert!((0.75 * least..1.35 * 2.0 * locks).contains(&scripts), "{figures}");
    let publishes = number(&figures, "/server/publishes_per_lock") * locks;
    assert!((0.75 * remote..1.35 * locks).contains(&publishes), "{figures}");
    assert!(number(&figures, "/server/cpu_us_per_lock") > 0.0, "{figures}");
    let bounds = ["min", "max"].map(|bound| number(&figures, &format!("/per_process/{bound}")));
    assert_eq!(bounds[0] + bounds[1], locks, "{figures}");
    // They take turns. One of them may open its window a second later than the other.
    assert!(bounds[1] < 1.5 * bounds[0] + uncontended, "{figures}");
    assert!(number(&figures, "/hold_ms/mean") >= 50.0, "{figures}");
    // While one process holds the lock, the other waits, unless it is late itself.
    assert!(number(&figures, "/wait_ms/p99") >= 50.0, "{figures}");
}

#[test]
fn tasks_of_a_process_hand_off_without_the_server() {
    // Each task has its turn even if a process is not scheduled for a second.
    let figures = figures(&["--processes", "2", "--tasks", "32", "--duration", "2500ms"]);
    let locks = number(&figures, "/locks");
    assert!(number(&figures, "/handoffs/local") > 0.9 * locks, "{figures}");
    assert!(number(&figures, "/server/scripts_per_lock") < 0.2, "{figures}");
    assert!(number(&figures, "/per_task/min") > 0.0, "{figures}");
}

/// The figures of a run with readers and writers, which have one more part.
#[track_caller]
fn figures_with_writers(args: &[&str]) -> Value {
    let ended = run(bare(&[&["bench", "--json"], args].concat()));
    assert_eq!(ended.code, 0, "{ended:?}");
    let line = ended.stdout.strip_suffix('\n').unwrap();
    let writers = r##""writers":{"waits":#,"wait_ms":{"p50":#,"p99":#,"max":#}},"##;
    let with_writers = LINE.replace("\"hold_ms\"", &format!("{writers}\"hold_ms\""));
    assert_eq!(shape(line), with_writers);
    serde_json::from_str(line).unwrap()
}

#[test]
fn readers_share_the_key_and_waits_of_writers_are_reported_separately() {
    let load = ["--processes", "2", "--tasks", "8", "--hold", "10ms", "--duration", "3s"];
    let figures = figures_with_writers(&[&load[..], &["--shared", "0.8"]].concat());
    let (locks, seconds) = (number(&figures, "/locks"), number(&figures, "/seconds"));
    let paths = ["local", "remote", "uncontended"].map(|path| number(&figures, &format!("/handoffs/{path}")));
    assert_eq!(paths.iter().sum::<f64>(), locks, "{figures}");
    // One after the other, they would have held it for at most the whole time.
    let held = locks * number(&figures, "/hold_ms/mean") / 1e3;
    assert!(held > 1.2 * seconds, "{figures}");
    // A fifth of the locks, and the waits that were not over.
    let writers = number(&figures, "/writers/waits");
    assert!(writers > 0.0 && writers < 0.5 * locks, "{figures}");
    let waits = ["p50", "p99", "max"].map(|wait| number(&figures, &format!("/writers/wait_ms/{wait}")));
    assert!(waits[0] > 0.0 && waits.is_sorted(), "{figures}");
}

#[test]
fn permits_are_used_up_to_their_limit() {
    let load = ["--processes", "2", "--tasks", "8", "--hold", "10ms", "--duration", "4s"];
    let figures = figures(&[&load[..], &["--permits", "3"]].concat());
    let rate = number(&figures, "/locks_per_s");
    let in_use = rate * number(&figures, "/hold_ms/mean") / 1e3;
    // A lock counts when it is acquired, so a few more holds than fit into the window may count. If
    // a process opens or closes its window a second late, the other uses all permits meanwhile, and
    // the rate is that of the mean window.
    assert!((1.0..4.0).contains(&in_use), "{figures}");
    assert!(number(&figures, "/per_process/min") > 0.0, "{figures}");
}

#[test]
fn shared_and_permits_exclude_each_other_and_have_bounds() {
    for (args, problem) in [
        (&["--shared", "0.5", "--permits", "2"][..], "cannot be used with"),
        (&["--shared", "1.5"], "from 0 to 1"),
        (&["--permits", "0"], "1..=1000"),
    ] {
        let ended = run(bare(&[&["bench"], args].concat()));
        assert_eq!(ended.code, 64, "{ended:?}");
        assert!(ended.stderr.contains(problem), "{ended:?}");
    }
}

/// The agent counts the paths of locks itself, so their sum differs a little from the tasks' count.
#[test]
fn workers_of_an_agent_hand_off_without_the_server() {
    let server = RedisServer::start();
    // Each process has its locks even if it is not scheduled for a second.
    let args = ["--agent", "--processes", "4", "--tasks", "2", "--duration", "1500ms"];
    for shard in [&["--shard", "memory://"][..], &["--shard", &server.url()], &[]] {
        let ended = run(bare(&[&["bench", "--json"], &args[..], shard].concat()));
        assert_eq!((ended.code, &*ended.stderr), (0, ""), "{ended:?}");
        assert_eq!(shape(ended.stdout.trim_end()), LINE);
        let figures: Value = serde_json::from_str(&ended.stdout).unwrap();
        let [local, remote, uncontended] =
            ["local", "remote", "uncontended"].map(|path| number(&figures, &format!("/handoffs/{path}")));
        let counted = local + remote + uncontended;
        assert!(local > 0.9 * counted, "{figures}");
        // The workers may learn a second late that the window has closed.
        assert!(counted > 0.5 * number(&figures, "/locks"), "{figures}");
        for fewest in ["/per_process/min", "/per_task/min"] {
            assert!(number(&figures, fewest) > 0.0, "{figures}");
        }
        if shard != ["--shard", "memory://"] {
            assert!(number(&figures, "/server/scripts_per_lock") < 0.1, "{figures}");
        }
    }
    assert_eq!(server.query::<u64>(&["DBSIZE"]), 0);
    let ended = run(bare(
        &[&["bench", "--set", "linger=5s", "--linger", "0s"], &args[..]].concat(),
    ));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended
            .stdout
            .contains("on a throw-away Redis server, through an agent\n"),
        "{ended:?}"
    );
}

#[test]
fn an_agent_that_can_not_start_ends_the_bench() {
    let ended = run(bare(&[
        "bench",
        "--agent",
        "--shard",
        "redis://127.0.0.1:1",
        "--duration",
        "1s",
    ]));
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("the agent did not start: "), "{ended:?}");
}

#[test]
fn lingering_leases_cost_the_server_almost_nothing() {
    let own_keys = ["--processes", "1", "--tasks", "4", "--keys", "4"];
    let figures = figures(&[&own_keys[..], &["--linger", "10s", "--duration", "2s"]].concat());
    // Each lock comes from the process's own lingering lease, which counts as a local hand-off. The
    // exception is the first lock of each key, if it is late enough to be counted.
    let [local, locks] = ["/handoffs/local", "/locks"].map(|figure| number(&figures, figure));
    assert!(locks - local <= 4.0 && local > 0.9 * locks, "{figures}");
    assert!(number(&figures, "/server/scripts_per_lock") < 0.01, "{figures}");
}

#[test]
fn each_task_has_its_own_key_with_as_many_keys_as_tasks() {
    let figures = figures(&["--processes", "2", "--tasks", "4", "--keys", "8", "--duration", "3s"]);
    assert_eq!(
        number(&figures, "/handoffs/uncontended"),
        number(&figures, "/locks"),
        "{figures}"
    );
    // A free key is taken with plain commands and released with a script. The server's statistics
    // are read just before the window opens and just before it closes, and the machine may stall a
    // process in between for a second.
    let scripts = number(&figures, "/server/scripts_per_lock");
    assert!((0.6..1.7).contains(&scripts), "{figures}");
    assert!(number(&figures, "/server/publishes_per_lock") < 0.01, "{figures}");
}

#[test]
fn skewed_keys_are_contended_more_than_even_ones() {
    let contended = |more: &[&str]| {
        let args = [
            "--processes",
            "1",
            "--tasks",
            "32",
            "--keys",
            "10000",
            "--duration",
            "2s",
            "--shard",
            "memory://",
        ];
        let figures = figures(&[&args[..], &["--hold", "1ms"], more].concat());
        1.0 - number(&figures, "/handoffs/uncontended") / number(&figures, "/locks")
    };
    let (even, skewed) = (contended(&[]), contended(&["--skew", "1.5"]));
    assert!(
        even < 0.1 && skewed > 3.0 * even,
        "contended: {even} with even keys, {skewed} with skewed keys"
    );
}

#[test]
fn server_figures_are_null_for_shards_without_statistics() {
    let figures = figures(&[
        "--processes",
        "1",
        "--tasks",
        "2",
        "--keys",
        "3",
        "--duration",
        "2s",
        "--shard",
        "memory://",
    ]);
    for name in ["scripts_per_lock", "publishes_per_lock", "cpu_us_per_lock"] {
        assert!(figures["server"][name].is_null(), "{figures}");
    }
}

#[test]
fn plot_is_svg_and_the_table_describes_the_load() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("waits.svg");
    let servers = temp.path().join("servers");
    fs::create_dir(&servers).unwrap();
    let mut command = bare(&[
        "bench",
        "--processes",
        "2",
        "--tasks",
        "3",
        "--duration",
        "2s",
        "--plot",
    ]);
    command.arg(&path).env("TMPDIR", &servers);
    let ended = run(command);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended
            .stdout
            .starts_with("2 processes x 3 tasks, 1 key, nothing done under the lock\n"),
        "{ended:?}"
    );
    for row in ["locks per second", "wait, 99th percentile", "script calls per lock"] {
        assert!(ended.stdout.contains(row), "{row}: {ended:?}");
    }
    let text = fs::read_to_string(&path).unwrap();
    let picture = Document::parse(&text).unwrap();
    assert!(
        picture
            .root_element()
            .has_tag_name(("http://www.w3.org/2000/svg", "svg"))
    );
    let texts: Vec<_> = picture.descendants().filter_map(|node| node.text()).collect();
    assert!(
        texts.iter().any(|text| text.starts_with("2 processes x 3 tasks")),
        "{texts:?}"
    );
    let curves = picture
        .descendants()
        .filter(|node| node.attribute("fill") == Some("none"));
    assert_eq!(curves.count(), 1);
    // The directory of the temporary server is empty.
    assert_eq!(fs::read_dir(&servers).unwrap().count(), 0);
}

#[test]
fn given_servers_keep_their_own_keys_and_none_of_the_bench() {
    let servers = [RedisServer::start(), RedisServer::start()];
    for server in &servers {
        server.command(&["SET", "bench:mine", "stays"]);
    }
    let urls = servers.each_ref().map(RedisServer::url);
    let args = ["--processes", "2", "--tasks", "8", "--keys", "50", "--duration", "2s"];
    figures(&[&args[..], &["--shard", &urls[0], "--shard", &urls[1]]].concat());
    for server in &servers {
        assert_eq!(server.keys(), ["bench:mine"]);
        assert!(server.script_calls() > 0, "the server was not used");
    }
}

/// A terminal and its output.
struct Terminal {
    name: Vec<u8>,
    screen: Arc<Mutex<String>>,
}

impl Terminal {
    fn new() -> Self {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&control).unwrap();
        unlockpt(&control).unwrap();
        let name = ptsname(&control, Vec::new()).unwrap().into_bytes();
        let screen: Arc<Mutex<String>> = Arc::default();
        let shown = Arc::clone(&screen);
        let mut control = File::from(control);
        // Reading fails once no process has the terminal open.
        thread::spawn(move || {
            let mut bytes = [0; 1024];
            while let Ok(count @ 1..) = control.read(&mut bytes) {
                shown
                    .lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { name, screen }
    }

    fn open(&self) -> File {
        let path = Path::new(std::ffi::OsStr::from_bytes(&self.name));
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn shows(&self, text: &str) -> bool {
        self.screen.lock().unwrap().contains(text)
    }
}

#[test]
fn interrupt_ends_the_bench_early_with_what_was_measured() {
    let server = RedisServer::start();
    let terminal = Terminal::new();
    let temp = tempfile::tempdir().unwrap();
    let stdout = temp.path().join("stdout");
    let mut command = bare(&[
        "bench",
        "--json",
        "--processes",
        "2",
        "--tasks",
        "4",
        "--duration",
        "10m",
    ]);
    command
        .args(["--shard", &server.url()])
        .env("TERM", "xterm")
        .stdout(File::create(&stdout).unwrap())
        .stderr(terminal.open());
    let mut bench = Process::spawn(command).unwrap();
    // The progress bar is shown while the window is open, and advances. In two seconds, a lock is
    // acquired even if a process is not scheduled for a second.
    let measures = || (500..599).any(|left| terminal.shows(&format!("{left} s left")));
    wait_until("the bench has measured for two seconds", PATIENCE, measures);
    bench.signal(Signal::INT);
    let status = bench.wait(PATIENCE);
    assert_eq!(status.code(), Some(130));
    wait_until("the bench prints why it ended", PATIENCE, || {
        terminal.shows("ended early by SIGINT")
    });
    let figures = consistent(fs::read_to_string(stdout).unwrap().trim_end());
    assert!(number(&figures, "/seconds") < 600.0, "{figures}");
    assert_eq!(server.keys(), [""; 0]);
}

#[test]
fn killed_server_fails_locks_and_sets_the_exit_code() {
    let server = RedisServer::start();
    let mut command = bare(&[
        "bench",
        "--processes",
        "2",
        "--tasks",
        "2",
        "--keys",
        "4",
        "--duration",
        "4s",
    ]);
    command.args(["--shard", &server.url(), "--set", "store_timeout=1500ms"]);
    let mut bench = Run::start(command);
    wait_until("locks are acquired", PATIENCE, || server.script_calls() > 0);
    server.kill();
    let ended = bench.end();
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("locks failed (unavailable)"), "{ended:?}");
    assert!(ended.stderr.contains("may be left on the given shards"), "{ended:?}");
}

/// Without this, the longest waits would be missing: those during which a server did not answer.
#[test]
fn wait_is_measured_across_failed_requests() {
    const STANDSTILL: Duration = Duration::from_secs(5);
    let server = RedisServer::start();
    let before = server.calls("info");
    let mut command = bare(&["bench", "--json", "--processes", "1", "--tasks", "2", "--keys", "2"]);
    // The time limit also applies to connecting, for which a busy machine needs a second.
    command.args(["--duration", "7s", "--set", "store_timeout=1500ms"]);
    command.args(["--shard", &server.url()]);
    let mut bench = Run::start(command);
    // The bench reads the server's statistics when the window opens. The test detects this by
    // counting `INFO` calls, its own included.
    let mut ours = 0;
    wait_until("the bench measures", PATIENCE, || {
        ours += 1;
        server.calls("info") > before + ours
    });
    server.stop();
    thread::sleep(STANDSTILL);
    server.cont();
    let ended = bench.end();
    assert_eq!(ended.code, 1, "locks failed: {ended:?}");
    let figures = consistent(ended.stdout.trim_end());
    // A task that was releasing its lock learns only after the time limit that the server does not
    // answer. A single request would wait for no longer than that.
    let longest = STANDSTILL - Duration::from_millis(2_500);
    assert!(
        number(&figures, "/wait_ms/max") >= longest.as_millis() as f64,
        "{figures}"
    );
}

#[test]
fn dead_worker_ends_the_bench_with_an_error() {
    let server = RedisServer::start();
    let mut command = bare(&["bench", "--processes", "2", "--tasks", "2", "--duration", "10m"]);
    command.args(["--shard", &server.url()]);
    let mut bench = Run::start(command);
    wait_until("locks are acquired", PATIENCE, || server.script_calls() > 0);
    let worker = bench.children().into_iter().next().unwrap();
    kill_process(worker, Signal::KILL).unwrap();
    let ended = bench.end();
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("died in the middle of the bench"), "{ended:?}");
    assert_eq!(server.keys(), [""; 0]);
}

#[test]
fn arguments_out_of_bounds_are_refused_with_value_and_bound() {
    let refused: [(&[&str], &str); 12] = [
        (&["--processes", "0"], "1..=256"),
        (&["--processes", "257"], "1..=256"),
        (&["--tasks", "100001"], "1..=100000"),
        (&["--keys", "0"], "1..=1000000"),
        (&["--processes", "200", "--tasks", "100000"], "at most 1000000 in all"),
        (&["--hold", "2m"], "at most 60s"),
        (&["--duration", "1ms"], "from 100ms to 3600s"),
        (&["--duration", "soon"], "--duration"),
        (&["--skew=-1"], "from 0 to 10"),
        (
            &["--processes", "2", "--tasks", "2", "--keys", "4", "--skew", "1"],
            "each task has its own",
        ),
        (&["--plot", "/nowhere/waits.svg"], "/nowhere/waits.svg can't be written"),
        (&["--processes", "2", "--shard", "memory://"], "use --processes 1"),
    ];
    for (args, words) in refused {
        let ended = run(bare(&[&["bench"], args].concat()));
        assert_eq!(ended.code, 64, "{args:?}: {ended:?}");
        assert!(ended.stderr.contains(words), "{args:?}: {ended:?}");
        assert!(ended.stdout.is_empty(), "{args:?}: {ended:?}");
    }
}
