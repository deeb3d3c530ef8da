//! The hidden command with which the demo and the bench start their child processes, so that none
//! of them outlives its parent.
//!
//! A worker runs inside this command; a server replaces it. The kernel keeps the parent-death
//! signal across the exec. Setting it between fork and exec would need unsafe code.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::Context;
use clap::{Args, Subcommand};
use tokio::process::{Child, Command};

use crate::exit::Failure;
use crate::{bench, demo};

/// Runs a child process of the demo or the bench; for internal use
#[derive(Debug, Clone, Args)]
pub(crate) struct ChildArgs {
    /// The process id of the parent.
    parent: u32,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Clone, Subcommand)]
enum Role {
    /// Runs a worker of the demo, which reads its commands from standard input.
    DemoWorker,
    /// Runs a worker of the bench, which reads its commands from standard input.
    BenchWorker,
    /// Replaces this process by a program.
    Server {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        program: Vec<OsString>,
    },
}

/// Runs the child process.
///
/// # Errors
///
/// If the parent is gone, the server can't be started, or the worker failed before it could report
/// the error in its replies.
pub(crate) fn run(args: ChildArgs) -> Result<u8, Failure> {
    let failed = |error| Failure::new(1, error);
    die_with_parent(args.parent).map_err(failed)?;
    match args.role {
        Role::DemoWorker => demo::run_worker(),
        Role::BenchWorker => bench::run_worker(),
        Role::Server { program } => {
            let (name, rest) = program.split_first().context("no program is given").map_err(failed)?;
            let error = std::process::Command::new(name).args(rest).exec();
            Err(error)
                .with_context(|| format!("{} can't be started", name.display()))
                .map_err(failed)
        }
    }
}

/// A command that starts this program again as a child of this process. The child is killed and
/// reaped on drop.
///
/// The child gets its own process group, so that Ctrl-C in the terminal only reaches the parent,
/// which then stops its children in the right order. Spawn it from a thread that lives as long as
/// the process, such as the main thread: Linux sends the death signal when that *thread* ends.
pub(crate) fn command(role: &str) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("the path of this program can't be determined")?;
    let mut command = Command::new(program);
    command
        .args(["child", &std::process::id().to_string(), role])
        .process_group(0)
        .kill_on_drop(true);
    Ok(command)
}

/// Kills a child started with [`command`], unless it has already ended, and waits until it is gone.
pub(crate) async fn kill_and_reap(process: &mut Child) -> std::io::Result<()> {
    // A child that has been waited for has no id and can't be killed.
    if process.id().is_some() {
        process.kill().await?;
    }
    Ok(())
}

/// Makes the kernel kill this process when its parent dies. On systems other than Linux, a worker
/// ends with its standard input, and a server outlives a parent that was killed by SIGKILL.
fn die_with_parent(parent: u32) -> anyhow::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, set_parent_process_death_signal};
        set_parent_process_death_signal(Some(Signal::KILL)).context("can't tie this process to its parent")?;
    }
    // The parent may have died just before; no signal would arrive then.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    anyhow::ensure!(now == Some(parent), "this command is for internal use only");
    Ok(())
}
