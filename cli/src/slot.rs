//! `shardlock slot`: the slot and shard of a key.

use serde_json::json;
use shardlock::LockKey;

use crate::exit::{self, Failure};
use crate::{output, shards};

/// Show the slot of a key and the shard that owns it
///
/// No server is contacted. If no shards are configured, only the slot is shown.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The name of the lock
    key: String,

    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

pub(crate) fn run(args: Args) -> Result<u8, Failure> {
    let key = LockKey::new(&args.key)?;
    let slot = key.slot();
    let config = args.shards.load()?;
    let map = config.shard_map();
    let owner = map.name(slot).zip(map.slots(map.index(slot)));
    let json = json!({
        "key": key.as_str(),
        "slot": slot.number(),
        "shard": owner.as_ref().map(|(name, _)| name),
        "shard_slots": owner.as_ref().map(|(_, slots)| [slots.start(), slots.end()]),
    });
    let text = match &owner {
        Some((name, slots)) => format!(
            "slot {slot} on shard {name}, which owns {} to {}",
            slots.start(),
            slots.end()
        ),
        None => format!("slot {slot}"),
    };
    args.format.print(&json, &text)?;
    Ok(exit::OK)
}
