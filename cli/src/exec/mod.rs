//! `shardlock exec`: runs a command under a lock.
//!
//! | file | what it does |
//! |---|---|
//! | `fork` | forks the tool into two processes, and explains why |
//! | `front` | the process that the caller started |
//! | `keeper` | the process that holds the lock |
//! | `events` | what the keeper must handle: signals from the front, and ended children |
//! | `arguments` | the keys and the command on the command line |
//! | `environment` | how the command learns of its locks |
//! | `holding` | the locks, of a manager or of an agent |
//! | `agent`, `agent_locks` | taking locks through an agent; holding them |
//! | `command` | the command, from its start until its last process is gone |
//! | `process_tree`, `process` | the processes of the command; a snapshot of a process |
//! | `textfile` | a report for the textfile collector of node_exporter |
//! | `signals`, `terminal` | blocked signals; the controlling terminal |

mod agent;
mod agent_locks;
mod arguments;
mod command;
mod environment;
mod events;
mod fork;
mod front;
mod holding;
mod keeper;
mod process;
mod process_tree;
mod signals;
mod terminal;
mod textfile;

use std::convert::Infallible;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use shardlock::config::Config;
use shardlock::tool;

use crate::exit::Failure;
use crate::{metrics, serve, shards};
use agent::AgentRequest;
use arguments::Work;
use fork::Role;
use textfile::Textfile;

/// Run a command while holding a lock
///
/// Waits for the lock, runs the command, and releases the lock when the command has ended. The
/// command inherits standard input, output and error. Its environment describes the lock: LOCK_KEY,
/// LOCK_TOKEN (the fencing token, larger for every later holder) and LOCK_OWNER.
///
/// With -k, several locks are held while the command runs: all of them or none. They are acquired
/// in one order, whatever the order of the options, so commands with overlapping keys do not
/// deadlock. The loss of one is the loss of all. LOCK_COUNT is the number of keys, and LOCK_KEY_1,
/// LOCK_TOKEN_1, LOCK_OWNER_1, LOCK_KEY_2 and so on describe each, in the order of the options;
/// LOCK_KEY, LOCK_TOKEN and LOCK_OWNER are those of the first one.
///
/// Signals are forwarded to the command's process group. TERM, INT and HUP are sent to all
/// processes that the command has started; those still running after --kill-after get KILL. The
/// same happens if the lock is lost while the command runs: all processes get TERM, then KILL. If
/// the command ends by itself, its background processes keep running, without the lock.
///
/// If the tool is killed, a second process, lock-keeper, kills all processes of the command and
/// releases the lock when they are gone (on Linux). Processes that run as another user, for example
/// through sudo, can't be signalled unless the tool runs as root: the tool reports them and keeps
/// the lock until they have ended. A process that a daemon starts on the command's behalf (docker
/// run, systemd-run) is not a process of the command.
///
/// In a terminal, the command is part of the tool's job: it can read from the terminal, ^C and ^Z
/// reach it, and the lock is kept while the command is stopped. Without a terminal, the command
/// gets its own process group.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "shardlock exec [OPTIONS] <KEY> [--] <COMMAND> [ARGUMENTS]...\n       \
                      shardlock exec [OPTIONS] -k <KEY>... [--] <COMMAND> [ARGUMENTS]...",
    after_help = EXIT_CODES
)]
pub(crate) struct Args {
    // One list, because everything after the key belongs to the command, even if it looks like an
    // option.
    /// The name of the lock unless it is given with -k, then the command to run and its arguments
    #[arg(
        required = true,
        num_args = 1..,
        trailing_var_arg = true,
        value_names = ["KEY", "COMMAND"],
        help_heading = "Arguments"
    )]
    key_and_command: Vec<OsString>,

    /// The name of a lock; repeat the option to hold several locks at once
    #[arg(short, long = "key", value_name = "KEY")]
    keys: Vec<String>,

    /// Fail instead of waiting if the lock is held or others are waiting for it
    #[arg(short, long, conflicts_with = "timeout")]
    nonblock: bool,

    /// Hold the lock together with other shared holders; only exclusive ones are kept out
    #[arg(long, conflicts_with_all = ["permits", "min_hold"])]
    shared: bool,

    /// Hold W of at most N permits of the lock, such as 1/10, so that commands with a total of N
    /// run at a time
    #[arg(long, value_name = "W/N", value_parser = permits, conflicts_with = "min_hold")]
    permits: Option<Permits>,

    /// How long to wait for the lock, such as 500ms or 2s (a plain number is seconds), or none to
    /// wait forever
    ///
    /// With a limit, the tool also retries while the server can't be reached, until the limit has
    /// passed. Without one, a server that can't be reached is an error at once.
    #[arg(short = 'w', long, value_name = "DURATION", value_parser = seconds_or_duration)]
    timeout: Option<String>,

    /// How long the key stays locked if this machine dies [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_duration)]
    ttl: Option<String>,

    /// How long the lock may be held before the command is ended, or none for no limit
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_duration)]
    max_hold: Option<String>,

    /// How long the key stays locked after the lock was acquired, even if the command ends earlier
    /// or the tool is killed
    ///
    /// For a command that a timer starts on several machines at about the same time: with -n, only
    /// the first of them runs it.
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_duration)]
    min_hold: Option<String>,

    /// The exit code if the lock was not acquired: busy or timed out
    #[arg(short = 'E', long, value_name = "CODE", default_value_t = 1)]
    conflict_exit_code: u8,

    /// How long to wait between TERM and KILL, up to a day
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = grace)]
    kill_after: Duration,

    /// The class label for this lock in metrics
    #[arg(long)]
    class: Option<String>,

    /// Print no message if the lock was not acquired
    #[arg(short, long)]
    quiet: bool,

    /// Keep passwords in the command's environment
    ///
    /// Without this option, SHARDLOCK_PASSWORD and SHARDLOCK_AGENT_PASSWORD are removed, and so is
    /// a SHARDLOCK_SHARDS that contains a password. A nested `shardlock` must then get its shards
    /// in another way, such as from a file. SHARDLOCK_PASSWORD_FILE and
    /// SHARDLOCK_AGENT_PASSWORD_FILE are kept.
    #[arg(long)]
    inherit_password: bool,

    /// Take the lock through the agent with this socket (`shardlock serve`) [default:
    /// $SHARDLOCK_AGENT, unless shards are given on the command line]
    ///
    /// The agent has the shards and the settings, so other variables, such as SHARDLOCK_TTL, have
    /// no effect. LOCK_OWNER is not set. With several keys and without --timeout, the agent's own
    /// limit applies to each of them.
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["shards", "config", "settings", "address"])]
    agent: Option<PathBuf>,

    /// A file with the password of the agent in its first line [default:
    /// $SHARDLOCK_AGENT_PASSWORD_FILE, or the password in $SHARDLOCK_AGENT_PASSWORD]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shards", "config", "settings", "address"])]
    agent_password_file: Option<PathBuf>,

    #[command(flatten)]
    textfile: textfile::Options,

    #[command(flatten)]
    metrics: metrics::Options,

    #[command(flatten)]
    shards: shards::Options,
}

/// Where the lock comes from.
enum Source {
    /// A manager in this process.
    Shards(Box<Config>),
    Agent(AgentRequest),
}

const EXIT_CODES: &str = "\
Exit codes:
  the command's own, or 128+N if signal N killed it
    1  the lock was not acquired: busy or timed out (see --conflict-exit-code)
   64  the command line is invalid
   69  a shard can't be reached, or refused the request
   71  the operating system reported an error
   78  the environment, the configuration file or the shard map is invalid
  117  the lock was lost before the command ended; the command was asked to end
  126  the command can't be executed
  127  the command was not found
128+N  the tool received signal N while waiting for the lock";

/// Accepts a plain number as seconds, like flock(1). The configuration validates everything else.
fn seconds_or_duration(text: &str) -> Result<String, Infallible> {
    let seconds = text
        .parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    Ok(seconds.map_or_else(
        || text.to_owned(),
        |seconds| humantime::format_duration(seconds).to_string(),
    ))
}

/// A number of permits, and the limit on those of all holders together.
#[derive(Debug, Clone, Copy)]
struct Permits {
    weight: u16,
    limit: u16,
}

fn permits(text: &str) -> Result<Permits, String> {
    let numbers = text.split_once('/');
    let numbers = numbers.and_then(|(weight, limit)| Some((weight.parse().ok()?, limit.parse().ok()?)));
    let permits = numbers.map(|(weight, limit)| Permits { weight, limit });
    permits.ok_or_else(|| "must be a number of permits and their limit, such as 1/10".to_owned())
}

/// The pauses between attempts to reach the shards or the agent.
fn retries() -> tool::Backoff {
    tool::Backoff::new(Duration::from_millis(20), Duration::from_secs(1))
}

const GRACE_MAX: Duration = Duration::from_secs(24 * 3600);

fn grace(text: &str) -> Result<Duration, String> {
    let Ok(text) = seconds_or_duration(text);
    let grace = humantime::parse_duration(&text)
        .ok()
        .filter(|&grace| grace <= GRACE_MAX);
    grace.ok_or_else(|| "must be a duration such as 500ms or 10s, from 0s to 1day".to_owned())
}

impl Args {
    fn source(&self, work: &Work<'_>) -> Result<Source, Failure> {
        match self.agent() {
            Some(_) if self.metrics.is_given() => Err(Failure::usage(anyhow!(
                "--metrics is given, but the lock is taken through the agent of SHARDLOCK_AGENT, which has the metrics: \
                 leave --metrics out, or give the shards with --shard"
            ))),
            Some(socket) => Ok(Source::Agent(AgentRequest::new(&socket, self, &work.keys)?)),
            None if self.agent_password_file.is_some() => Err(Failure::usage(anyhow!(
                "--agent-password-file is given, but no agent; give its socket with --agent, or set SHARDLOCK_AGENT"
            ))),
            None => Ok(Source::Shards(Box::new(self.config()?))),
        }
    }

    /// The socket of the agent, if the lock is taken through one.
    fn agent(&self) -> Option<PathBuf> {
        let from_env = || std::env::var_os(serve::AGENT_VARIABLE).filter(|path| !path.is_empty());
        let is_direct = self.shards.is_given();
        let from_env = || from_env().filter(|_| !is_direct).map(PathBuf::from);
        self.agent.clone().or_else(from_env)
    }

    fn config(&self) -> Result<Config, Failure> {
        let mut config = self.shards.load_with_shards()?;
        if let Some(shard) = config.shards.iter().find(|shard| shards::is_in_process(shard)) {
            return Err(Failure::usage(anyhow!(
                "shard {} is {}, a store inside one process, so a lock of this command would keep no other command out; \
                 use a server",
                shard.name,
                shard.url
            )));
        }
        for (name, value) in [
            ("timeout", &self.timeout),
            ("ttl", &self.ttl),
            ("max_hold", &self.max_hold),
            ("min_hold", &self.min_hold),
            ("class", &self.class),
        ] {
            if let Some(value) = value {
                tool::set(&mut config, name, value)?;
            }
        }
        Ok(config)
    }
}

/// Call this while the process has a single thread.
pub(crate) fn run(args: Args) -> Result<u8, Failure> {
    // Report invalid arguments before the fork, from the process that the caller started.
    let work = Work::parse(&args)?;
    let source = args.source(&work)?;
    if let Some(textfile) = Textfile::new(&args.textfile, &work.keys) {
        textfile.check()?;
    }
    drop(work);
    match fork::fork().map_err(Failure::system)? {
        Role::Front(mut front) => front.run(),
        Role::Keeper(keeper) => crate::on_this_thread(keeper.run(args, source)),
    }
}
