//! A real Prometheus and its promtool.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::directory::{directory, repository};
use crate::process::Process;
use crate::server::{PORTS_TRIED_MAX, free_port};
use crate::wait::{PATIENCE, wait_until};

/// Path of the server binary: `SHARDLOCK_PROMETHEUS`, or the one on the `PATH`.
pub fn binary() -> PathBuf {
    if let Some(path) = env::var_os("SHARDLOCK_PROMETHEUS").filter(|path| !path.is_empty()) {
        return PathBuf::from(path);
    }
    let paths = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&paths)
        .map(|dir| dir.join("prometheus"))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("there is no prometheus on the PATH: `make test` installs it, or set SHARDLOCK_PROMETHEUS to its path")
    })
}

/// Path of the promtool that is installed beside the server.
pub fn promtool() -> PathBuf {
    let path = binary().with_file_name("promtool");
    assert!(
        path.is_file(),
        "{} is missing: it comes with Prometheus",
        path.display()
    );
    path
}

/// A Prometheus on a free port that scrapes the targets listed in a file. Killed when dropped.
pub struct Prometheus {
    port: u16,
    _process: Process,
    _dir: TempDir,
}

/// One series of a query result, at one point in time.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The labels of the series, by name.
    pub labels: BTreeMap<String, String>,
    /// The value at that time.
    pub value: f64,
}

impl Prometheus {
    /// Scrape interval.
    pub const SCRAPE_INTERVAL: &str = "500ms";
    /// Name of the scrape job.
    pub const JOB: &str = "shardlock";

    /// Starts a Prometheus and waits until it is ready. It loads the rules of `config/prometheus`
    /// and scrapes the targets in the file, which uses the `file_sd_configs` format and may be
    /// created later.
    #[track_caller]
    pub fn start(targets: &Path) -> Self {
        Self::start_every(Self::SCRAPE_INTERVAL, targets)
    }

    /// [`start`](Self::start) with another interval for scrapes and rules.
    #[track_caller]
    pub fn start_every(interval: &str, targets: &Path) -> Self {
        let dir = directory("prometheus");
        let rules = repository().join("config/prometheus/*.rules.yml");
        let config = format!(
            "global:\n  scrape_interval: {interval}\n  scrape_timeout: {interval}\n  evaluation_interval: {interval}\n\
             rule_files: ['{rules}']\n\
             scrape_configs:\n  - job_name: {job}\n    file_sd_configs:\n      - files: ['{targets}']\n",
            rules = rules.display(),
            job = Self::JOB,
            targets = targets.display(),
        );
        fs::write(dir.path().join("prometheus.yml"), config).expect("write the configuration");
        for _ in 0..PORTS_TRIED_MAX {
            let port = free_port();
            if let Some(process) = launch(port, dir.path()) {
                return Self {
                    port,
                    _process: process,
                    _dir: dir,
                };
            }
        }
        panic!("{PORTS_TRIED_MAX} ports that were free were taken a moment later");
    }

    /// Its address, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }

    /// Evaluates the expression now. Panics if the expression is invalid.
    #[track_caller]
    pub fn query(&self, expression: &str) -> Vec<Sample> {
        query(self.port, expression)
    }

    /// The values of a label over all series that match the selector.
    #[track_caller]
    pub fn label_values(&self, series: &str, label: &str) -> Vec<String> {
        let answer = request(
            self.port,
            &format!("/api/v1/label/{label}/values"),
            &[("match[]", series)],
        );
        let values = answer.as_array().expect("a list").iter();
        values.map(|value| value.as_str().expect("a text").to_owned()).collect()
    }
}

/// Evaluates the expression now, on the Prometheus at this port of 127.0.0.1. Panics if the
/// expression is invalid.
#[track_caller]
pub fn query(port: u16, expression: &str) -> Vec<Sample> {
    let answer = request(port, "/api/v1/query", &[("query", expression)]);
    let result = answer["result"].as_array().expect("a vector");
    result.iter().map(Sample::read).collect()
}

#[track_caller]
fn request(port: u16, path: &str, parameters: &[(&str, &str)]) -> Value {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(parameters);
    let body = get(port, &format!("{path}?{}", query.finish())).expect("Prometheus answers");
    let mut answer: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(answer["status"], "success", "{parameters:?}: {body}");
    answer["data"].take()
}

impl Sample {
    fn read(result: &Value) -> Self {
        let labels = result["metric"].as_object().expect("labels").iter();
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        Self {
            labels: labels.map(|(name, value)| (name.clone(), text(value))).collect(),
            value: text(&result["value"][1]).parse().expect("a number"),
        }
    }
}

/// Starts a server on this port and waits until it is ready. Returns `None` if the port is taken.
#[track_caller]
fn launch(port: u16, dir: &Path) -> Option<Process> {
    let log_file = File::create(dir.join(LOG)).expect("make a log file");
    let mut command = Command::new(binary());
    command
        .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
        .arg(format!("--web.listen-address={}:{port}", Ipv4Addr::LOCALHOST))
        .stdin(Stdio::null())
        .stdout(log_file.try_clone().expect("share the log file"))
        .stderr(log_file);
    let mut process = Process::spawn(command).expect("start a Prometheus");
    let mut ended = None;
    wait_until("Prometheus is ready", PATIENCE, || {
        // If another process answers on this port, our server ends because it can't bind it.
        ended = process.ended();
        ended.is_some() || get(port, "/-/ready").is_ok()
    });
    if let Some(status) = ended.or_else(|| process.ended()) {
        let log = log(dir);
        assert!(
            log.contains("address already in use"),
            "Prometheus ended at its start with {status}:\n{log}"
        );
        return None;
    }
    Some(process)
}

const LOG: &str = "server.log";

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join(LOG)).unwrap_or_default()
}

/// The response body, whatever the status. An error if the server sends nothing or is not ready.
fn get(port: u16, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    match response.split_once("\r\n\r\n") {
        Some((head, body)) if !head.contains(" 503 ") => Ok(body.to_owned()),
        _ => Err(io::Error::other(response)),
    }
}
