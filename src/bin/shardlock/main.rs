//! The command-line tool.

mod demo;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(version, about)]
enum Command {
    Demo(demo::DemoArgs),
    #[command(hide = true)]
    DemoChild(demo::ChildArgs),
}

fn main() -> anyhow::Result<ExitCode> {
    let command = Command::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the asynchronous runtime could not be started")?;
    let code = runtime.block_on(async {
        match command {
            Command::Demo(args) => demo::run(args).await,
            Command::DemoChild(args) => demo::child(args).await,
        }
    })?;
    Ok(code.into())
}
