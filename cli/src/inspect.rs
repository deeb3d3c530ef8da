//! `shardlock inspect`: the holder and the queue of a key.

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use shardlock::LockKey;
use shardlock::introspect::{Holder, KeyState};
use shardlock::tool::printable;

use crate::exit::{self, Failure};
use crate::{output, shards};

/// Show who holds a key and who waits for it
///
/// The exit code is 0 if the shard answered, whether the key is held or not.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The name of the lock
    key: String,

    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

/// How many waiting managers the text output lists. JSON has all that the library returns.
const WAITERS_SHOWN: usize = 10;
/// The same for shared holders and holders of permits.
const HOLDERS_SHOWN: usize = 10;

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    let key = LockKey::new(&args.key)?;
    let locks = args.shards.connect(args.shards.load_with_shards()?).await?;
    let state = locks.inspect(&key).await?;
    // A connected manager has shards.
    let shard = locks.shard_map().name(key.slot()).unwrap_or_default();
    let json = as_json(&key, shard, &state).map_err(Failure::system)?;
    args.format.print(&json, &as_text(&key, shard, &state))?;
    Ok(exit::OK)
}

fn as_json(key: &LockKey, shard: &str, state: &KeyState) -> serde_json::Result<Value> {
    #[derive(Serialize)]
    struct Inspected<'a> {
        key: &'a str,
        slot: u16,
        shard: &'a str,
        #[serde(flatten)]
        state: &'a KeyState,
    }

    serde_json::to_value(Inspected {
        key: key.as_str(),
        slot: key.slot().number(),
        shard,
        state,
    })
}

fn as_text(key: &LockKey, shard: &str, state: &KeyState) -> String {
    let holder = match &state.holder {
        Some(holder) => describe(holder),
        None if state.holder_count == 0 => "nobody".to_owned(),
        None => format!(
            "{} together, {} permits in use",
            state.holder_count, state.permits_in_use
        ),
    };
    let token = state.last_token.map_or_else(
        || "none issued in this slot yet".to_owned(),
        |token| format!("{token} was the last one issued in this slot"),
    );
    let mut text = format!(
        "key      {}\nslot     {} on shard {shard}\nholder   {holder}\ntoken    {token}\n",
        printable(key.as_str()),
        key.slot()
    );
    for holder in state.holders.iter().take(HOLDERS_SHOWN) {
        // Writing to a string can't fail.
        writeln!(text, "         {}: {}", holder.mode, describe(holder)).ok();
    }
    if state.holder_count > HOLDERS_SHOWN as u64 {
        text.push_str("         and more\n");
    }
    writeln!(text, "waiting  {}", state.queue_length).ok();
    for (position, owner) in state.queue.iter().take(WAITERS_SHOWN).enumerate() {
        // Writing to a string can't fail.
        writeln!(text, "{:>7}. {}", position + 1, printable(owner)).ok();
    }
    if state.queue_length > WAITERS_SHOWN as u64 {
        text.push_str("         and more\n");
    }
    text
}

fn describe(holder: &Holder) -> String {
    let is_kept = shardlock::tool::is_kept_by_min_hold(&holder.owner);
    let kind = match (holder.is_manager, is_kept) {
        (true, true) => "kept by min_hold, its holder has released it",
        (true, false) => "a shardlock manager",
        (false, _) => "not a shardlock manager",
    };
    let end = match holder.remaining {
        Some(remaining) => {
            let millis = Duration::from_millis(remaining.as_millis() as u64);
            let unless = if is_kept { "" } else { " unless renewed" };
            format!("its lease ends in {}{unless}", humantime::format_duration(millis))
        }
        None => "its lease never expires".to_owned(),
    };
    format!("{}, {kind}; {end}", printable(&holder.owner))
}
