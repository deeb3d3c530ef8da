//! `shardlock break`: ends the lease of a named owner.

use std::fmt::Write;
use std::time::Duration;

use anyhow::anyhow;
use serde_json::json;
use shardlock::introspect::{Holder, KeyState};
use shardlock::tool::{self, BreakOutcome, printable};
use shardlock::{LockKey, LockManager};

use crate::exit::{self, Failure};
use crate::{output, shards};

/// End a lease and pass the key on to the next waiter
///
/// The holder is not notified. It learns of the loss when it next renews its lease, after a tenth
/// of the TTL by default, and may use the key until then. The fencing tokens of later holders are
/// larger than those of the lease. If you can, end the holder's process instead.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The name of the lock
    key: String,

    /// Whose lease to end, as `inspect` and `ls` show it
    ///
    /// One owner of several that hold the key together, or the exact value of another library.
    /// Without it, nothing is changed and the present owners are shown.
    #[arg(long, value_name = "OWNER", allow_hyphen_values = true)]
    owner: Option<String>,

    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
The owner is compared with the lease in the same step that ends it, so a lease that has changed
hands meanwhile is left alone. Waiters get the key as after a release: the first one, or several if
they can hold it together. redlock:// and etcd:// shards refuse this, and the error explains why.

Exit code:
  0   the lease was ended
  1   the owner does not hold the key; nothing was changed
  64  the command line is invalid, or --owner is missing; nothing was changed
  69  the shard is unreachable or refused the request
  78  the environment, the configuration file or the shard map is wrong";

/// How many owners a message lists.
const OWNERS_SHOWN: usize = 10;

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    let key = LockKey::new(&args.key)?;
    let locks = args.shards.connect(args.shards.load_with_shards()?).await?;
    let Some(owner) = &args.owner else {
        return Err(refuse_without_owner(&key, &locks.inspect(&key).await?));
    };
    let mut owner = owner.clone();
    let mut broken = tool::break_lease(&locks, &key, &owner).await?;
    // Messages show an owner in printable form, and that is what people copy.
    let is_meant = |held: &&str| *held != owner && printable(held) == owner.as_str();
    let meant = match &broken {
        BreakOutcome::NotHeld { now } => owners(now).find(is_meant).map(str::to_owned),
        BreakOutcome::Done { .. } => None,
    };
    if let Some(meant) = meant {
        owner = meant;
        broken = tool::break_lease(&locks, &key, &owner).await?;
    }
    match broken {
        BreakOutcome::NotHeld { now } => {
            let message = format!(
                "{} is not held by {}; nothing was changed; {}",
                printable(key.as_str()),
                printable(&owner),
                describe(&key, &now)
            );
            Err(Failure::new(exit::NOT_HELD, anyhow!(message)))
        }
        BreakOutcome::Done { before } => {
            report(&args, &key, &owner, &before, &locks).await?;
            Ok(exit::OK)
        }
    }
}

fn refuse_without_owner(key: &LockKey, state: &KeyState) -> Failure {
    match owners(state).next() {
        None => Failure::new(exit::NOT_HELD, anyhow!("{}", describe(key, state))),
        Some(_) => Failure::usage(anyhow!(
            "--owner is missing, so nothing was changed; {}",
            describe(key, state)
        )),
    }
}

async fn report(
    args: &Args,
    key: &LockKey,
    owner: &str,
    before: &KeyState,
    locks: &LockManager,
) -> Result<(), Failure> {
    // The lease is ended. That its next holder can't be read must not look like a failure of that.
    let now = locks.inspect(key).await;
    let was = holders(before).find(|holder| holder.owner == owner);
    let left = was.and_then(|holder| holder.remaining);
    let json = json!({
        "key": key.as_str(),
        "broken": owner,
        "remaining_ms": left.map(|left| left.as_millis() as u64),
        "now": now.as_ref().ok(),
    });
    let mut text = format!("ended    the lease of {}", printable(owner));
    // Writing to a string can't fail.
    if let Some(left) = left {
        let left = Duration::from_millis(left.as_millis() as u64);
        write!(text, ", which had {} left", humantime::format_duration(left)).ok();
    }
    match &now {
        Ok(now) => {
            let holders: Vec<_> = owners(now).take(OWNERS_SHOWN).map(printable).collect();
            let holders = if holders.is_empty() {
                "nobody".to_owned()
            } else {
                holders.join(" ")
            };
            write!(text, "\nholder   {holders}\nwaiting  {}", now.queue_length).ok();
        }
        Err(error) => {
            write!(text, "\nholder   unknown: {error}").ok();
        }
    }
    args.format.print(&json, &text)
}

fn holders(state: &KeyState) -> impl Iterator<Item = &Holder> {
    state.holder.iter().chain(&state.holders)
}

fn owners(state: &KeyState) -> impl Iterator<Item = &str> {
    holders(state).map(|holder| holder.owner.as_str())
}

/// The owners of a key, and what to add to the command to end the lease of one.
fn describe(key: &LockKey, state: &KeyState) -> String {
    let key = printable(key.as_str());
    let shown: Vec<_> = owners(state).take(OWNERS_SHOWN).collect();
    let Some(first) = shown.first() else {
        return format!("nobody holds {key}");
    };
    let mut text = format!("{key} is held by {}", printable(first));
    for owner in &shown[1..] {
        // Writing to a string can't fail.
        write!(text, " and {}", printable(owner)).ok();
    }
    if state.holder_count > shown.len() as u64 {
        text.push_str(" and more");
    }
    write!(
        text,
        "; to end that lease, repeat the command with --owner {}",
        quoted(&printable(first))
    )
    .ok();
    text
}

/// The text as one word of a shell.
fn quoted(text: &str) -> String {
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "-_.:/@%+=,".contains(char);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn an_owner_is_one_word_of_a_shell() {
        assert_eq!(quoted("h-1-00:2-10000-7b6a068d-p2-10"), "h-1-00:2-10000-7b6a068d-p2-10");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }
}
