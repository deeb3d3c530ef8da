//! Finds the servers that store the map of a shard, and accesses them.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use deadpool_redis::Connection;
use deadpool_redis::redis::{Cmd, FromRedisValue, cmd};
use shardlock::config::{Endpoint, ShardConfig};
use shardlock::tool::{self, LeaseOwner, ServerUrl, owner_of_lease};

use crate::exit::{self, Failure};
use crate::servers::{Connector, escape_glob, primaries, query};

/// The time limit for searching a server for leases.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(20);
/// The keys that a server scans in one step.
const KEYS_PER_STEP: u64 = 1000;

/// Replaces the map if it is unchanged, and returns whether it was. An empty text means no map.
const SWAP: &str =
    "if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end redis.call('SET', KEYS[1], ARGV[2]) return 1";

/// A server, or the servers of a cluster, that store the map of a shard, or of one of its nodes.
pub(super) struct Location {
    kind: Kind,
    label: String,
}

enum Kind {
    Server(ServerUrl),
    /// The primary that has the map's key, and all primaries.
    Cluster {
        owner: ServerUrl,
        primaries: Vec<ServerUrl>,
    },
    #[cfg(feature = "etcd")]
    Etcd(Vec<ServerUrl>),
}

/// Whether any lock is held or waited for.
pub(super) enum Leases {
    None,
    Some {
        example: String,
        owner: String,
    },
    /// There was not enough time to check all keys.
    Unknown,
}

/// The locations of a shard's map; empty for a shard in memory.
///
/// # Errors
///
/// If the servers can't be determined.
pub(super) async fn find(shard: &ShardConfig, connector: &Connector<'_>) -> Result<Vec<Location>, Failure> {
    let unknown = |reason: anyhow::Error| {
        let context = format!("shard {}: its servers can't be found", shard.name);
        Failure::new(exit::UNAVAILABLE, reason.context(context))
    };
    let endpoint = Endpoint::parse(&shard.url).map_err(Failure::config)?;
    #[cfg(feature = "etcd")]
    if matches!(endpoint.scheme(), "etcd" | "etcds") {
        let servers = tool::servers(&endpoint);
        let addresses: Vec<_> = servers.iter().map(ServerUrl::place).collect();
        return Ok(vec![Location {
            label: addresses.join(","),
            kind: Kind::Etcd(servers),
        }]);
    }
    let Some(servers) = primaries(&endpoint, connector).await.map_err(unknown)? else {
        return Ok(Vec::new());
    };
    if matches!(endpoint.scheme(), "redis+cluster" | "rediss+cluster") {
        let owner = map_key_owner(&servers, connector)
            .await
            .map_err(|reason| unknown(anyhow!(reason)))?;
        return Ok(vec![Location {
            label: owner.place().to_owned(),
            kind: Kind::Cluster {
                owner,
                primaries: servers,
            },
        }]);
    }
    let location = |server: ServerUrl| Location {
        label: server.place().to_owned(),
        kind: Kind::Server(server),
    };
    Ok(servers.into_iter().map(location).collect())
}

/// The node of a cluster that has the map's key: the others redirect.
async fn map_key_owner(primaries: &[ServerUrl], connector: &Connector<'_>) -> Result<ServerUrl, String> {
    let mut last_error = "no primary has slots".to_owned();
    for server in primaries {
        match query_once(server, connector, cmd("GET").arg(tool::map_key(connector.config))).await {
            Ok::<Option<String>, _>(_) => return Ok(server.clone()),
            Err(reason) => last_error = format!("{}: {reason}", server.place()),
        }
    }
    Err(last_error)
}

impl Location {
    /// `host:port`; in a cluster, of the node that has the map's key.
    pub(super) fn label(&self) -> String {
        self.label.clone()
    }

    pub(super) async fn read(&self, connector: &Connector<'_>) -> Result<Option<String>, String> {
        let key = tool::map_key(connector.config);
        match &self.kind {
            Kind::Server(server) | Kind::Cluster { owner: server, .. } => {
                let stored: Option<Vec<u8>> = query_once(server, connector, cmd("GET").arg(key)).await?;
                Ok(stored.map(|stored| String::from_utf8_lossy(&stored).into_owned()))
            }
            #[cfg(feature = "etcd")]
            Kind::Etcd(servers) => super::etcd::read(servers, connector, &key).await,
        }
    }

    /// Stores `new` if `old` is stored; `None` means that no map must be stored.
    pub(super) async fn swap(&self, connector: &Connector<'_>, old: Option<&str>, new: &str) -> Result<(), String> {
        let key = tool::map_key(connector.config);
        let swapped = match &self.kind {
            Kind::Server(server) | Kind::Cluster { owner: server, .. } => {
                let mut swap = cmd("EVAL");
                swap.arg(SWAP).arg(1).arg(key).arg(old.unwrap_or_default()).arg(new);
                query_once::<bool>(server, connector, &swap).await?
            }
            #[cfg(feature = "etcd")]
            Kind::Etcd(servers) => super::etcd::swap(servers, connector, &key, old, new).await?,
        };
        match swapped {
            true => Ok(()),
            false => Err("it was changed in the meantime".to_owned()),
        }
    }

    /// The names of the listening managers. Empty on etcd, which does not have them. In a cluster,
    /// only managers that have locked recently are listed.
    pub(super) async fn listeners(&self, connector: &Connector<'_>) -> Result<Vec<String>, String> {
        let namespace = escape_glob(&connector.config.namespace);
        let (servers, list, pattern) = match &self.kind {
            Kind::Server(server) => (std::slice::from_ref(server), "CHANNELS", format!("{namespace}in:*")),
            Kind::Cluster { primaries, .. } => (&primaries[..], "SHARDCHANNELS", format!("{namespace}in:{{*}}:*")),
            #[cfg(feature = "etcd")]
            Kind::Etcd(_) => return Ok(Vec::new()),
        };
        let mut names = Vec::new();
        for server in servers {
            let mut channels = cmd("PUBSUB");
            channels.arg(list).arg(&pattern);
            let channels: Vec<Vec<u8>> = query_once(server, connector, &channels).await?;
            let name = |channel: &Vec<u8>| {
                let channel = String::from_utf8_lossy(channel);
                channel.rsplit(':').next().unwrap_or_default().to_owned()
            };
            names.extend(channels.iter().map(name));
        }
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Whether a manager holds or waits for a lock here.
    pub(super) async fn leases(&self, connector: &Connector<'_>) -> Result<Leases, String> {
        let servers = match &self.kind {
            Kind::Server(server) => std::slice::from_ref(server),
            Kind::Cluster { primaries, .. } => primaries,
            #[cfg(feature = "etcd")]
            Kind::Etcd(servers) => return super::etcd::leases(servers, connector).await,
        };
        for server in servers {
            match leases_on(server, connector).await? {
                Leases::None => {}
                found => return Ok(found),
            }
        }
        Ok(Leases::None)
    }
}

/// Searches the keys of the namespace on one server.
async fn leases_on(server: &ServerUrl, connector: &Connector<'_>) -> Result<Leases, String> {
    let mut connection = connect(server, connector).await?;
    let (began, mut cursor) = (Instant::now(), 0_u64);
    loop {
        let mut step = cmd("SCAN");
        step.arg(cursor)
            .arg("MATCH")
            .arg(format!("{}*", escape_glob(&connector.config.namespace)));
        step.arg("COUNT").arg(KEYS_PER_STEP);
        let (next, names): (u64, Vec<Vec<u8>>) = query(&mut connection, &step).await?;
        for name in &names {
            let key = std::str::from_utf8(name)
                .ok()
                .and_then(|name| tool::key_of_lease(connector.config, name));
            let Some(key) = key else { continue };
            let value: Option<Vec<u8>> = match query(&mut connection, cmd("GET").arg(name)).await {
                Ok(value) => value,
                // A value that is not a string is not a lease.
                Err(reason) if reason.contains("WRONGTYPE") => None,
                Err(reason) => return Err(reason),
            };
            let value = String::from_utf8_lossy(&value.unwrap_or_default()).into_owned();
            let owner = match owner_of_lease(&value) {
                LeaseOwner::Manager(_) => value,
                LeaseOwner::Several => "several holders".to_owned(),
                LeaseOwner::Other => continue,
            };
            let example = key.to_string();
            return Ok(Leases::Some { example, owner });
        }
        cursor = next;
        if cursor == 0 {
            return Ok(Leases::None);
        }
        if began.elapsed() >= SEARCH_TIME_MAX {
            return Ok(Leases::Unknown);
        }
    }
}

async fn connect(server: &ServerUrl, connector: &Connector<'_>) -> Result<Connection, String> {
    connector.connect(server).await.map_err(|error| error.reason)
}

/// Sends a single command.
async fn query_once<T: FromRedisValue>(
    server: &ServerUrl,
    connector: &Connector<'_>,
    command: &Cmd,
) -> Result<T, String> {
    let mut connection = connect(server, connector).await?;
    query(&mut connection, command).await
}
