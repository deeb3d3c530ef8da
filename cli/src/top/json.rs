//! The model as one JSON document.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::model::{ClientRow, HeldRow, HotRow, LockRates, Model, ShardRow, SourceState, View};
use super::source::{Age, Quantiles};

/// The sources, the totals, and the rows of the given views in their default order. Times are in
/// milliseconds, rates per second; what is unknown is null.
pub(super) fn document(model: &Model, views: &[View], now: Instant) -> Value {
    let (rows, totals) = (model.rows(), model.totals());
    let mut document = Map::new();
    let sources = model.sources().iter().map(|state| source(state, model, now));
    document.insert("sources".to_owned(), sources.collect());
    let totals = json!({
        "locks_per_second": totals.locks_per_s,
        "waiters": totals.waiters,
        "held": totals.held,
        "shards_up": totals.shards_up,
        "shards": totals.shards,
    });
    document.insert("totals".to_owned(), totals);
    for view in views {
        let (name, rows): (_, Value) = match view {
            View::Hot => ("hot", rows.hot.iter().map(hot).collect()),
            View::Held => ("held", rows.held.iter().map(held).collect()),
            View::Shards => ("shards", rows.shards.iter().map(shard).collect()),
            View::Clients => ("clients", rows.clients.iter().map(client).collect()),
        };
        document.insert(name.to_owned(), rows);
    }
    document.into()
}

fn source(state: &SourceState, model: &Model, now: Instant) -> Value {
    let sample = state.sample();
    let unavailable = model.unavailable(now).find(|source| source.label == state.label);
    json!({
        "source": state.label,
        "manager": sample.and_then(|sample| sample.manager.as_ref()),
        "uptime_ms": sample.and_then(|sample| sample.uptime).map(whole_millis),
        "note": sample.and_then(|sample| sample.note.as_ref()),
        "unavailable": unavailable.map(|source| source.reason),
    })
}

fn hot(row: &HotRow) -> Value {
    json!({
        "key": row.key,
        "shard": row.shard,
        "holder": row.holder,
        "age_ms": row.age.map(age),
        "waiters": row.waiters,
        "wait_ms": row.waits.map(quantiles),
        "contended": row.contended,
        "contended_per_second": row.rate,
        "stale": row.stale,
    })
}

fn held(row: &HeldRow) -> Value {
    json!({
        "key": row.key,
        "shard": row.shard,
        "mode": row.mode.kind(),
        "holder": row.holder,
        "holders": row.mode.holders(),
        "permits_in_use": row.mode.permits_in_use(),
        "permits_limit": row.mode.permits_limit(),
        "age_ms": age(row.age),
        "remaining_ms": row.remaining.map(whole_millis),
        "waiters": row.waiters,
        "token": row.token,
        "caller": row.caller,
        "stale": row.stale,
    })
}

fn shard(row: &ShardRow) -> Value {
    json!({
        "name": row.name,
        "kind": row.kind,
        "up": row.up == row.of,
        "up_for": row.up,
        "processes": row.of,
        "leases": row.leases,
        "waiters": row.waiters,
        "locks_per_second": row.rates.map(rates),
        // None has been measured if they are zero.
        "round_trip_ms": (!row.round_trips.p99.is_zero()).then(|| quantiles(row.round_trips)),
        "stale": row.stale,
    })
}

/// What the agent has returned, and the agent.
fn client(row: &ClientRow) -> Value {
    let mut client = json!(row.process);
    if let Value::Object(client) = &mut client {
        client.insert("agent".to_owned(), json!(row.agent));
        client.insert("stale".to_owned(), json!(row.stale));
    }
    client
}

/// For a store, the time since the holder was first seen.
fn age(age: Age) -> u64 {
    whole_millis(age.time)
}

fn rates(rates: LockRates) -> Value {
    json!({ "acquired": rates.acquired, "local": rates.local, "remote": rates.remote })
}

fn quantiles(quantiles: Quantiles) -> Value {
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    json!({ "p50": millis(quantiles.p50), "p99": millis(quantiles.p99) })
}

fn whole_millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
