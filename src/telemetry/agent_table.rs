//! The table of the metrics that the agent of the command-line tool (`shardlock serve`) adds to
//! those of its manager. It is here so that the checks of names, documents, dashboard and alerts
//! cover it.

use super::table::{Metric, MetricKind, MetricUnit, metric_table};

metric_table! {
    /// The metrics of an agent.
    pub AGENT_METRICS;
    /// How many connections there are.
    CONNECTIONS = "shardlock_agent_connections", Gauge, Count, [],
        "connections of clients to the agent",
        "near shardlock_agent_connections_limit: look at /clients of the admin endpoint; a worker opens connections \
         and does not close them, or there are more workers than --max-connections was set for";
    /// How many connections there may be.
    CONNECTIONS_LIMIT = "shardlock_agent_connections_limit", Gauge, Count, [],
        "the most connections that the agent accepts: --max-connections",
        "changes only with a restart of the agent";
    /// Connections beyond the limit.
    CONNECTIONS_REFUSED = "shardlock_agent_connections_refused_total", Counter, Count, [],
        "connections that were closed at once because there were as many as --max-connections",
        "growing: workers get no locks; see shardlock_agent_connections";
    /// Requests, by command.
    AGENT_REQUESTS = "shardlock_agent_requests_total", Counter, Count, ["command"],
        "requests of clients by command, in lower case, including those that were refused; unknown for names that \
         are not commands of the agent",
        "many held per lock: clients ask for the validity more often than they need to; unknown: a client takes the \
         agent for a Redis server";
    /// Requests after which a connection was closed.
    PROTOCOL_ERRORS = "shardlock_agent_protocol_errors_total", Counter, Count, ["kind"],
        "connections that were closed because of what the client sent: malformed (not a request) or too_long (more \
         than --max-request-bytes)",
        "malformed: something other than a client connects, or a client library has a bug; too_long: raise \
         --max-request-bytes if keys and options are as long as that; the log has the process";
    /// Locks that clients hold.
    AGENT_LOCKS = "shardlock_agent_locks", Gauge, Count, [],
        "locks that clients of the agent hold",
        "growing without bound: workers keep locks; /clients of the admin endpoint shows which process";
    /// Clients that wait.
    AGENT_WAITERS = "shardlock_agent_waiters", Gauge, Count, [],
        "connections of the agent that wait for a lock",
        "growing without bound: locks are requested faster than they are released; see the hot keys, and /clients \
         for who waits";
    /// Locks that ended with their connection.
    DISCONNECT_RELEASES = "shardlock_agent_disconnect_releases_total", Counter, Count, [],
        "locks that the agent released because the connection that held them ended",
        "workers end without releasing: they crash, are killed, or close their connection first; what they did \
         under the lock may be incomplete";
}
