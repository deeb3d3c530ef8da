//! The commands that the agent knows, as COMMAND lists them.

/// A command: what COMMAND, and a client library that asks it, needs to know.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CommandInfo {
    /// In lower case.
    pub(super) name: &'static str,
    /// The least and the most words, with the name.
    words: (usize, usize),
    /// Whether the first argument is a key.
    pub(super) has_key: bool,
    pub(super) flags: &'static [&'static str],
    pub(super) summary: &'static str,
}

impl CommandInfo {
    /// The number of words, negative if it is a minimum, as Redis has it.
    pub(super) const fn arity(&self) -> i64 {
        let (least, most) = self.words;
        if least == most { least as i64 } else { -(least as i64) }
    }

    pub(super) const fn accepts(&self, words: usize) -> bool {
        self.words.0 <= words && words <= self.words.1
    }
}

const ANY: usize = usize::MAX;

const fn command(
    name: &'static str,
    words: (usize, usize),
    flags: &'static [&'static str],
    summary: &'static str,
) -> CommandInfo {
    CommandInfo {
        name,
        words,
        has_key: false,
        flags,
        summary,
    }
}

const fn on_key(info: CommandInfo) -> CommandInfo {
    CommandInfo { has_key: true, ..info }
}

/// All commands.
pub(super) static COMMANDS: [CommandInfo; 13] = [
    on_key(command(
        "lock",
        (2, ANY),
        &["write", "blocking"],
        "Acquires a lock, and replies its token.",
    )),
    on_key(command(
        "unlock",
        (3, 3),
        &["write"],
        "Releases a lock by its token, from any connection.",
    )),
    on_key(command(
        "held",
        (3, 3),
        &["readonly", "fast"],
        "Replies how long a lock is certainly held.",
    )),
    on_key(command(
        "inspect",
        (2, 2),
        &["readonly"],
        "Replies who holds a key and who waits for it.",
    )),
    command(
        "info",
        (1, ANY),
        &["loading", "stale"],
        "Replies the state of the agent.",
    ),
    command("ping", (1, 2), &["fast"], "Replies PONG, or the argument."),
    command("echo", (2, 2), &["fast"], "Replies the argument."),
    command(
        "hello",
        (1, ANY),
        &["noscript", "no_auth", "fast"],
        "Chooses the protocol and authenticates.",
    ),
    command(
        "auth",
        (2, 3),
        &["noscript", "no_auth", "fast"],
        "Authenticates the connection.",
    ),
    command(
        "client",
        (2, ANY),
        &["noscript"],
        "Names the connection, or replies what is known of it.",
    ),
    command("command", (1, ANY), &["loading", "stale"], "Replies the commands."),
    command("quit", (1, ANY), &["no_auth", "fast"], "Closes the connection."),
    command("select", (2, 2), &["fast"], "Accepts database 0, the only one."),
];

/// Finds a command by its name in any case.
pub(super) fn find(name: &[u8]) -> Option<&'static CommandInfo> {
    index_of(name).map(|index| &COMMANDS[index])
}

/// The place of a command in [`COMMANDS`], by its name in any case.
pub(super) fn index_of(name: &[u8]) -> Option<usize> {
    COMMANDS
        .iter()
        .position(|command| name.eq_ignore_ascii_case(command.name.as_bytes()))
}
