//! The completions for shells and the man pages, from the definition of the command line. The
//! results are in `cli/generated`, for packages.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::Cli;
use crate::exit::{self, Failure};

/// Write the completions for shells and the man pages to a directory
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory; the files in it are replaced
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

const NAME: &str = "shardlock";

pub(crate) fn run(args: &Args) -> Result<u8, Failure> {
    for (path, contents) in files().map_err(Failure::system)? {
        write(&args.directory.join(path), &contents).map_err(Failure::system)?;
    }
    Ok(exit::OK)
}

fn write(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let failed = || format!("{} can't be written", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(failed)?;
    }
    fs::write(path, contents).with_context(failed)
}

/// All files, with paths relative to the directory.
fn files() -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    for (shell, name) in [
        (Shell::Bash, "shardlock.bash"),
        (Shell::Fish, "shardlock.fish"),
        (Shell::Zsh, "_shardlock"),
    ] {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut visible(), NAME, &mut script);
        files.push((Path::new("completions").join(name), script));
    }
    let mut tool = visible();
    tool.build();
    pages(&tool, NAME, &mut files)?;
    Ok(files)
}

/// The pages of a command and its subcommands: `shardlock`, `shardlock-map`, `shardlock-map-set`.
fn pages(command: &Command, name: &str, files: &mut Vec<(PathBuf, Vec<u8>)>) -> anyhow::Result<()> {
    for subcommand in command.get_subcommands().filter(|command| command.get_name() != "help") {
        pages(subcommand, &format!("{name}-{}", subcommand.get_name()), files)?;
    }
    // Clap only takes names that live as long as the process, which ends soon.
    let title: &'static str = name.to_owned().leak();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(title)).render(&mut page)?;
    files.push((Path::new("man").join(format!("{name}.1")), page));
    Ok(())
}

/// The command line without hidden commands.
fn visible() -> Command {
    let whole = Cli::command();
    let shown = whole
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .cloned();
    Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .propagate_version(true)
        .about(whole.get_about().cloned().unwrap_or_default())
        .after_help(whole.get_after_help().cloned().unwrap_or_default())
        .subcommand_required(true)
        .subcommands(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADVICE: &str = "run `cargo run --package shardlock-cli -- generate cli/generated`";

    #[test]
    fn checked_in_completions_and_man_pages_are_those_of_this_command_line() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("generated");
        let files = files().unwrap();
        for (path, contents) in &files {
            let found = fs::read(directory.join(path)).unwrap_or_default();
            assert!(found == *contents, "{} is out of date: {ADVICE}", path.display());
        }
        let folders = ["completions", "man"].map(|folder| fs::read_dir(directory.join(folder)).unwrap());
        let present = folders.into_iter().flatten().count();
        assert_eq!(
            present,
            files.len(),
            "a file is left of a command that is gone: {ADVICE}"
        );
    }
}
