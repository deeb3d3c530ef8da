//! The commands that the ACL user must be permitted to run.
//!
//! # Implementation details
//!
//! Each command that the stores send is listed here once, in a form that changes nothing even if it
//! is permitted: a read, a change of a missing key, or an invalid argument, which the server
//! rejects only after it has checked the ACL. If `ACL DRYRUN` is permitted, the commands are passed
//! to it, so the server logs no denials. Otherwise they are sent directly.

use deadpool_redis::redis::{RedisError, Value};
use shardlock::config::Config;

use super::ShardKind;
use super::facts::{MissingPermission, MissingRule};
use crate::servers::escape_glob;

/// Commands whose subcommands have their own ACL rules.
const WITH_SUBCOMMANDS: [&str; 3] = ["CLUSTER", "PUBSUB", "SCRIPT"];

/// A command that the user must be permitted to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    /// The command with its arguments.
    pub(super) arguments: Vec<String>,
    /// The ACL's name of the command.
    command: String,
    /// The pattern that the user's rules must have for the key or channel.
    pattern: Pattern,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    None,
    Keys(String),
    Channels(String),
}

impl Need {
    fn new(command_line: &str, name: Option<&str>, pattern: Pattern) -> Self {
        let arguments: Vec<String> = command_line
            .split(' ')
            .map(|word| if word == "@" { name.unwrap_or_default() } else { word }.to_owned())
            .collect();
        let command = match &arguments[..] {
            [first, second, ..] if WITH_SUBCOMMANDS.contains(&first.as_str()) => format!("{first}|{second}"),
            _ => arguments[0].clone(),
        };
        Self {
            command: command.to_lowercase(),
            arguments,
            pattern,
        }
    }

    /// Returns whether this command must be tried on a connection of its own.
    pub(super) fn subscribes(&self) -> bool {
        self.command.ends_with("subscribe")
    }

    /// Derives the missing permission from the text of a refusal.
    pub(super) fn missing_permission(&self, refusal: &str) -> MissingPermission {
        let rule = match &self.pattern {
            Pattern::Channels(pattern) if refusal.contains("channel") => MissingRule::Channels(pattern.clone()),
            Pattern::Keys(pattern) if refusal.contains("key") => MissingRule::Keys(pattern.clone()),
            _ => MissingRule::Command,
        };
        MissingPermission {
            command: self.command.clone(),
            rule,
        }
    }

    /// The missing permission, from the reply to the command itself.
    pub(super) fn missing_in_reply(&self, reply: &Result<Value, RedisError>) -> Option<MissingPermission> {
        match reply {
            Err(error) if error.code() == Some("NOPERM") => {
                Some(self.missing_permission(error.detail().unwrap_or_default()))
            }
            // Any other error occurs only after the ACL check has passed.
            _ => None,
        }
    }

    /// The command, if the reply to it or to `ACL DRYRUN` reports that the server does not know it.
    pub(super) fn unknown(&self, reply: &Result<Value, RedisError>) -> Option<String> {
        let error = reply.as_ref().err()?.to_string().to_lowercase();
        let name = self.command.to_uppercase().replace('|', " ");
        let is_unknown = error.contains("unknown command")
            || error.contains("unknown subcommand") && name.contains(' ')
            || error.contains("command '") && error.contains("not found");
        is_unknown.then_some(name)
    }

    /// The missing permission, from the reply to `ACL DRYRUN`: `OK`, or a text that names what is
    /// missing.
    pub(super) fn missing_in_dry_run(&self, reply: &Result<Value, RedisError>) -> Option<MissingPermission> {
        match reply {
            Ok(Value::BulkString(text)) => Some(self.missing_permission(&String::from_utf8_lossy(text))),
            // An unknown command is not a denied one. It is reported by another check.
            _ => None,
        }
    }
}

/// The commands that the stores of this kind send.
pub(super) fn needs(kind: ShardKind, config: &Config) -> Vec<Need> {
    let namespace = &config.namespace;
    let leases = Pattern::Keys(format!("~{}*", escape_glob(namespace)));
    let queues = Pattern::Keys(format!("~{{{}*", escape_glob(namespace)));
    let channels = Pattern::Channels(format!("&{}in:*", escape_glob(namespace)));
    // Percent signs in lock names are encoded, so no lock has this name.
    let lease = format!("{namespace}%doctor");
    let queue = format!("{{{namespace}%doctor}}:q");
    let inbox = format!("{namespace}in:%doctor");
    let of_leases = ["GET @", "SET @ x NX XX", "PTTL @", "PEXPIRE @ x", "EXISTS @", "DEL @"];
    let of_queues = [
        "EXISTS @",
        "PEXPIRE @ x",
        "ZADD @ x x",
        "ZCARD @",
        "ZPOPMIN @ x",
        "ZRANGE @ 0 0",
        "ZRANK @ x",
        "ZREM @ x",
    ];
    let mut needs = Vec::new();
    for command in ["TIME", "EVAL return -1", "EVALSHA 0 -1"] {
        needs.push(Need::new(command, None, Pattern::None));
    }
    needs.extend(of_leases.map(|command| Need::new(command, Some(&lease), leases.clone())));
    needs.extend(of_queues.map(|command| Need::new(command, Some(&queue), queues.clone())));
    needs.push(Need::new("INCRBY @ x", Some(&lease), leases.clone()));
    let pubsub = match kind {
        ShardKind::Cluster => &["SPUBLISH @ x", "SSUBSCRIBE @"][..],
        _ => &["PUBLISH @ x", "SUBSCRIBE @"],
    };
    needs.extend(
        pubsub
            .iter()
            .map(|command| Need::new(command, Some(&inbox), channels.clone())),
    );
    let mut more = |command| needs.push(Need::new(command, None, Pattern::None));
    let of_kind = match kind {
        ShardKind::Cluster => &["CLUSTER SLOTS", "ASKING", "PUBSUB SHARDNUMSUB", "SUNSUBSCRIBE"][..],
        // `(` is not a valid script.
        ShardKind::Redlock => &["ROLE", "PUBSUB NUMSUB", "INFO server", "PING", "SCRIPT LOAD ("],
        ShardKind::Sentinel | ShardKind::Single => &["ROLE", "PUBSUB NUMSUB"],
    };
    let is_needed = |command: &&str| config.check_role || *command != "ROLE";
    of_kind.iter().copied().filter(is_needed).for_each(&mut more);
    if config.min_replicas_acked > 0 && kind != ShardKind::Redlock {
        more("WAIT 0 1");
    }
    needs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_needs_its_own_commands() {
        let commands = |kind, acked| -> Vec<String> {
            let mut config = Config::default();
            config.min_replicas_acked = acked;
            let needs = needs(kind, &config);
            needs.into_iter().map(|need| need.command).collect()
        };
        let single = commands(ShardKind::Single, 0);
        assert!(single.contains(&"publish".to_owned()) && !single.contains(&"wait".to_owned()));
        assert!(commands(ShardKind::Single, 1).contains(&"wait".to_owned()));
        assert!(single.contains(&"role".to_owned()));
        let cluster = commands(ShardKind::Cluster, 0);
        assert!(cluster.contains(&"pubsub|shardnumsub".to_owned()) && !cluster.contains(&"role".to_owned()));
        assert!(cluster.contains(&"ssubscribe".to_owned()) && cluster.contains(&"cluster|slots".to_owned()));
        let node = commands(ShardKind::Redlock, 1);
        assert!(node.contains(&"info".to_owned()) && node.contains(&"script|load".to_owned()));
    }
}
