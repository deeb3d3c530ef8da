use std::time::Duration;

use super::{head, text};
use crate::cycle::{Cycle, Cycles};
use crate::identity::{ManagerId, manager_of, parse_owner_tag};
use crate::mode::LockMode;

/// Lease values and queue members: the owner tag `<manager>:<cycle>`, which any client with write
/// access to the store may have written.
pub fn owner_tags(data: &[u8]) {
    read(&text(data));
    written(data);
}

fn read(text: &str) {
    let parsed = parse_owner_tag(text);
    // Matching the pattern takes quadratic time.
    if text.len() <= 600 {
        // The script does not check how many bits its numbers need.
        let fits = |cycle: &str| {
            let mut parts = cycle.split('-');
            let number = parts.next().is_some_and(|number| number.parse::<u64>().is_ok());
            number && parts.next().is_some_and(|ttl| ttl.parse::<u32>().is_ok())
        };
        let in_script = lua::is_signed(text.as_bytes())
            .then(|| text.rsplit_once(':').unwrap())
            .filter(|(_, cycle)| fits(cycle));
        // A lease is never that of a shared holder or of permits; those are in a set.
        let exclusive = parsed.filter(|(_, cycle)| cycle.mode().is_exclusive());
        assert_eq!(
            exclusive.map(|(manager, _)| manager),
            in_script.map(|(manager, _)| manager),
            "the scripts and the manager follow the same rule"
        );
    }
    match parsed {
        Some((manager, cycle)) => {
            assert_eq!(manager_of(text), Some(manager));
            let written = format!("{manager}:{cycle}");
            assert_eq!(parse_owner_tag(&written), Some((manager, cycle)));
            // Text that is accepted but never written differs only by extra zeros or capital
            // letters.
            let bare = |text: &str| text.to_ascii_lowercase().replace('0', "");
            assert_eq!(bare(text), bare(&written));
            let mut bytes = Vec::new();
            cycle.write_to(&mut bytes).unwrap();
            assert_eq!(bytes, cycle.to_string().as_bytes());
        }
        None => {
            if let Some(manager) = manager_of(text) {
                assert!(text.starts_with(&format!("{manager}:")));
            }
        }
    }
}

fn written(data: &[u8]) {
    let (numbers, rest) = head::<24>(data);
    let part = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
    let (number, random) = (part(0), part(8));
    let (pid, ttl_ms) = (part(16) as u32, (part(16) >> 32) as u32);
    let id = ManagerId::of(&text(rest), pid, random);
    assert!(id.as_str().len() <= 64 + 1 + 10 + 1 + 16);
    let cycles = Cycles::with_secret([number, random]);
    let own = cycles.open(
        LockMode::Exclusive,
        pid.is_multiple_of(2),
        Duration::from_millis(ttl_ms.into()),
    );
    let any = Cycle::parse(&format!("{number}-{ttl_ms}-{pid:08x}")).unwrap();
    for cycle in [own, any] {
        let owner_tag = id.owner_tag(cycle).to_string();
        assert_eq!(parse_owner_tag(&owner_tag), Some((id.as_str(), cycle)));
        assert_eq!(manager_of(&owner_tag), Some(id.as_str()));
    }
    assert!(cycles.has_opened(own));
    assert!(own.ttl() >= Duration::from_millis(1));
}

/// The pattern of the script for owner tags, read from the script, and the part of Lua's pattern
/// matching that it needs.
mod lua {
    use std::sync::OnceLock;

    /// One character of a class, or one or more.
    struct Item {
        class: Vec<u8>,
        many: bool,
    }

    /// The patterns of an owner tag, of the end of the manager's name, and of the part before that.
    struct Rule {
        owner_tag: Vec<Item>,
        random: Vec<Item>,
        pid: Vec<Item>,
    }

    /// Whether the script takes the text for a manager's owner tag.
    pub(super) fn is_signed(text: &[u8]) -> bool {
        static RULE: OnceLock<Rule> = OnceLock::new();
        let rule = RULE.get_or_init(|| {
            let script = include_str!("../store/redis/scripts/queue.lua");
            let between =
                |start: &str, end: &str| items(script.split_once(start).unwrap().1.split_once(end).unwrap().0);
            Rule {
                owner_tag: between("string.match(owner_tag, '^", "$')"),
                random: between("string.find(manager, '^", "$', -17)"),
                pid: between("string.find(string.sub(manager, -29, -18), '", "$')"),
            }
        });
        if !matches(&rule.owner_tag, text) {
            return false;
        }
        let manager = &text[..text.iter().rposition(|&byte| byte == b':').unwrap()];
        let Some(middle) = manager.len().checked_sub(17) else {
            return false;
        };
        let before = &manager[middle.saturating_sub(12)..middle];
        let is_pid = |at: usize| matches(&rule.pid, &before[at..]);
        matches(&rule.random, &manager[middle..]) && (0..=before.len()).any(is_pid)
    }

    fn items(pattern: &str) -> Vec<Item> {
        let mut items = Vec::new();
        let mut chars = pattern.chars().filter(|char| !"()".contains(*char)).peekable();
        while let Some(char) = chars.next() {
            let class = match char {
                '[' => {
                    let mut set = Vec::new();
                    while let Some(char) = chars.next().filter(|&char| char != ']') {
                        set.extend(match char {
                            '%' => class(chars.next().unwrap()),
                            char => vec![char as u8],
                        });
                    }
                    set
                }
                '%' => class(chars.next().unwrap()),
                '.' => (0..=u8::MAX).collect(),
                char => vec![char as u8],
            };
            let many = chars.next_if_eq(&'+').is_some();
            items.push(Item { class, many });
        }
        items
    }

    fn class(name: char) -> Vec<u8> {
        let is_in: fn(&u8) -> bool = match name {
            'w' => u8::is_ascii_alphanumeric,
            'd' => u8::is_ascii_digit,
            'x' => u8::is_ascii_hexdigit,
            char => return vec![char as u8],
        };
        (0..=u8::MAX).filter(is_in).collect()
    }

    fn matches(pattern: &[Item], text: &[u8]) -> bool {
        let Some((item, rest)) = pattern.split_first() else {
            return text.is_empty();
        };
        let longest = text.iter().take_while(|byte| item.class.contains(byte)).count();
        let longest = if item.many { longest } else { longest.min(1) };
        (1..=longest).rev().any(|length| matches(rest, &text[length..]))
    }
}
