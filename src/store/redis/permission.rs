//! Finds which permission a user of the server's ACL lacks, as the rule that would grant it:
//! `+zrank`, `~lock:*`, `&lock:in:*`.
//!
//! # Implementation details
//!
//! Redis does not report which key or channel was denied. Up to 7.0, an error inside a script does
//! not name the command either, only the line, which is looked up in the script. For scripts, each
//! key is probed with `EXISTS` to find the denied one. All of this happens only after a request was
//! refused.

use deadpool_redis::redis::aio::ConnectionLike;
use deadpool_redis::redis::{Arg, Cmd, ErrorKind, Pipeline, RedisError, ServerErrorKind, Value, pipe};

/// The permissions that one namespace needs.
#[derive(Debug, Clone)]
pub(super) struct Permissions {
    namespace: String,
}

/// What was refused, as far as the server reports it.
enum Refused<'a> {
    Command(&'a str),
    /// A command inside a script, with its line if known.
    CommandInScript(Option<usize>),
    Key,
    Channel,
}

/// The prefix of an error that names the missing rule.
const LACKS: &str = "the user lacks the permission ";

impl Permissions {
    pub(super) fn new(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
        }
    }

    /// Adds the missing rule to the error of a plain command, if the error is about a permission.
    pub(super) fn of_command(&self, error: RedisError, command: &Cmd) -> RedisError {
        match refused(&error) {
            Some(Refused::Key) => match arguments(command).nth(1) {
                Some(key) => lacking(&self.pattern(key), &error),
                None => error,
            },
            Some(Refused::Channel) => lacking(&self.channels(), &error),
            _ => error,
        }
    }

    /// The same for the error of a subscription.
    pub(super) fn of_subscription(&self, error: RedisError) -> RedisError {
        match refused(&error) {
            Some(Refused::Channel) => lacking(&self.channels(), &error),
            _ => error,
        }
    }

    /// Returns the replies of a pipeline, or the first error among them with the missing rule
    /// added.
    pub(super) fn without_errors(&self, commands: &Pipeline, replies: Vec<Value>) -> Result<Vec<Value>, RedisError> {
        let replies = replies.into_iter().zip(commands.cmd_iter());
        replies
            .map(|(reply, command)| reply.extract_error().map_err(|error| self.of_command(error, command)))
            .collect()
    }

    /// Like [`of_command`](Self::of_command), for the error of a script. `call` is the command that
    /// called it, and `code` its source.
    pub(super) async fn of_script(
        &self,
        error: RedisError,
        code: &str,
        call: &Cmd,
        connection: &mut impl ConnectionLike,
    ) -> RedisError {
        match refused(&error) {
            Some(Refused::CommandInScript(line)) => match command_in(code, line) {
                Some(command) => lacking(&format!("+{command}"), &error),
                None => error,
            },
            Some(Refused::Key) => match first_denied(keys(call), connection).await {
                Some(key) => lacking(&self.pattern(key), &error),
                None => error,
            },
            Some(Refused::Channel) => lacking(&self.channels(), &error),
            _ => error,
        }
    }

    /// The rule that grants keys such as this one.
    fn pattern(&self, key: &[u8]) -> String {
        let brace = if key.starts_with(b"{") { "{" } else { "" };
        format!("~{brace}{}*", self.namespace)
    }

    /// The rule that grants the inboxes.
    fn channels(&self) -> String {
        format!("&{}in:*", self.namespace)
    }
}

/// Describes a refusal, with the missing rule if it is known. `None` for any other error.
pub(super) fn describe_error(error: &RedisError) -> Option<String> {
    if let Some(named) = error.detail().filter(|detail| detail.starts_with(LACKS)) {
        return Some(named.to_owned());
    }
    Some(match refused(error)? {
        Refused::Command(name) => words(&format!("+{}", name.to_lowercase()), error),
        Refused::CommandInScript(_) => unnamed("for a command", error),
        Refused::Key => unnamed("for one of the keys (~...)", error),
        Refused::Channel => unnamed("for a channel (&...)", error),
    })
}

/// Whether a refusal concerns a command, independent of its keys.
pub(super) fn is_about_a_command(error: &RedisError) -> bool {
    let named = error.detail().and_then(|detail| detail.strip_prefix(LACKS));
    match named {
        Some(rule) => rule.starts_with('+'),
        None => matches!(refused(error), Some(Refused::Command(_) | Refused::CommandInScript(_))),
    }
}

fn unnamed(what: &str, error: &RedisError) -> String {
    format!("the user lacks a permission {what}; compare its rules with config/acl.conf: {error}")
}

fn words(rule: &str, error: &RedisError) -> String {
    let said = error.detail().map_or_else(|| error.to_string(), str::to_owned);
    format!("{LACKS}{rule}; config/acl.conf lists all required rules: {said}")
}

fn lacking(rule: &str, error: &RedisError) -> RedisError {
    (
        ErrorKind::Server(ServerErrorKind::NoPerm),
        "the server refused",
        words(rule, error),
    )
        .into()
}

fn refused(error: &RedisError) -> Option<Refused<'_>> {
    let text = error.detail()?;
    let in_script = text.contains("The user executing the script can't ") || text.contains("ACL failure in script");
    // The client library reports a refused SELECT as another kind of error.
    if let Some((_, rest)) = text.split_once("permissions to run the '") {
        return Some(Refused::Command(rest.split('\'').next()?));
    }
    if error.kind() != ErrorKind::Server(ServerErrorKind::NoPerm) && !in_script {
        return None;
    }
    if text.contains("run this command") {
        let line = text
            .rsplit_once("user_script:")
            .and_then(|(_, rest)| rest.split('.').next()?.parse().ok());
        return Some(Refused::CommandInScript(line));
    }
    if text.contains("channel") {
        return Some(Refused::Channel);
    }
    text.contains("key").then_some(Refused::Key)
}

/// The command that a script calls in this line, as the ACL names it. An error without a line comes
/// from the one call whose errors the script handles itself.
pub(super) fn command_in(code: &str, line: Option<usize>) -> Option<String> {
    let from = match line {
        Some(line) => code.lines().nth(line.checked_sub(1)?)?,
        None => &code[code.find("redis.pcall(")?..],
    };
    let (_, call) = from.split_once("call('")?;
    let mut quoted = call.split('\'');
    let command = quoted.next()?.to_lowercase();
    if command != "pubsub" {
        return Some(command);
    }
    // The ACL has rules for its subcommands. The comma is between the two quoted names.
    let subcommand = quoted.nth(1)?.to_lowercase();
    Some(format!("{command}|{subcommand}"))
}

fn arguments(command: &Cmd) -> impl Iterator<Item = &[u8]> {
    command.args_iter().map(|argument| match argument {
        Arg::Simple(bytes) => bytes,
        _ => &[],
    })
}

/// The keys of an `EVAL` or `EVALSHA`.
fn keys(call: &Cmd) -> Vec<&[u8]> {
    let mut arguments = arguments(call).skip(2);
    let count = arguments
        .next()
        .and_then(|count| std::str::from_utf8(count).ok()?.parse().ok());
    arguments.take(count.unwrap_or(0)).collect()
}

/// The first of these keys that the user may not use, if the server reports it.
async fn first_denied<'a>(keys: Vec<&'a [u8]>, connection: &mut impl ConnectionLike) -> Option<&'a [u8]> {
    let mut questions = pipe();
    for key in &keys {
        questions.cmd("EXISTS").arg(*key);
    }
    // If there is no answer, the error does not name the key.
    let answers = connection.req_packed_commands(&questions, 0, keys.len()).await.ok()?;
    let mut asked = keys.into_iter().zip(answers);
    asked.find_map(|(key, answer)| {
        let error = answer.extract_error().err()?;
        matches!(refused(&error), Some(Refused::Key)).then_some(key)
    })
}

#[cfg(test)]
mod tests {
    use super::super::script::Scripts;
    use super::*;

    fn error(code: ServerErrorKind, text: &str) -> RedisError {
        (ErrorKind::Server(code), "an error", text.to_owned()).into()
    }

    #[test]
    fn permission_errors_of_all_server_versions_are_recognized() {
        use ServerErrorKind::{NoPerm, ResponseError};
        for (code, text, rule) in [
            (
                NoPerm,
                "this user has no permissions to run the 'zrank' command",
                "+zrank",
            ),
            (
                NoPerm,
                "User lock has no permissions to run the 'client|setinfo' command",
                "+client|setinfo",
            ),
            (
                ResponseError,
                "ACL failure in script: User lock has no permissions to run the 'zrank' command script: 0a, on @user_script:3.",
                "+zrank",
            ),
        ] {
            let words = describe_error(&error(code, text)).unwrap();
            assert!(words.starts_with(&format!("{LACKS}{rule}; ")), "{words}");
        }
        for text in [
            "this user has no permissions to access one of the channels used as arguments",
            "No permissions to access a channel",
        ] {
            let words = describe_error(&Permissions::new("jobs/").of_subscription(error(NoPerm, text))).unwrap();
            assert!(
                words.starts_with("the user lacks the permission &jobs/in:*; "),
                "{words}"
            );
        }
        let mut get = Cmd::new();
        get.arg("GET").arg("{jobs/a}:q");
        for text in [
            "this user has no permissions to access one of the keys used as arguments",
            "No permissions to access a key",
        ] {
            let words = describe_error(&Permissions::new("jobs/").of_command(error(NoPerm, text), &get)).unwrap();
            assert!(words.starts_with("the user lacks the permission ~{jobs/*; "), "{words}");
        }
        assert_eq!(describe_error(&error(ResponseError, "a key of another kind")), None);
    }

    #[test]
    fn command_of_a_script_is_named_as_the_acl_names_it() {
        let code = "local a = redis.call('GET', KEYS[1])\nreturn redis.call('PUBSUB', 'NUMSUB', a)[2] > 0\n";
        assert_eq!(command_in(code, Some(1)).as_deref(), Some("get"));
        assert_eq!(command_in(code, Some(2)).as_deref(), Some("pubsub|numsub"));
        assert_eq!(command_in(code, Some(3)), None);
    }

    /// Up to Redis 7.0, an error identifies a script's command by its line number only.
    #[test]
    fn no_line_of_a_script_calls_more_than_one_command() {
        let (one, cluster) = (Scripts::for_a_primary("lock:"), Scripts::for_a_cluster("lock:"));
        for script in [
            &one.acquire,
            &one.release,
            &one.release_fast,
            &one.retire,
            &one.renew,
            &one.renew_alone,
            &one.claim,
            &one.modes.acquire,
            &one.modes.release,
            &one.modes.renew,
            &one.modes.renew_alone,
            &one.modes.claim,
            &cluster.acquire,
            &cluster.release,
            &cluster.retire,
            &cluster.modes.acquire,
            &cluster.modes.release,
        ] {
            let calls = |line: &str| line.matches("redis.call(").count() + line.matches("redis.pcall(").count();
            for line in script.text().lines() {
                assert!(calls(line) <= 1, "{line}");
            }
            assert!(script.text().matches("redis.pcall(").count() <= 1);
        }
    }
}
