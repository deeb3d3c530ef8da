//! A report about the last call in a file for the textfile collector of node_exporter, for commands
//! that are too short to be scraped.
//!
//! # Implementation details
//!
//! The collector may read the file at any time, so it is replaced at once by a rename. Two files
//! must not contain the same series, or the collector fails for all: `name` in the labels is that
//! of the file.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use shardlock::LockKey;

use crate::exit::{self, Failure};
use crate::output;

/// Where `exec` reports its last call.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(super) struct Options {
    /// Report the end of this call in DIR/shardlock_exec_NAME.prom, for the textfile collector of
    /// node_exporter
    ///
    /// The file has the time of the end, the times waited and run, the exit code, and whether the
    /// lock was acquired, busy, timed out or lost. The file shows the key.
    #[arg(long, value_name = "DIR")]
    textfile: Option<PathBuf>,

    /// The NAME of that file [default: made from the keys]
    ///
    /// Give one if keys contain a date or a number, since each name leaves a file.
    #[arg(long, value_name = "NAME", requires = "textfile", value_parser = name)]
    textfile_name: Option<String>,
}

/// The longest name from the command line, in bytes.
const NAME_BYTES_MAX: usize = 100;
/// How much of the keys is in the default name, in bytes.
const KEY_PART_BYTES_MAX: usize = 64;
/// The most bytes of the keys that are in a label.
const LABEL_BYTES_MAX: usize = 512;
/// How many reports a directory may have. No further file is created.
const FILES_MAX: usize = 1000;
/// The longest report of an earlier call that is read, in bytes.
const REPORT_BYTES_MAX: u64 = 64 * 1024;

const PREFIX: &str = "shardlock_exec_";
const SUFFIX: &str = ".prom";
const LAST_SUCCESS: &str = "shardlock_exec_last_success_time_seconds";

const fn is_safe(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

fn name(text: &str) -> Result<String, String> {
    if (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_safe) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "must be 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' and '-'"
        ))
    }
}

/// The name made from the keys. Different keys have different names.
fn default_name(keys: &[LockKey]) -> String {
    let all = joined(keys);
    let safe: String = all
        .bytes()
        .take(KEY_PART_BYTES_MAX)
        .map(|byte| if is_safe(byte) { char::from(byte) } else { '_' })
        .collect();
    if safe == all {
        return safe;
    }
    // FNV-1a, since the name must stay the same in every version of the tool.
    let hash = all.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{safe}-{hash:016x}")
}

fn joined(keys: &[LockKey]) -> String {
    let keys: Vec<&str> = keys.iter().map(LockKey::as_str).collect();
    keys.join(",")
}

/// How the call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The command ran under the lock, or could not be started.
    Acquired,
    /// The lock was held, and the call did not wait.
    Busy,
    Timeout,
    /// The lock was lost before the command ended.
    Lost,
    /// A signal ended the wait.
    Interrupted,
    /// A shard can't be reached or refused the request, or something else failed before the command
    /// was started.
    Failed,
}

impl Outcome {
    const ALL: [Self; 6] = [
        Self::Acquired,
        Self::Busy,
        Self::Timeout,
        Self::Lost,
        Self::Interrupted,
        Self::Failed,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Acquired => "acquired",
            Self::Busy => "busy",
            Self::Timeout => "timeout",
            Self::Lost => "lost",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
        }
    }
}

/// What is known of the call.
#[derive(Debug)]
pub(super) struct Call {
    began: Instant,
    pub(super) outcome: Outcome,
    waited: Option<Duration>,
    pub(super) ran: Duration,
}

impl Call {
    pub(super) fn begin() -> Self {
        Self {
            began: Instant::now(),
            outcome: Outcome::Failed,
            waited: None,
            ran: Duration::ZERO,
        }
    }

    /// The wait for the lock has ended like this.
    pub(super) fn wait_ended(&mut self, outcome: Outcome) {
        self.outcome = outcome;
        self.waited.get_or_insert(self.began.elapsed());
    }
}

/// The file of a call.
#[derive(Debug)]
pub(super) struct Textfile {
    dir: PathBuf,
    name: String,
    keys: String,
}

impl Textfile {
    /// `None` if no file is wanted.
    pub(super) fn new(options: &Options, keys: &[LockKey]) -> Option<Self> {
        let name = options.textfile_name.clone().unwrap_or_else(|| default_name(keys));
        options.textfile.clone().map(|dir| Self {
            dir,
            name,
            keys: joined(keys),
        })
    }

    /// Checks that the file can be written, before the lock is taken.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let checked = self.create_new().and_then(|(path, _)| fs::remove_file(path));
        checked
            .with_context(|| format!("no file can be made in the directory {:?} of --textfile", self.dir))
            .map_err(Failure::system)
    }

    /// Reports the call. A failure is only a warning: the command has ended with its own exit code.
    pub(super) fn report(&self, call: &Call, exit_code: u8) {
        if let Err(error) = self.write(call, exit_code) {
            let path = self.path();
            output::eprint(format_args!(
                "the end of the command is not reported in {}: {error:#}",
                path.display()
            ));
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(format!("{PREFIX}{}{SUFFIX}", self.name))
    }

    /// A new file beside that of the report, which the collector does not read.
    fn create_new(&self) -> io::Result<(PathBuf, fs::File)> {
        let path = self.dir.join(format!(".{PREFIX}{}.{}", self.name, std::process::id()));
        // Left by a process with the same number that was killed.
        fs::remove_file(&path).ok();
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)?;
        Ok((path, file))
    }

    fn write(&self, call: &Call, exit_code: u8) -> anyhow::Result<()> {
        let path = self.path();
        let earlier = last_success(&path);
        if earlier.is_none() && !path.exists() {
            let count = reports_in(&self.dir)?;
            if count >= FILES_MAX {
                return Err(anyhow!(
                    "{} has {count} reports already; delete old ones, and use --textfile-name for keys that change",
                    self.dir.display()
                ));
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let report = Report {
            file: self,
            call,
            exit_code,
            now,
            last_success: match (call.outcome, exit_code) {
                (Outcome::Acquired, exit::OK) => Some(now.as_secs_f64()),
                _ => earlier,
            },
        };
        let (temporary, mut file) = self.create_new()?;
        let written = file
            .write_all(report.to_string().as_bytes())
            .and_then(|()| file.sync_data())
            .and_then(|()| fs::rename(&temporary, &path));
        if written.is_err() {
            fs::remove_file(&temporary).ok();
        }
        Ok(written?)
    }
}

/// How many reports the directory has.
fn reports_in(dir: &Path) -> io::Result<usize> {
    let is_report = |name: &OsString| {
        let name = name.as_encoded_bytes();
        name.starts_with(PREFIX.as_bytes()) && name.ends_with(SUFFIX.as_bytes())
    };
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        count += usize::from(is_report(&entry?.file_name()));
    }
    Ok(count)
}

/// When the command last succeeded, if the report has that. A call that finds the lock busy must
/// not make that time unknown.
fn last_success(path: &Path) -> Option<f64> {
    let mut text = String::new();
    let file = fs::File::open(path).ok()?;
    file.take(REPORT_BYTES_MAX).read_to_string(&mut text).ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("{LAST_SUCCESS}{{")))?;
    let seconds: f64 = line.rsplit_once(' ')?.1.parse().ok()?;
    (seconds.is_finite() && seconds > 0.0).then_some(seconds)
}

/// The content of the file.
struct Report<'a> {
    file: &'a Textfile,
    call: &'a Call,
    exit_code: u8,
    now: Duration,
    last_success: Option<f64>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.file.name;
        let labels = format!("name=\"{name}\",key=\"{}\"", label(&self.file.keys));
        let mut gauge = |name: &str, help: &str, value: f64| {
            writeln!(
                f,
                "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{{{labels}}} {value}"
            )
        };
        let waited = self.call.waited.unwrap_or_else(|| self.call.began.elapsed());
        gauge(
            "shardlock_exec_last_time_seconds",
            "When the last call ended, as Unix time.",
            millis(self.now.as_secs_f64()),
        )?;
        if let Some(time) = self.last_success {
            gauge(
                LAST_SUCCESS,
                "When the command last ended with 0 under its lock on this host, as Unix time.",
                millis(time),
            )?;
        }
        gauge(
            "shardlock_exec_wait_seconds",
            "How long the last call waited for its lock.",
            millis(waited.as_secs_f64()),
        )?;
        gauge(
            "shardlock_exec_duration_seconds",
            "How long the command of the last call ran, 0 if it was not started.",
            millis(self.call.ran.as_secs_f64()),
        )?;
        gauge(
            "shardlock_exec_exit_status",
            "The exit code of the last call.",
            f64::from(self.exit_code),
        )?;
        let name = "shardlock_exec_outcome";
        writeln!(
            f,
            "# HELP {name} 1 for the outcome of the last call.\n# TYPE {name} gauge"
        )?;
        for outcome in Outcome::ALL {
            let value = u8::from(outcome == self.call.outcome);
            writeln!(f, "{name}{{{labels},outcome=\"{}\"}} {value}", outcome.as_str())?;
        }
        Ok(())
    }
}

/// Rounds to milliseconds.
fn millis(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

/// The value of a label: escaped, and cut if it is long.
fn label(text: &str) -> String {
    let mut escaped = String::new();
    for char in text.chars() {
        if escaped.len() >= LABEL_BYTES_MAX {
            escaped.push_str("...");
            break;
        }
        match char {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            '\n' => escaped.push_str("\\n"),
            char => escaped.push(char),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(keys: &[&str]) -> String {
        let keys: Vec<_> = keys.iter().map(|key| LockKey::new(key).unwrap()).collect();
        default_name(&keys)
    }

    #[test]
    fn default_names_are_safe_and_differ() {
        assert_eq!(named(&["nightly-report"]), "nightly-report");
        let names = [
            named(&["a/b"]),
            named(&["a b"]),
            named(&["a_b"]),
            named(&["a", "b"]),
            named(&["ä"]),
            named(&["../../etc/passwd"]),
            named(&[&"x".repeat(200)]),
            named(&[&"x".repeat(201)]),
        ];
        for (number, one) in names.iter().enumerate() {
            assert!(name(one).is_ok(), "{one}");
            assert!(!names[..number].contains(one), "{one}");
        }
        // It stays the same in later versions, which would otherwise leave old reports behind.
        assert_eq!(names[0], "a_b-e620c3190468cf61");
    }

    #[test]
    fn labels_are_escaped_and_cut() {
        assert_eq!(label("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
        let long = label(&"é".repeat(2000));
        assert!(long.len() < LABEL_BYTES_MAX + 8 && long.ends_with("é..."), "{long}");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for wrong in ["", "a/b", "a b", "ä", &"x".repeat(101)] {
            assert!(name(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(name("backup.daily_2").as_deref(), Ok("backup.daily_2"));
    }
}
