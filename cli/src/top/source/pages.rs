//! The JSON of the admin endpoint. Unknown fields, as of newer versions, are ignored.

use std::time::Duration;

use serde::Deserialize;
use shardlock::introspect;

use crate::serve::ClientsPage;

use super::{Age, HeldLock, HeldMode, Holder, HotKey, Locks, Quantiles, Sample, Shard, process_of};

/// `/hot`
#[derive(Debug, Deserialize)]
pub(super) struct HotPage {
    keys: Vec<introspect::HotKey>,
}

/// `/held`
#[derive(Debug, Deserialize)]
pub(super) struct HeldPage {
    total: usize,
    held: Vec<introspect::HeldLock>,
}

/// `/shards`
#[derive(Debug, Deserialize)]
pub(super) struct ShardsPage {
    shards: Vec<introspect::ShardState>,
    manager: String,
    uptime_s: f64,
}

const fn exactly(time: Duration) -> Age {
    Age { time, at_least: false }
}

/// Combines the pages into a sample. Only an agent has clients.
pub(super) fn read(hot: HotPage, held: HeldPage, shards: ShardsPage, clients: Option<ClientsPage>) -> Sample {
    let process = process_of(&shards.manager);
    let hot = hot.keys.into_iter().map(|hot| HotKey {
        holder: hot.holder.map(|holder| Holder {
            process: process.to_owned(),
            age: exactly(holder.held),
        }),
        waits: Some(Quantiles {
            p50: hot.waits.p50,
            p99: hot.waits.p99,
        }),
        key: hot.key,
        shard: hot.shard,
        contended: Some(hot.contended),
        waiters: hot.waiters,
    });
    let locks = held.held.into_iter().map(|lock| HeldLock {
        holder: process_of(&lock.owner).to_owned(),
        key: lock.key,
        shard: lock.shard,
        mode: HeldMode::of_guard(lock.mode),
        age: exactly(lock.age),
        remaining: Some(lock.remaining),
        waiters: lock.waiters,
        token: Some(lock.token.get()),
        caller: lock.caller,
    });
    Sample {
        hot: hot.collect(),
        held: locks.collect(),
        held_total: held.total,
        shards: shards.shards.into_iter().map(shard).collect(),
        // Invalid durations, such as negative ones, become zero.
        uptime: Some(Duration::try_from_secs_f64(shards.uptime_s).unwrap_or_default()),
        manager: Some(shards.manager),
        clients,
        note: None,
    }
}

fn shard(shard: introspect::ShardState) -> Shard {
    Shard {
        name: shard.name,
        kind: shard.kind,
        up: shard.is_up,
        leases: shard.leases,
        waiters: shard.waiters,
        locks: Some(Locks {
            acquired: shard.acquired,
            local: shard.local,
            remote: shard.remote,
        }),
        round_trips: Quantiles {
            p50: shard.round_trips.p50,
            p99: shard.round_trips.p99,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page<T: for<'a> Deserialize<'a>>(json: &str) -> T {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_pages_of_a_process_are_read_and_unknown_fields_passed_over() {
        let sample = read(
            page(
                r#"{"keys":[{"key":"k","shard":"s","contended":7,"acquired":5,"overcount_max":1,"waiters":2,
                     "holder":{"held_ms":1.5,"token":9},"wait_ms":{"p50":0.25,"p99":2.0,"max":3.0},"new":[]}],"k":64}"#,
            ),
            page(
                r#"{"total":3,"held":[{"key":"k","shard":"s","owner":"vm-1-0123456789abcdef:4","token":9,"age_ms":1.5,
                     "remaining_ms":-1.0,"waiters":2,"caller":null}]}"#,
            ),
            page(
                r#"{"shards":[{"name":"s","kind":"redis","up":true,"leases":1,"waiters":2,"acquired":30,"local":20,"remote":5,
                     "round_trip_ms":{"p50":0.1,"p99":0.2}}],"manager":"vm-1-0123456789abcdef","uptime_s":61.5}"#,
            ),
            Some(page(
                r#"{"total":1,"connections":2,"connections_max":10,"locks":1,"waiting":0,"new":1,"clients":[
                     {"pid":7,"uid":0,"gid":0,"address":null,"name":"","library":"","connections":2,"age_ms":9.5,
                      "locks":1,"waiting":0,"waits":[],"held":[{"key":"k","mode":"shared","token":9,"age_ms":1.5,
                      "remaining_ms":3,"connection":4,"new":null}]}]}"#,
            )),
        );
        let age = exactly(Duration::from_micros(1500));
        assert_eq!(
            sample.hot[0].holder,
            Some(Holder {
                process: "vm-1".to_owned(),
                age
            })
        );
        assert_eq!(
            sample.hot[0].waits.map(|waits| waits.p99),
            Some(Duration::from_millis(2))
        );
        assert_eq!((sample.held_total, sample.held[0].age), (3, age));
        assert_eq!(
            (sample.held[0].holder.as_str(), sample.held[0].remaining),
            ("vm-1", Some(Duration::ZERO))
        );
        assert_eq!(sample.shards[0].locks.map(|locks| locks.local), Some(20));
        assert_eq!(sample.clients.unwrap().clients[0].held[0].token, 9);
        assert_eq!(sample.uptime, Some(Duration::from_millis(61_500)));
    }
}
