//! Parsing the words of a request into a command.
//!
//! Names are compared without regard to case, as in Redis. This file knows neither sockets nor
//! locks, so that the fuzzer can reach it.

use std::fmt;
use std::time::Duration;

use shardlock::tool::printable;
use shardlock::{LockKey, LockMode};

use super::command_table::{self, CommandInfo};

/// A command of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    Lock(Lock),
    Unlock(LockId),
    Held(LockId),
    Inspect(LockKey),
    Info,
    Ping(Option<Vec<u8>>),
    Echo(Vec<u8>),
    Hello(Hello),
    Auth(Credentials),
    Client(ClientCommand),
    Commands(CommandQuery),
    Quit,
    Select,
    /// A line of an HTTP request. See [`is_of_http`].
    Http,
}

/// A request for a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lock {
    pub(super) key: LockKey,
    pub(super) wait: Wait,
    pub(super) mode: Mode,
    pub(super) ttl: Option<Duration>,
    pub(super) min_hold: Option<Duration>,
    pub(super) max_hold: Option<Duration>,
    pub(super) class: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// For as long as the agent's setting `timeout` allows.
    Default,
    AtMost(Duration),
    No,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Exclusive,
    Shared,
    Permits { weight: u16, limit: u16 },
}

impl From<Mode> for LockMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Exclusive => Self::Exclusive,
            Mode::Shared => Self::Shared,
            Mode::Permits { weight, limit } => Self::Permits { weight, limit },
        }
    }
}

/// Names one acquisition of a lock. Tokens of different keys may be equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct LockId {
    pub(super) key: LockKey,
    pub(super) token: u64,
}

/// A user and a password. `Debug` shows neither.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    /// `None` for the default user.
    pub(super) user: Option<Vec<u8>>,
    pub(super) password: Vec<u8>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(***)")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Hello {
    /// 2 or 3, or `None` to keep the version.
    pub(super) version: Option<u8>,
    pub(super) credentials: Option<Credentials>,
    pub(super) name: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ClientCommand {
    Id,
    Info,
    GetName,
    SetName(String),
    /// `LIB-NAME`.
    SetLibraryName(String),
    /// `LIB-VER`.
    SetLibraryVersion(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CommandQuery {
    /// Some commands by name, or all. An unknown name yields nothing.
    Info(Option<Vec<Option<&'static CommandInfo>>>),
    Docs(Option<Vec<&'static CommandInfo>>),
    Count,
    List,
}

/// The longest name of a connection or of its library, in bytes.
const NAME_BYTES_MAX: usize = 128;

/// The longest class, in bytes.
const CLASS_BYTES_MAX: usize = 128;

/// The largest part of a client's word in a message, in characters.
const QUOTED_CHARS_MAX: usize = 64;

/// Why a command is refused: a reply that begins with the code of the error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Refusal {
    fn syntax(command: &str, what: impl fmt::Display) -> Self {
        Self(format!("ERR syntax error in '{command}': {what}"))
    }

    fn arity(command: &str) -> Self {
        Self(format!("ERR wrong number of arguments for '{command}' command"))
    }
}

type Words<'a> = &'a [&'a [u8]];

impl Command {
    /// Parses a request of at least one word.
    pub(super) fn parse(words: &[&[u8]]) -> Result<Self, Refusal> {
        let [name, arguments @ ..] = words else {
            return Err(Refusal("ERR the request is empty".to_owned()));
        };
        if is_of_http(name) {
            return Ok(Self::Http);
        }
        let info = command_table::find(name).ok_or_else(|| unknown_command(name, arguments))?;
        if !info.accepts(words.len()) {
            return Err(Refusal::arity(info.name));
        }
        match (info.name, arguments) {
            ("lock", [key, options @ ..]) => Ok(Self::Lock(Lock::parse(key, options)?)),
            ("unlock", [key, token]) => Ok(Self::Unlock(LockId::parse(key, token)?)),
            ("held", [key, token]) => Ok(Self::Held(LockId::parse(key, token)?)),
            ("inspect", [key]) => Ok(Self::Inspect(key_of(key)?)),
            ("info", _) => Ok(Self::Info),
            ("ping", []) => Ok(Self::Ping(None)),
            ("ping", [text]) => Ok(Self::Ping(Some(text.to_vec()))),
            ("echo", [text]) => Ok(Self::Echo(text.to_vec())),
            ("hello", _) => Ok(Self::Hello(Hello::parse(arguments)?)),
            ("auth", [password]) => Ok(Self::Auth(Credentials {
                user: None,
                password: password.to_vec(),
            })),
            ("auth", [user, password]) => Ok(Self::Auth(Credentials::of(user, password))),
            ("client", _) => Ok(Self::Client(ClientCommand::parse(arguments)?)),
            ("command", _) => Ok(Self::Commands(CommandQuery::parse(arguments)?)),
            ("quit", _) => Ok(Self::Quit),
            ("select", [b"0"]) => Ok(Self::Select),
            ("select", _) => Err(Refusal(
                "ERR DB index is out of range: there is only database 0".to_owned(),
            )),
            _ => Err(Refusal::arity(info.name)),
        }
    }
}

/// Whether this is the first word of a line of an HTTP request. A page on the web can make a
/// browser send a request to any address, with commands in its body, after one of these lines.
fn is_of_http(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"POST") || name.eq_ignore_ascii_case(b"Host:")
}

fn unknown_command(name: &[u8], arguments: Words<'_>) -> Refusal {
    // The text of Redis, which client libraries look for.
    let mut text = format!("ERR unknown command '{}', with args beginning with: ", quoted(name));
    for argument in arguments.iter().take(4) {
        text.push_str(&format!("'{}' ", quoted(argument)));
    }
    Refusal(text)
}

/// A word of a client in a message: printable and not long.
fn quoted(word: &[u8]) -> String {
    let start = &word[..word.len().min(4 * QUOTED_CHARS_MAX)];
    let text = String::from_utf8_lossy(start);
    let text: String = printable(&text).chars().take(QUOTED_CHARS_MAX).collect();
    text
}

fn key_of(word: &[u8]) -> Result<LockKey, Refusal> {
    let text =
        std::str::from_utf8(word).map_err(|_| Refusal(format!("ERR key is '{}', but must be UTF-8", quoted(word))))?;
    LockKey::new(text).map_err(|invalid| Refusal(format!("ERR {invalid}")))
}

/// A number of digits only.
fn number<T: std::str::FromStr>(word: &[u8]) -> Option<T> {
    let is_number = !word.is_empty() && word.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(word).ok().filter(|_| is_number)?;
    text.parse().ok()
}

fn is(word: &[u8], name: &str) -> bool {
    word.eq_ignore_ascii_case(name.as_bytes())
}

fn millis(option: &str, word: &[u8]) -> Result<Duration, Refusal> {
    let millis = number(word).map(Duration::from_millis);
    millis.ok_or_else(|| {
        let word = quoted(word);
        Refusal(format!(
            "ERR {option} is '{word}', but must be a number of milliseconds"
        ))
    })
}

/// Text that a client gives to a name: without spaces and control characters, as in Redis.
fn label(what: &str, word: &[u8], bytes_max: usize) -> Result<String, Refusal> {
    let is_valid = word.len() <= bytes_max && word.iter().all(u8::is_ascii_graphic);
    let text = std::str::from_utf8(word).ok().filter(|_| is_valid);
    text.map(str::to_owned).ok_or_else(|| {
        Refusal(format!(
            "ERR {what} is '{}', but must be at most {bytes_max} characters of ASCII without spaces",
            quoted(word)
        ))
    })
}

impl LockId {
    fn parse(key: &[u8], token: &[u8]) -> Result<Self, Refusal> {
        let token = number(token).ok_or_else(|| {
            let token = quoted(token);
            Refusal(format!(
                "ERR token is '{token}', but must be the number that LOCK replied"
            ))
        })?;
        Ok(Self {
            key: key_of(key)?,
            token,
        })
    }
}

impl Lock {
    fn parse(key: &[u8], options: Words<'_>) -> Result<Self, Refusal> {
        let mut lock = Self {
            key: key_of(key)?,
            wait: Wait::Default,
            mode: Mode::Exclusive,
            ttl: None,
            min_hold: None,
            max_hold: None,
            class: None,
        };
        let mut rest = options;
        while let [option, after @ ..] = rest {
            rest = lock.parse_option(option, after)?;
        }
        Ok(lock)
    }

    /// Parses an option and returns what follows it.
    fn parse_option<'a>(&mut self, option: &[u8], after: Words<'a>) -> Result<Words<'a>, Refusal> {
        let syntax = |what: &str| Refusal::syntax("lock", what);
        // The word after an option with a value.
        let value = |name: &str| {
            let (value, rest) = after
                .split_first()
                .ok_or_else(|| syntax(&format!("there is nothing after {name}")))?;
            Ok((*value, rest))
        };
        let once = |is_new: bool, name: &str| {
            let twice = || syntax(&format!("{name} is given twice"));
            if is_new { Ok(()) } else { Err(twice()) }
        };
        let duration = |name: &str, slot: &mut Option<Duration>| {
            once(slot.is_none(), name)?;
            let (word, rest) = value(name)?;
            *slot = Some(millis(name, word)?);
            Ok(rest)
        };
        if is(option, "TTL") {
            duration("TTL", &mut self.ttl)
        } else if is(option, "MINHOLD") {
            duration("MINHOLD", &mut self.min_hold)
        } else if is(option, "MAXHOLD") {
            duration("MAXHOLD", &mut self.max_hold)
        } else if is(option, "TIMEOUT") || is(option, "NOWAIT") {
            if self.wait != Wait::Default {
                return Err(syntax("give TIMEOUT or NOWAIT, and only once"));
            }
            if is(option, "NOWAIT") {
                self.wait = Wait::No;
                return Ok(after);
            }
            let (word, rest) = value("TIMEOUT")?;
            self.wait = Wait::AtMost(millis("TIMEOUT", word)?);
            Ok(rest)
        } else if is(option, "SHARED") || is(option, "PERMITS") {
            if self.mode != Mode::Exclusive {
                return Err(syntax("give SHARED or PERMITS, and only once"));
            }
            if is(option, "SHARED") {
                self.mode = Mode::Shared;
                return Ok(after);
            }
            let [weight, of, limit, rest @ ..] = after else {
                return Err(syntax("after PERMITS come a number, OF, and a number"));
            };
            if !is(of, "OF") {
                return Err(syntax(&format!("expected OF, got '{}'", quoted(of))));
            }
            self.mode = Mode::Permits {
                weight: permits(weight)?,
                limit: permits(limit)?,
            };
            Ok(rest)
        } else if is(option, "CLASS") {
            once(self.class.is_none(), "CLASS")?;
            let (word, rest) = value("CLASS")?;
            self.class = Some(label("CLASS", word, CLASS_BYTES_MAX)?);
            Ok(rest)
        } else {
            Err(syntax(&format!("unknown option '{}'", quoted(option))))
        }
    }
}

fn permits(word: &[u8]) -> Result<u16, Refusal> {
    number(word).ok_or_else(|| {
        let word = quoted(word);
        Refusal(format!(
            "ERR PERMITS has '{word}', but must have numbers from 1 to 1000"
        ))
    })
}

impl Credentials {
    fn of(user: &[u8], password: &[u8]) -> Self {
        Self {
            user: (user != b"default").then(|| user.to_vec()),
            password: password.to_vec(),
        }
    }
}

impl Hello {
    fn parse(arguments: Words<'_>) -> Result<Self, Refusal> {
        let mut hello = Self::default();
        let [version, options @ ..] = arguments else {
            return Ok(hello);
        };
        let version: u64 = number(version)
            .ok_or_else(|| Refusal("ERR Protocol version is not an integer or out of range".to_owned()))?;
        hello.version = match version {
            2 => Some(2),
            3 => Some(3),
            _ => return Err(Refusal("NOPROTO unsupported protocol version".to_owned())),
        };
        let mut rest = options;
        while let [option, after @ ..] = rest {
            rest = match after {
                [user, password, after @ ..] if is(option, "AUTH") => {
                    hello.credentials = Some(Credentials::of(user, password));
                    after
                }
                [name, after @ ..] if is(option, "SETNAME") => {
                    hello.name = Some(label("the name", name, NAME_BYTES_MAX)?);
                    after
                }
                _ => {
                    let option = quoted(option);
                    return Err(Refusal(format!("ERR Syntax error in HELLO option '{option}'")));
                }
            };
        }
        Ok(hello)
    }
}

fn unknown_subcommand(command: &str, subcommand: &[u8]) -> Refusal {
    let subcommand = quoted(subcommand);
    Refusal(format!("ERR unknown subcommand '{subcommand}' of {command}"))
}

impl ClientCommand {
    fn parse(arguments: Words<'_>) -> Result<Self, Refusal> {
        let [subcommand, arguments @ ..] = arguments else {
            return Err(Refusal::arity("client"));
        };
        let name = |word| label("the name", word, NAME_BYTES_MAX);
        match arguments {
            [] if is(subcommand, "ID") => Ok(Self::Id),
            [] if is(subcommand, "INFO") => Ok(Self::Info),
            [] if is(subcommand, "GETNAME") => Ok(Self::GetName),
            [word] if is(subcommand, "SETNAME") => Ok(Self::SetName(name(word)?)),
            [attribute, word] if is(subcommand, "SETINFO") => {
                if is(attribute, "LIB-NAME") {
                    Ok(Self::SetLibraryName(name(word)?))
                } else if is(attribute, "LIB-VER") {
                    Ok(Self::SetLibraryVersion(name(word)?))
                } else {
                    let attribute = quoted(attribute);
                    Err(Refusal(format!("ERR Unrecognized option '{attribute}'")))
                }
            }
            _ => {
                let known = ["id", "info", "getname", "setname", "setinfo"];
                let known = known.into_iter().find(|known| is(subcommand, known));
                Err(match known {
                    Some(known) => Refusal::arity(&format!("client|{known}")),
                    None => unknown_subcommand("CLIENT", subcommand),
                })
            }
        }
    }
}

impl CommandQuery {
    fn parse(arguments: Words<'_>) -> Result<Self, Refusal> {
        let [subcommand, names @ ..] = arguments else {
            return Ok(Self::Info(None));
        };
        let names = (!names.is_empty()).then_some(names);
        let found = names.map(|names| names.iter().map(|name| command_table::find(name)));
        if is(subcommand, "INFO") {
            Ok(Self::Info(found.map(Iterator::collect)))
        } else if is(subcommand, "DOCS") {
            Ok(Self::Docs(found.map(|found| found.flatten().collect())))
        } else if is(subcommand, "COUNT") && names.is_none() {
            Ok(Self::Count)
        } else if is(subcommand, "LIST") && names.is_none() {
            Ok(Self::List)
        } else {
            Err(unknown_subcommand("COMMAND", subcommand))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        Command::parse(&words).map_err(|refusal| refusal.0)
    }

    fn lock(line: &str) -> Lock {
        match parse(line) {
            Ok(Command::Lock(lock)) => lock,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[track_caller]
    fn refused(line: &str, expected: &str) {
        assert_eq!(parse(line), Err(expected.to_owned()), "{line}");
    }

    #[test]
    fn options_of_a_lock_come_in_any_order_and_case() {
        let plain = lock("LOCK k");
        assert_eq!(
            (plain.key.as_str(), plain.wait, plain.mode),
            ("k", Wait::Default, Mode::Exclusive)
        );
        let all = lock("lock k class c maxhold 4 Ttl 2 MinHold 3 timeout 1");
        let ms = Duration::from_millis;
        assert_eq!(all.wait, Wait::AtMost(ms(1)));
        assert_eq!(
            (all.ttl, all.min_hold, all.max_hold),
            (Some(ms(2)), Some(ms(3)), Some(ms(4)))
        );
        assert_eq!(all.class.as_deref(), Some("c"));
        assert_eq!(lock("LOCK k SHARED NOWAIT").mode, Mode::Shared);
        assert_eq!(lock("LOCK k SHARED NOWAIT").wait, Wait::No);
        let permits = Mode::Permits { weight: 2, limit: 10 };
        assert_eq!(lock("LOCK k permits 2 of 10").mode, permits);
        // A key may look like an option.
        assert_eq!(lock("LOCK NOWAIT").key.as_str(), "NOWAIT");
    }

    #[test]
    fn errors_of_a_lock_name_the_word() {
        refused("LOCK", "ERR wrong number of arguments for 'lock' command");
        refused(
            "LOCK k TIMEOUT",
            "ERR syntax error in 'lock': there is nothing after TIMEOUT",
        );
        refused(
            "LOCK k TIMEOUT -1",
            "ERR TIMEOUT is '-1', but must be a number of milliseconds",
        );
        refused("LOCK k TTL 1s", "ERR TTL is '1s', but must be a number of milliseconds");
        refused("LOCK k TTL 1 TTL 2", "ERR syntax error in 'lock': TTL is given twice");
        let either = "ERR syntax error in 'lock': give TIMEOUT or NOWAIT, and only once";
        refused("LOCK k NOWAIT TIMEOUT 1", either);
        refused("LOCK k TIMEOUT 1 TIMEOUT 1", either);
        let either = "ERR syntax error in 'lock': give SHARED or PERMITS, and only once";
        refused("LOCK k SHARED PERMITS 1 OF 2", either);
        refused(
            "LOCK k PERMITS 1",
            "ERR syntax error in 'lock': after PERMITS come a number, OF, and a number",
        );
        refused(
            "LOCK k PERMITS 1 / 2",
            "ERR syntax error in 'lock': expected OF, got '/'",
        );
        refused(
            "LOCK k PERMITS 70000 OF 2",
            "ERR PERMITS has '70000', but must have numbers from 1 to 1000",
        );
        refused("LOCK k SHARD", "ERR syntax error in 'lock': unknown option 'SHARD'");
        refused("LOCK ", "ERR key is empty, but must be 1 to 512 bytes long");
        let long = parse(&format!("LOCK k {}", "\u{1b}".repeat(1000))).unwrap_err();
        assert!(long.len() < 200 && !long.contains('\u{1b}'), "{long}");
        let key = Command::parse(&[b"LOCK", b"\xff"]).unwrap_err().0;
        assert!(key.ends_with("but must be UTF-8"), "{key}");
    }

    #[test]
    fn a_token_is_any_number_of_64_bits() {
        let id = |line| match parse(line) {
            Ok(Command::Unlock(id) | Command::Held(id)) => id.token,
            other => panic!("{other:?}"),
        };
        assert_eq!(id("UNLOCK k 18446744073709551615"), u64::MAX);
        assert_eq!(id("HELD k 7"), 7);
        refused(
            "UNLOCK k 18446744073709551616",
            "ERR token is '18446744073709551616', but must be the number that LOCK replied",
        );
        refused("UNLOCK k", "ERR wrong number of arguments for 'unlock' command");
        refused("HELD k 1 2", "ERR wrong number of arguments for 'held' command");
    }

    #[test]
    fn what_client_libraries_send_at_connect_is_understood() {
        let hello = match parse("HELLO 3 AUTH default s3cret SETNAME worker-1") {
            Ok(Command::Hello(hello)) => hello,
            other => panic!("{other:?}"),
        };
        assert_eq!((hello.version, hello.name.as_deref()), (Some(3), Some("worker-1")));
        let credentials = hello.credentials.unwrap();
        assert_eq!((&credentials.user, &*credentials.password), (&None, &b"s3cret"[..]));
        assert!(!format!("{credentials:?}").contains("s3cret"));

        refused("HELLO 4", "NOPROTO unsupported protocol version");
        refused("HELLO x", "ERR Protocol version is not an integer or out of range");
        refused("HELLO 3 AUTH user", "ERR Syntax error in HELLO option 'AUTH'");
        let library = ClientCommand::SetLibraryName("redis-py".to_owned());
        assert_eq!(parse("client setinfo lib-name redis-py"), Ok(Command::Client(library)));
        assert_eq!(parse("CLIENT ID"), Ok(Command::Client(ClientCommand::Id)));
        refused(
            "CLIENT SETNAME",
            "ERR wrong number of arguments for 'client|setname' command",
        );
        refused("CLIENT TRACKING ON", "ERR unknown subcommand 'TRACKING' of CLIENT");
        refused("CLIENT", "ERR wrong number of arguments for 'client' command");
        assert_eq!(parse("SELECT 0"), Ok(Command::Select));
        refused("SELECT 1", "ERR DB index is out of range: there is only database 0");
        refused("GET k", "ERR unknown command 'GET', with args beginning with: 'k' ");
    }
}
