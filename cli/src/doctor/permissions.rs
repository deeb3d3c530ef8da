//! Checks the permissions of the ACL user.
//!
//! # Implementation details
//!
//! Each command that the stores send is listed here once, in a form that changes nothing even if it
//! is permitted: a read, a change of a missing key, or an invalid argument, which the server
//! rejects only after it has checked the ACL. If `ACL DRYRUN` is permitted, the commands are passed
//! to it, so the server logs no denials. Otherwise they are sent directly.

use deadpool_redis::redis::{RedisError, Value};
use shardlock::Config;

use super::Kind;
use super::facts::{Denied, Lack, Seen};
use super::finding::Finding;
use crate::servers::escape_glob;

/// Commands whose subcommands have their own ACL rules.
const WITH_SUBCOMMANDS: [&str; 3] = ["CLUSTER", "PUBSUB", "SCRIPT"];

/// A command that the user must be permitted to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    pub(super) words: Vec<String>,
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
    fn new(words: &str, place: Option<&str>, pattern: Pattern) -> Self {
        let words: Vec<String> = words
            .split(' ')
            .map(|word| if word == "@" { place.unwrap_or_default() } else { word }.to_owned())
            .collect();
        let command = match &words[..] {
            [first, second, ..] if WITH_SUBCOMMANDS.contains(&first.as_str()) => format!("{first}|{second}"),
            _ => words[0].clone(),
        };
        Self {
            command: command.to_lowercase(),
            words,
            pattern,
        }
    }

    /// Returns whether this command must be tried on a connection of its own.
    pub(super) fn subscribes(&self) -> bool {
        self.command.ends_with("subscribe")
    }

    /// Derives the missing permission from the text of a refusal.
    fn denied(&self, words: &str) -> Denied {
        let lack = match &self.pattern {
            Pattern::Channels(pattern) if words.contains("channel") => Lack::Channels(pattern.clone()),
            Pattern::Keys(pattern) if words.contains("key") => Lack::Keys(pattern.clone()),
            _ => Lack::Command,
        };
        Denied {
            command: self.command.clone(),
            lack,
        }
    }

    /// The missing permission, from the reply to the command itself.
    pub(super) fn tried(&self, reply: &Result<Value, RedisError>) -> Option<Denied> {
        match reply {
            Err(error) if error.code() == Some("NOPERM") => Some(self.denied(error.detail().unwrap_or_default())),
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
    pub(super) fn rehearsed(&self, reply: &Result<Value, RedisError>) -> Option<Denied> {
        match reply {
            Ok(Value::BulkString(text)) => Some(self.denied(&String::from_utf8_lossy(text))),
            // An unknown command is not a denied one. It is reported by another check.
            _ => None,
        }
    }
}

/// The commands that the stores of this kind send.
pub(super) fn needs(kind: Kind, config: &Config) -> Vec<Need> {
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
    for words in ["TIME", "EVAL return -1", "EVALSHA 0 -1"] {
        needs.push(Need::new(words, None, Pattern::None));
    }
    needs.extend(of_leases.map(|words| Need::new(words, Some(&lease), leases.clone())));
    needs.extend(of_queues.map(|words| Need::new(words, Some(&queue), queues.clone())));
    // In a cluster, the script computes the counter itself, starting from the server's time.
    if kind != Kind::Cluster {
        needs.push(Need::new("INCRBY @ x", Some(&lease), leases.clone()));
    }
    let pubsub = match kind {
        Kind::Cluster => &["SPUBLISH @ x", "SSUBSCRIBE @"][..],
        _ => &["PUBLISH @ x", "SUBSCRIBE @"],
    };
    needs.extend(
        pubsub
            .iter()
            .map(|words| Need::new(words, Some(&inbox), channels.clone())),
    );
    let mut more = |words| needs.push(Need::new(words, None, Pattern::None));
    let of_kind = match kind {
        Kind::Cluster => &["CLUSTER SLOTS", "ASKING", "PUBSUB SHARDNUMSUB", "SUNSUBSCRIBE"][..],
        // `(` is not a valid script.
        Kind::Redlock => &["ROLE", "PUBSUB NUMSUB", "INFO server", "PING", "SCRIPT LOAD ("],
        Kind::Sentinel | Kind::Single => &["ROLE", "PUBSUB NUMSUB"],
    };
    let is_needed = |words: &&str| config.check_role || *words != "ROLE";
    of_kind.iter().copied().filter(is_needed).for_each(&mut more);
    if config.min_replicas_acked > 0 && kind != Kind::Redlock {
        more("WAIT 0 1");
    }
    needs
}

/// Checks whether the user has all needed permissions.
pub(super) fn permitted(seen: &Seen) -> Finding {
    const CHECK: &str = "acl";
    let (user, denied) = (&seen.user, &seen.denied);
    if denied.is_empty() {
        return Finding::ok(CHECK, format!("user {user} has all {} permissions needed", seen.tried));
    }
    let (mut commands, mut patterns) = (Vec::new(), Vec::new());
    for Denied { command, lack } in denied {
        let (list, rule) = match lack {
            Lack::Command => (&mut commands, format!("+{command}")),
            Lack::Keys(pattern) | Lack::Channels(pattern) => (&mut patterns, pattern.clone()),
        };
        if !list.contains(&rule) {
            list.push(rule);
        }
    }
    let mut missing = Vec::new();
    if !commands.is_empty() {
        let names: Vec<_> = commands
            .iter()
            .map(|rule| rule.trim_start_matches('+').to_uppercase().replace('|', " "))
            .collect();
        missing.push(format!("may not run {}", names.join(", ")));
    }
    if !patterns.is_empty() {
        let names: Vec<_> = patterns
            .iter()
            .map(|rule| match rule.split_at(1) {
                ("&", pattern) => format!("channels {pattern}"),
                (_, pattern) => format!("keys {pattern}"),
            })
            .collect();
        missing.push(format!("has no access to {}", names.join(", ")));
    }
    commands.append(&mut patterns);
    Finding::error(
        CHECK,
        format!("user {user} {}", missing.join(" and ")),
        "whenever this is needed, locks fail or grants do not arrive",
        format!(
            "ACL SETUSER {user} {}    (then ACL SAVE, or the same in the server's configuration)",
            commands.join(" ")
        ),
    )
}

/// Checks for commands that the server does not know, regardless of permissions.
pub(super) fn known(seen: &Seen) -> Option<Finding> {
    let lacking = &seen.lacking;
    if lacking.is_empty() {
        return None;
    }
    let mend = match &lacking[..] {
        [only] if only == "ROLE" => {
            "if this address always leads to a primary, set check_role = false (SHARDLOCK_CHECK_ROLE=false)"
        }
        _ => {
            "if this is a proxy, connect to the Redis server itself; otherwise use a server that has these commands: Redis 5.0 or later, \
             7.0 or later for a cluster, or Valkey; see rename-command in its configuration"
        }
    };
    Some(Finding::error(
        "commands",
        format!("the server does not know {}", lacking.join(", ")),
        "whenever this is needed, locks fail or grants do not arrive",
        mend,
    ))
}

/// Checks whether leases of several slots can be renewed in one call.
pub(super) fn several_slots(seen: &Seen) -> Option<Finding> {
    let reason = seen.refuses_several_slots.as_ref()?;
    Some(Finding::note(
        "several-slots",
        format!("a script with the keys of two locks is refused: {reason}"),
        "this looks like a proxy in front of a cluster; leases are renewed with one call for each slot, which costs the server more",
        "if clients can reach the nodes, use redis+cluster://host,host,... with some of the nodes",
    ))
}

/// Checks whether new users of the server may publish to the inboxes of managers.
pub(super) fn channels_of_others(seen: &Seen) -> Option<Finding> {
    const CHECK: &str = "channels";
    let found = format!("acl-pubsub-default {}", seen.setting("acl-pubsub-default")?);
    if found.ends_with("resetchannels") {
        return Some(Finding::ok(CHECK, found));
    }
    Some(Finding::note(
        CHECK,
        found,
        "users without other restrictions may publish to the inboxes of managers, which must read foreign messages before they ignore them",
        "CONFIG SET acl-pubsub-default resetchannels, and ACL SETUSER <user> resetchannels for the existing users",
    ))
}

/// Checks whether a password protects the locks.
pub(super) fn access(place: &str, has_login: bool, seen: &Seen) -> Option<Finding> {
    const CHECK: &str = "access";
    if has_login {
        return Some(Finding::ok(CHECK, format!("as user {} with a password", seen.user)));
    }
    let why = "anyone who can reach the server can release and take every lock";
    let mend = "set a password (requirepass, or a user of the ACL) on the server and put it into the URL: redis://user:password@host";
    let found = format!("no password, as user {}", seen.user);
    Some(match is_loopback(place) {
        true => Finding::note(CHECK, found, why, mend),
        false => Finding::warning(CHECK, found, why, mend),
    })
}

pub(super) fn is_loopback(place: &str) -> bool {
    // A path is the address of a Unix socket.
    place.starts_with('/')
        || place.starts_with("127.")
        || place.starts_with("localhost:")
        || place.starts_with("[::1]:")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    #[test]
    fn each_kind_needs_its_own_commands() {
        let commands = |kind, acked| -> Vec<String> {
            let mut config = Config::default();
            config.min_replicas_acked = acked;
            let needs = needs(kind, &config);
            needs.into_iter().map(|need| need.command).collect()
        };
        let single = commands(Kind::Single, 0);
        assert!(single.contains(&"publish".to_owned()) && !single.contains(&"wait".to_owned()));
        assert!(commands(Kind::Single, 1).contains(&"wait".to_owned()));
        assert!(single.contains(&"role".to_owned()));
        let cluster = commands(Kind::Cluster, 0);
        assert!(cluster.contains(&"pubsub|shardnumsub".to_owned()) && !cluster.contains(&"role".to_owned()));
        assert!(cluster.contains(&"ssubscribe".to_owned()) && cluster.contains(&"cluster|slots".to_owned()));
        let node = commands(Kind::Redlock, 1);
        assert!(node.contains(&"info".to_owned()) && node.contains(&"script|load".to_owned()));
    }

    #[test]
    fn what_is_missing_is_named_with_the_rule_that_adds_it() {
        let mut seen = Seen::good("", &[]);
        assert_eq!(permitted(&seen).level, Level::Ok);
        seen.user = "locks".to_owned();
        let mut config = Config::default();
        "a*b:".clone_into(&mut config.namespace);
        for need in needs(Kind::Single, &config) {
            let words = match need.words[0].as_str() {
                "SET" => "User locks has no permissions to run the 'set' command",
                "ZADD" => "User locks has no permissions to access the '{a*b:%doctor}:q' key",
                "PUBLISH" => "this user has no permissions to access one of the channels used as arguments",
                _ => continue,
            };
            seen.denied.push(need.denied(words));
        }
        let finding = permitted(&seen);
        assert_eq!(
            finding.found,
            "user locks may not run SET and has no access to keys {a\\*b:*, channels a\\*b:in:*"
        );
        assert!(
            finding
                .mend
                .unwrap()
                .starts_with("ACL SETUSER locks +set ~{a\\*b:* &a\\*b:in:* ")
        );
    }

    #[test]
    fn server_where_new_users_may_publish_everywhere_is_noted() {
        let level = |setting| {
            channels_of_others(&Seen::good("", &[("acl-pubsub-default", setting)]))
                .unwrap()
                .level
        };
        assert_eq!(level("resetchannels"), Level::Ok);
        assert_eq!(level("allchannels"), Level::Note);
    }

    #[test]
    fn a_server_without_a_password_is_worse_where_others_can_reach_it() {
        let level = |place, login| access(place, login, &Seen::good("", &[])).unwrap().level;
        assert_eq!(level("127.0.0.1:1", false), Level::Note);
        assert_eq!(level("10.0.0.1:1", false), Level::Warning);
        assert_eq!(level("10.0.0.1:1", true), Level::Ok);
    }
}
