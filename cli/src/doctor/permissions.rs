//! Checks the permissions of the ACL user.

use super::facts::{Facts, MissingPermission, MissingRule};
use super::finding::Finding;

/// Checks whether the user has all needed permissions.
pub(super) fn permitted(facts: &Facts) -> Finding {
    const CHECK: &str = "acl";
    let (user, denied) = (&facts.user, &facts.denied);
    if denied.is_empty() {
        return Finding::ok(
            CHECK,
            format!("user {user} has all {} permissions needed", facts.permissions_tried),
        );
    }
    let (mut commands, mut patterns) = (Vec::new(), Vec::new());
    for MissingPermission { command, rule } in denied {
        let (list, rule) = match rule {
            MissingRule::Command => (&mut commands, format!("+{command}")),
            MissingRule::Keys(pattern) | MissingRule::Channels(pattern) => (&mut patterns, pattern.clone()),
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
pub(super) fn known(facts: &Facts) -> Option<Finding> {
    let unknown_commands = &facts.unknown_commands;
    if unknown_commands.is_empty() {
        return None;
    }
    let fix = match &unknown_commands[..] {
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
        format!("the server does not know {}", unknown_commands.join(", ")),
        "whenever this is needed, locks fail or grants do not arrive",
        fix,
    ))
}

/// Checks whether leases of several slots can be renewed in one call.
pub(super) fn several_slots(facts: &Facts) -> Option<Finding> {
    let reason = facts.multi_slot_error.as_ref()?;
    Some(Finding::note(
        "several-slots",
        format!("a script with the keys of two locks is refused: {reason}"),
        "this looks like a proxy in front of a cluster; leases are renewed with one call for each slot, which costs the server more",
        "if clients can reach the nodes, use redis+cluster://host,host,... with some of the nodes",
    ))
}

/// Checks whether new users of the server may publish to the inboxes of managers.
pub(super) fn channels_of_others(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "channels";
    let found = format!("acl-pubsub-default {}", facts.setting("acl-pubsub-default")?);
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
pub(super) fn access(address: &str, has_login: bool, facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "access";
    if has_login {
        return Some(Finding::ok(CHECK, format!("as user {} with a password", facts.user)));
    }
    let why = "anyone who can reach the server can release and take every lock";
    let fix = "set a password (requirepass, or a user of the ACL) on the server and put it into the URL: redis://user:password@host";
    let found = format!("no password, as user {}", facts.user);
    Some(match is_loopback(address) {
        true => Finding::note(CHECK, found, why, fix),
        false => Finding::warning(CHECK, found, why, fix),
    })
}

pub(super) fn is_loopback(address: &str) -> bool {
    // A path is the address of a Unix socket.
    address.starts_with('/')
        || address.starts_with("127.")
        || address.starts_with("localhost:")
        || address.starts_with("[::1]:")
}

#[cfg(test)]
mod tests {
    use shardlock::config::Config;

    use super::super::needs::needs;
    use super::*;
    use crate::doctor::ShardKind;
    use crate::doctor::finding::Level;

    #[test]
    fn missing_permission_is_named_with_the_rule_that_adds_it() {
        let mut facts = Facts::healthy("", &[]);
        assert_eq!(permitted(&facts).level, Level::Ok);
        facts.user = "locks".to_owned();
        let mut config = Config::default();
        "a*b:".clone_into(&mut config.namespace);
        for need in needs(ShardKind::Single, &config) {
            let refusal = match need.arguments[0].as_str() {
                "SET" => "User locks has no permissions to run the 'set' command",
                "ZADD" => "User locks has no permissions to access the '{a*b:%doctor}:q' key",
                "PUBLISH" => "this user has no permissions to access one of the channels used as arguments",
                _ => continue,
            };
            facts.denied.push(need.missing_permission(refusal));
        }
        let finding = permitted(&facts);
        assert_eq!(
            finding.found,
            "user locks may not run SET and has no access to keys {a\\*b:*, channels a\\*b:in:*"
        );
        assert!(
            finding
                .fix
                .unwrap()
                .starts_with("ACL SETUSER locks +set ~{a\\*b:* &a\\*b:in:* ")
        );
    }

    #[test]
    fn server_where_new_users_may_publish_everywhere_is_noted() {
        let level = |setting| {
            channels_of_others(&Facts::healthy("", &[("acl-pubsub-default", setting)]))
                .unwrap()
                .level
        };
        assert_eq!(level("resetchannels"), Level::Ok);
        assert_eq!(level("allchannels"), Level::Note);
    }

    #[test]
    fn a_server_without_a_password_is_worse_where_others_can_reach_it() {
        let level = |address, login| access(address, login, &Facts::healthy("", &[])).unwrap().level;
        assert_eq!(level("127.0.0.1:1", false), Level::Note);
        assert_eq!(level("10.0.0.1:1", false), Level::Warning);
        assert_eq!(level("10.0.0.1:1", true), Level::Ok);
    }
}
