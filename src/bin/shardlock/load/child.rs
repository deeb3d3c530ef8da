//! The hidden command by which the demo and the bench start their child processes, so that none of them outlives them.
//!
//! A worker runs in it. A server replaces it: what the kernel was told before the exec still holds after it, which
//! would otherwise need unsafe code between fork and exec.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::Context;
use clap::{Args, Subcommand};
use tokio::process::{Child, Command};

use crate::exit::Failure;
use crate::{bench, demo};

/// Runs a child process of the demo or the bench, which alone start it
#[derive(Debug, Clone, Args)]
pub(crate) struct ChildArgs {
    /// The process id of the parent.
    parent: u32,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Clone, Subcommand)]
enum Role {
    /// Works for the demo as the lines on its standard input say.
    DemoWorker,
    /// Works for the bench as the lines on its standard input say.
    BenchWorker,
    /// Becomes a program.
    Server {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        program: Vec<OsString>,
    },
}

/// Runs in the child.
///
/// # Errors
///
/// If the parent is gone, if the server can't be started, or if the worker failed before it could say so in its
/// answers.
pub(crate) fn run(args: ChildArgs) -> Result<u8, Failure> {
    let failed = |error| Failure::new(1, error);
    tie_to(args.parent).map_err(failed)?;
    match args.role {
        Role::DemoWorker => demo::work(),
        Role::BenchWorker => bench::work(),
        Role::Server { program } => {
            let (name, rest) = program.split_first().context("no program is named").map_err(failed)?;
            let error = std::process::Command::new(name).args(rest).exec();
            Err(error)
                .with_context(|| format!("{} can't be started", name.display()))
                .map_err(failed)
        }
    }
}

/// The command that starts this program again as a child of this process, killed and reaped when it is dropped.
///
/// It gets a process group of its own, so that a Ctrl-C in the terminal reaches the parent alone, which then stops its
/// children in the right order. It must be started from a thread that lasts as long as the process, since Linux sends the
/// death signal when that *thread* ends: the main thread does.
pub(crate) fn command(role: &str) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("this program can't find itself")?;
    let mut command = Command::new(program);
    command
        .args(["child", &std::process::id().to_string(), role])
        .process_group(0)
        .kill_on_drop(true);
    Ok(command)
}

/// Kills a child that was started so, unless it has ended already. Done when it is gone.
pub(crate) async fn end(process: &mut Child) -> std::io::Result<()> {
    // One that has been waited for has no id any more, and can't be killed.
    if process.id().is_some() {
        process.kill().await?;
    }
    Ok(())
}

/// Has the kernel kill this process when its parent dies. Elsewhere than on Linux, a worker ends with its standard
/// input, and a server outlives a parent that was killed by SIGKILL.
fn tie_to(parent: u32) -> anyhow::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, set_parent_process_death_signal};
        set_parent_process_death_signal(Some(Signal::KILL)).context("the kernel does not tell when the parent ends")?;
    }
    // It may have died just before; then no signal would ever come.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    anyhow::ensure!(now == Some(parent), "only this program itself starts this command");
    Ok(())
}
