//! The command-line tool: a thin layer over the library.

mod bench;
mod break_lease;
mod demo;
mod disposition;
mod doctor;
mod exec;
mod exit;
mod generate;
mod held_mode;
mod inspect;
mod load;
mod ls;
mod map;
mod metrics;
mod output;
mod serve;
mod servers;
mod shards;
mod signals;
mod slot;
mod top;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::prelude::*;

use exit::Failure;

/// Distributed locks on Redis for shell scripts and cron jobs, and tools to inspect them.
#[derive(Debug, Parser)]
#[command(name = "shardlock", version, propagate_version = true, after_help = ENVIRONMENT)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const ENVIRONMENT: &str = "\
Environment:
  SHARDLOCK_<SETTING>  any setting of the configuration file, in upper case: SHARDLOCK_SHARDS, SHARDLOCK_TTL, ...
  SHARDLOCK_AGENT      path of the agent's socket, for serve and exec
  SHARDLOCK_AGENT_PASSWORD, SHARDLOCK_AGENT_PASSWORD_FILE
                       the agent's password, or a file with the password in its first line, for exec
  SHARDLOCK_CONFIG     path of the configuration file
  SHARDLOCK_METRICS    address to serve metrics on, like --metrics; if it is unavailable, exec and serve warn and run without it
  SHARDLOCK_LOG        log level on standard error: off, error, warn (the default), info, debug or trace

Empty variables count as unset. Variables that Kubernetes adds for Services are ignored.

Command-line options override the environment, which overrides the file.";

#[derive(Debug, Subcommand)]
enum Command {
    Exec(exec::Args),
    Serve(serve::Args),
    Inspect(inspect::Args),
    Ls(ls::Args),
    Break(break_lease::Args),
    Doctor(doctor::Args),
    Top(top::Args),
    Slot(slot::Args),
    Map(map::Args),
    Demo(demo::DemoArgs),
    Bench(bench::Args),
    #[command(hide = true)]
    Child(load::child::ChildArgs),
    #[command(hide = true)]
    Generate(generate::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // If the output is closed, the exit code still reports the error.
            error.print().ok();
            return if error.use_stderr() { exit::USAGE } else { exit::OK }.into();
        }
    };
    log_to_stderr(&cli.command);
    match run(cli.command) {
        Ok(code) => code.into(),
        Err(failure) => {
            output::eprint(output::one_line(&failure.error));
            failure.code.into()
        }
    }
}

fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Exec(args) => exec::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Inspect(args) => on_this_thread(inspect::run(args)),
        Command::Ls(args) => on_this_thread(ls::run(args)),
        Command::Break(args) => on_this_thread(break_lease::run(args)),
        Command::Doctor(args) => on_this_thread(doctor::run(args)),
        Command::Top(args) => on_this_thread(top::run(args)),
        Command::Slot(args) => slot::run(args),
        Command::Map(args) => on_this_thread(map::run(args)),
        Command::Demo(args) => on_this_thread(async { demo::run(args).await.map_err(|error| Failure::new(1, error)) }),
        Command::Bench(args) => on_this_thread(bench::run(args)),
        Command::Child(args) => load::child::run(args),
        Command::Generate(args) => generate::run(&args),
    }
}

/// Runs a command on the main thread only.
///
/// `exec` depends on this: the kernel ties its child to the *thread* that started it, and the main
/// thread lives as long as the process.
fn on_this_thread(command: impl Future<Output = Result<u8, Failure>>) -> Result<u8, Failure> {
    run_until_done(&mut tokio::runtime::Builder::new_current_thread(), command)
}

/// Runs a command on a runtime of its own, and does not wait for what it has left behind: a lookup
/// of a host name can take much longer than any limit of the command.
fn run_until_done(
    builder: &mut tokio::runtime::Builder,
    command: impl Future<Output = Result<u8, Failure>>,
) -> Result<u8, Failure> {
    let runtime = builder
        .enable_all()
        .build()
        .context("the asynchronous runtime could not be started")
        .map_err(Failure::system)?;
    let outcome = runtime.block_on(command);
    runtime.shutdown_background();
    outcome
}

fn log_to_stderr(command: &Command) {
    let text = std::env::var_os("SHARDLOCK_LOG").filter(|text| !text.is_empty());
    let is_default = text.is_none();
    let is_exec = matches!(command, Command::Exec(_));
    let mut level = text.map_or(LevelFilter::WARN, |text| {
        let level = text.to_str().and_then(|text| text.parse().ok());
        level.unwrap_or_else(|| {
            // A bad log level must not keep a command from running.
            output::eprint(format_args!(
                "SHARDLOCK_LOG is {text:?}, but must be off, error, warn, info, debug or trace; using warn"
            ));
            LevelFilter::WARN
        })
    });
    if matches!(command, Command::Top(args) if args.owns_stderr()) {
        level = LevelFilter::OFF;
    }
    tracing_subscriber::fmt()
        .with_writer(|| output::LogWriter)
        .with_max_level(level)
        // A closed standard error must not end the tool while it holds a lock.
        .log_internal_errors(false)
        .finish()
        // The command itself also reports these events. Once is enough.
        .with(filter_fn(move |event| {
            let has = |field| event.fields().field(field).is_some();
            let is_reported = match event.target() {
                "shardlock::connect" => has("error"),
                "shardlock::slow_log" => is_exec && has("reason"),
                _ => false,
            };
            !is_default || !is_reported
        }))
        .init();
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::error::ErrorKind;
    use clap::{CommandFactory, Parser};

    use super::Cli;

    /// The words of a command in a document, without quotes. What a shell would do with the rest of
    /// the line is left out.
    fn words(command: &str) -> Vec<String> {
        let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
        for char in command.chars() {
            match (char, quote) {
                (char, Some(end)) if char == end => quote = None,
                ('\'' | '"', None) => {
                    quote = Some(char);
                    word.get_or_insert_default();
                }
                (' ', None) => words.extend(word.take()),
                (';' | '|' | '&' | '#', None) => break,
                (char, _) => word.get_or_insert_default().push(char),
            }
        }
        words.extend(word);
        words
    }

    /// The commands of the tool that a document shows: at the start of a line, after a prompt, in a
    /// crontab, a unit of systemd, or as a JSON list.
    fn commands(text: &str) -> Vec<Vec<String>> {
        let (mut found, mut is_code): (Vec<Vec<String>>, _) = (Vec::new(), false);
        for line in text.lines() {
            let line = line.trim();
            if line.starts_with("```") {
                is_code = !is_code;
            }
            let list = line.find("[\"shardlock\", ").map(|at| &line[at..]);
            if let Some(list) = list.filter(|_| is_code) {
                found.push(serde_json::from_str(list).unwrap());
                continue;
            }
            // Kubernetes appends the arguments to the command before.
            if let (Some(list), Some(command)) = (line.strip_prefix("args: "), found.last_mut()) {
                let arguments: Vec<String> = serde_json::from_str(list).unwrap();
                command.extend(arguments);
                continue;
            }
            let starts = ["$ shardlock ", "ExecStart=/usr/bin/shardlock ", "shardlock "];
            let command = starts.iter().find_map(|start| line.strip_prefix(start));
            // A dependency in a Cargo.toml.
            let command = command.filter(|command| !command.starts_with('='));
            let in_crontab = line.split_once("  shardlock ").map(|(_, command)| command);
            if let Some(command) = command.or(in_crontab)
                && (is_code || line.starts_with('$') || in_crontab.is_some())
            {
                found.push(words(&format!("shardlock {command}")));
            }
        }
        found
    }

    #[test]
    fn commands_in_documents_are_valid() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let folders = [root.to_owned(), root.join("docs")];
        let files = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
        let mut count = 0;
        for path in files.map(|entry| entry.unwrap().path()) {
            if path.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            for command in commands(&std::fs::read_to_string(&path).unwrap()) {
                count += 1;
                if let Err(error) = Cli::try_parse_from(&command)
                    && error.kind() != ErrorKind::DisplayHelp
                {
                    panic!("{}: {command:?}: {error}", path.display());
                }
            }
        }
        assert!(count > 15, "only {count} commands were found");
    }

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
