//! Tries which of the needed commands the user may run on a server. Nothing is written to it.

use deadpool_redis::Connection;
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, Pipeline, RedisError, Value, cmd, pipe};
use shardlock::tool::ServerUrl;

use super::facts::MissingPermission;
use super::needs::Need;
use crate::servers::{Connector, ProbeError, query};

/// Sends a pipeline and returns one result for each command.
pub(super) async fn query_all(
    connection: &mut MultiplexedConnection,
    commands: &Pipeline,
    count: usize,
) -> Result<Vec<Result<Value, RedisError>>, RedisError> {
    let replies = connection.send_packed_commands(commands, 0, count).await?;
    Ok(replies.into_iter().map(Value::extract_error).collect())
}

/// The error codes of a server that refuses writes.
///
/// The server checks for this after the ACL and before the arguments.
const NO_WRITES: [&str; 4] = ["READONLY", "OOM", "MISCONF", "NOREPLICAS"];

/// The result of trying all needs.
pub(super) struct PermissionResults {
    pub(super) denied: Vec<MissingPermission>,
    pub(super) write_error: Option<String>,
    pub(super) unknown_commands: Vec<String>,
}

/// Tries all needs.
///
/// Returns the ones that the user is not permitted, the ones that the server does not know, and the
/// server's error if it refuses writes.
pub(super) async fn try_permissions(
    connection: &mut MultiplexedConnection,
    user: &str,
    needs: &[Need],
    server: &ServerUrl,
    connector: &Connector<'_>,
) -> Result<PermissionResults, ProbeError> {
    let failed = |error: RedisError| ProbeError::classify(&error, server);
    let dry_run = |arguments: &[String]| {
        let mut command = cmd("ACL");
        command.arg("DRYRUN").arg(user).arg(arguments);
        command
    };
    let has_dry_run: Result<Value, _> = query(connection, &dry_run(&["PING".to_owned()])).await;
    let mut commands = pipe();
    if has_dry_run.is_ok() {
        for need in needs {
            commands.add_command(dry_run(&need.arguments));
        }
        let replies = query_all(connection, &commands, needs.len()).await.map_err(failed)?;
        let pairs = needs.iter().zip(&replies);
        let denied = pairs.clone().filter_map(|(need, reply)| need.missing_in_dry_run(reply));
        return Ok(PermissionResults {
            denied: denied.collect(),
            write_error: None,
            unknown_commands: pairs.filter_map(|(need, reply)| need.unknown(reply)).collect(),
        });
    }
    let (separate, pipelined): (Vec<&Need>, Vec<&Need>) = needs.iter().partition(|need| need.subscribes());
    for need in &pipelined {
        commands.add_command(to_command(need));
    }
    let replies = query_all(connection, &commands, pipelined.len())
        .await
        .map_err(failed)?;
    let errors = replies.iter().filter_map(|reply| reply.as_ref().err());
    let write_error = errors
        .filter_map(|error| Some((error.code()?, error)))
        .find(|(code, _)| NO_WRITES.contains(code))
        .map(|(code, error)| format!("{code}: {}", error.detail().unwrap_or_default()));
    let pairs = pipelined.iter().zip(&replies);
    let mut denied: Vec<_> = pairs
        .clone()
        .filter_map(|(need, reply)| need.missing_in_reply(reply))
        .collect();
    let mut unknown_commands: Vec<_> = pairs.filter_map(|(need, reply)| need.unknown(reply)).collect();
    for need in separate {
        // A connection that has subscribed can't be used for other commands, so it does not return
        // to the pool.
        let mut connection = Connection::take(connector.connect(server).await?);
        let reply = connection.send_packed_command(&to_command(need)).await;
        let reply = reply.and_then(Value::extract_error);
        denied.extend(need.missing_in_reply(&reply));
        unknown_commands.extend(need.unknown(&reply));
    }
    Ok(PermissionResults {
        denied,
        write_error,
        unknown_commands,
    })
}

fn to_command(need: &Need) -> Cmd {
    let mut command = Cmd::new();
    command.arg(&need.arguments);
    command
}
