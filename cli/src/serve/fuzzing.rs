//! Invariants of what the agent parses from its clients. The fuzz target in `fuzz/` that runs this
//! includes this file, `requests.rs`, `command.rs` and `command_table.rs` as modules.

use shardlock::tool::must_be_escaped;

use super::command::{Command, Lock, LockId, Mode, Wait};
use super::requests::{Malformed, Requests};

/// The longest request. Short, so that the fuzzer reaches it.
const BYTES_MAX: usize = 256;

/// What a client sends. The first byte is the size of the parts in which it arrives, 0 for one
/// part.
pub(crate) fn agent_requests(data: &[u8]) {
    let Some((&part, bytes)) = data.split_first() else {
        return;
    };
    let whole = read(bytes, usize::MAX);
    assert_eq!(
        read(bytes, usize::from(part).max(1)),
        whole,
        "it depends on how the bytes arrive"
    );

    let (requests, error) = whole;
    for words in &requests {
        assert!(!words.is_empty());
        let length: usize = words.iter().map(Vec::len).sum();
        assert!(length <= BYTES_MAX);
        parse(words);
        // As a client library sends the same words.
        let encoded = encoded(words);
        if encoded.len() <= BYTES_MAX {
            assert_eq!(read(&encoded, usize::MAX), (vec![words.clone()], None));
        }
    }
    if let Some(error) = error {
        shown(&error.to_string());
    }
}

type Request = Vec<Vec<u8>>;

/// The requests in these bytes, and the error after them.
fn read(bytes: &[u8], part: usize) -> (Vec<Request>, Option<Malformed>) {
    let mut requests = Requests::new(BYTES_MAX);
    let (mut found, mut left) = (Vec::new(), bytes);
    loop {
        match requests.next(|words| words.iter().map(|word| word.to_vec()).collect()) {
            Ok(Some(words)) => found.push(words),
            Err(error) => {
                assert_eq!(requests.next(|_| ()), Err(error.clone()), "an error is final");
                return (found, Some(error));
            }
            Ok(None) if left.is_empty() => return (found, None),
            Ok(None) => {
                let room = requests.room();
                assert!((1..=BYTES_MAX).contains(&room), "nothing more can arrive");
                let (now, later) = left.split_at(left.len().min(part).min(room));
                requests.add(now);
                left = later;
            }
        }
    }
}

fn encoded(words: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

fn parse(words: &[Vec<u8>]) {
    let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
    match Command::parse(&words) {
        Ok(Command::Lock(lock)) => assert_eq!(parse_again(&lock), lock),
        Ok(Command::Unlock(id)) => {
            let token = id.token.to_string();
            let again = Command::parse(&[b"unlock", id.key.as_str().as_bytes(), token.as_bytes()]);
            assert_eq!(again, Ok(Command::Unlock(LockId { ..id })));
        }
        Ok(_) => {}
        Err(refusal) => shown(&refusal.to_string()),
    }
}

/// Writes the lock as a command, in another order of the options, and parses it.
fn parse_again(lock: &Lock) -> Lock {
    let mut words = vec!["LOCK".to_owned(), lock.key.as_str().to_owned()];
    let mut add = |more: &[&str]| words.extend(more.iter().map(|&word| word.to_owned()));
    if let Some(class) = &lock.class {
        add(&["CLASS", class]);
    }
    for (name, time) in [
        ("MAXHOLD", lock.max_hold),
        ("MINHOLD", lock.min_hold),
        ("TTL", lock.ttl),
    ] {
        if let Some(time) = time {
            add(&[name, &time.as_millis().to_string()]);
        }
    }
    match lock.mode {
        Mode::Exclusive => {}
        Mode::Shared => add(&["SHARED"]),
        Mode::Permits { weight, limit } => {
            add(&["PERMITS", &weight.to_string(), "OF", &limit.to_string()]);
        }
    }
    match lock.wait {
        Wait::Default => {}
        Wait::No => add(&["NOWAIT"]),
        Wait::AtMost(time) => add(&["TIMEOUT", &time.as_millis().to_string()]),
    }
    let words: Vec<&[u8]> = words.iter().map(String::as_bytes).collect();
    match Command::parse(&words) {
        Ok(Command::Lock(lock)) => lock,
        other => panic!("{other:?}"),
    }
}

/// An error is one printable line that is not long, and begins with its code.
fn shown(error: &str) {
    assert!(error.len() < 2_000 && !error.contains(must_be_escaped), "{error}");
    let code = error.split(' ').next().unwrap_or_default();
    assert!(
        code.len() > 2 && code.bytes().all(|byte| byte.is_ascii_uppercase()),
        "{error}"
    );
}
