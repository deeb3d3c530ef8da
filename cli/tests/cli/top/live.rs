//! The view on a terminal: what it shows, how it reacts to keys, and how it ends.

use std::process::Command;

use rustix::process::Signal;
use support::{PATIENCE, RedisServer, Terminal};

use super::load::{HOT, Load, QUIET, STUCK, WAITING};
use super::{has, keys, row, top};
use crate::tool::bare;

#[test]
fn hot_keys_held_locks_and_shards_are_shown_in_80_by_24() {
    let server = RedisServer::start();
    let load = Load::start(&server, true);
    let terminal = top(&[&load.address]);
    let lines = terminal.until("rates are known", |lines| {
        row(lines, HOT).is_some_and(|row| row[6].parse::<f64>().is_ok_and(|rate| rate > 0.0))
    });
    assert_eq!(lines.len(), 24);
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
    assert!(
        lines[0].starts_with(&format!(" shardlock top  {}  {}, up ", load.address, load.process())),
        "{lines:#?}"
    );
    assert!(lines[0].ends_with(" every 100ms"), "{lines:#?}");
    assert!(
        lines[1].contains(" locks/s ") && lines[1].ends_with(" 1/1 shards up"),
        "{lines:#?}"
    );
    assert_eq!(
        lines[3].split_whitespace().collect::<Vec<_>>(),
        ["KEY", "HOLDER", "AGE", "WAITERS", "P50", "P99", "CONT/S▼"]
    );
    assert!(lines[23].starts_with(" q quit   ? help   tab view"), "{lines:#?}");
    terminal.until("a long key without its middle", |lines| {
        has(lines, "tenant:7f3c9a…1:settlement ")
    });
    terminal.until("the holder of the key that others wait for", |lines| {
        row(lines, STUCK).is_some_and(|row| row[1] == load.process() && row[3] == WAITING.to_string())
    });

    terminal.types("2");
    let oldest = [STUCK, QUIET].map(str::to_owned);
    // Other locks are held only briefly.
    let lines = terminal.until("what is held, the oldest first", |lines| {
        keys(lines).starts_with(&oldest)
    });
    let stuck = row(&lines, STUCK).unwrap();
    assert_eq!((stuck[1], stuck[4]), (load.process().as_str(), "3"), "{lines:#?}");
    assert!(stuck[5].starts_with('…') && stuck[5].contains("load.rs:"), "{lines:#?}");

    terminal.types("\t");
    // While the machine stalls the server, there are no locks.
    let lines = terminal.until("the shard, with a rate", |lines| {
        row(lines, "eu-1").is_some_and(|row| row[4].parse::<f64>().is_ok_and(|rate| rate > 0.0))
    });
    let shard = row(&lines, "eu-1").unwrap();
    assert_eq!(shard[1], "up", "{lines:#?}");
    // Milliseconds, or seconds after a stall.
    assert!(shard[7].ends_with('s'), "{lines:#?}");
    terminal.types("\t");
    terminal.until("the first view again", |lines| row(lines, HOT).is_some());
}

#[test]
fn keys_sort_reverse_filter_and_pause() {
    let server = RedisServer::start();
    let mut load = Load::start(&server, true);
    let terminal = top(&[&load.address]);
    terminal.until("everything is shown", |lines| {
        row(lines, STUCK).is_some() && row(lines, HOT).is_some()
    });
    // From the last column to the first, which has a known order.
    terminal.types("s");
    let lines = terminal.until("sorted by key", |lines| has(lines, "KEY▲"));
    let mut sorted = keys(&lines);
    sorted.sort();
    assert_eq!(keys(&lines), sorted);
    terminal.types("r");
    let lines = terminal.until("reversed", |lines| has(lines, "KEY▼"));
    sorted = keys(&lines);
    sorted.sort();
    sorted.reverse();
    assert_eq!(keys(&lines), sorted);

    terminal.types("/");
    terminal.shows("enter keeps the filter, esc clears it");
    terminal.types("NIGHTLY");
    terminal.until("the filter applies while it is typed", |lines| keys(lines) == [STUCK]);
    terminal.types("\r");
    let lines = terminal.shows("only \"NIGHTLY\"");
    assert!(has(&lines, "1 hot keys 1 "), "{lines:#?}");
    terminal.types("/x");
    terminal.shows("nothing matches the filter");
    terminal.types("\x1b");
    terminal.until("everything again", |lines| keys(lines).len() > 3);

    terminal.types(" ");
    let paused = terminal.shows(" PAUSED");
    // Two rounds of work, each of which would be visible.
    load.wait_for_progress();
    load.wait_for_progress();
    assert_eq!(terminal.lines(), paused);
    // Commands work on the paused view.
    terminal.types("r");
    let reversed = terminal.shows("KEY▲");
    assert_eq!(keys(&reversed).iter().rev().cloned().collect::<Vec<_>>(), keys(&paused));
    terminal.types(" ");
    terminal.until("the view continues", |lines| {
        !has(lines, "PAUSED") && lines[1] != paused[1]
    });
}

#[test]
fn resized_window_is_filled_at_once() {
    let server = RedisServer::start();
    let load = Load::start(&server, true);
    let terminal = top(&[&load.address]);
    terminal.until("everything is shown", |lines| row(lines, STUCK).is_some());
    terminal.resize(40, 160);
    let lines = terminal.until("the window is larger", |lines| lines[39].starts_with(" q quit"));
    assert!(has(&lines, "CONTENDED"), "{lines:#?}");
    terminal.shows(super::load::LONG);
    terminal.resize(8, 40);
    let lines = terminal.until("the window is smaller", |lines| {
        lines[7].starts_with(" q quit") && has(lines, "WAITERS")
    });
    assert!(!has(&lines, "HOLDER"), "{lines:#?}");
    terminal.resize(2, 10);
    terminal.until("the window is tiny", |lines| lines[1].starts_with("KEY"));
    terminal.resize(24, 80);
    terminal.shows("CONT/S");
}

/// The tool started from a shell, which prints its exit code.
#[track_caller]
fn from_a_shell(script: &str, address: &str) -> (Terminal, String) {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            &format!("echo ready; read line; {script}; echo \"code $?\"; read line"),
        ])
        .arg(bare(&[]).get_program())
        .arg(address);
    let terminal = Terminal::open(command, 24, 80);
    terminal.shows("ready");
    let modes = terminal.modes();
    terminal.types("go\n");
    (terminal, modes)
}

#[track_caller]
fn assert_restored(terminal: &Terminal, modes: &str) {
    let screen = terminal.screen();
    assert!(
        !screen.alternate_screen() && !screen.hide_cursor(),
        "{}",
        screen.contents()
    );
    assert_eq!(terminal.modes(), modes);
}

#[test]
fn terminal_is_restored_at_exit() {
    let server = RedisServer::start();
    let load = Load::start(&server, false);
    for key in ["q", "\x03"] {
        let (terminal, modes) = from_a_shell("\"$0\" top \"$1\"", &load.address);
        terminal.shows("locks/s");
        assert!(terminal.screen().alternate_screen() && terminal.screen().hide_cursor());
        assert_ne!(terminal.modes(), modes);
        terminal.types(key);
        let lines = terminal.shows("code 0");
        // The previous content of the screen is restored, and nothing else is there.
        assert_eq!(lines[..3], ["ready", "go", "code 0"]);
        assert_restored(&terminal, &modes);
    }
}

#[test]
fn terminal_is_restored_after_a_signal() {
    let server = RedisServer::start();
    let load = Load::start(&server, false);
    for (signal, code) in [
        (Signal::TERM, 143),
        (Signal::INT, 130),
        (Signal::HUP, 129),
        (Signal::QUIT, 131),
    ] {
        let mut terminal = top(&[&load.address]);
        terminal.shows("locks/s");
        terminal.process.signal(signal);
        assert_eq!(terminal.process.wait(PATIENCE).code(), Some(code));
        terminal.until("the screen is left, with a cursor", |_| {
            let screen = terminal.screen();
            !screen.alternate_screen() && !screen.hide_cursor()
        });
    }
}

#[test]
fn top_is_stopped_and_continued_by_its_shell() {
    let server = RedisServer::start();
    let load = Load::start(&server, false);
    let script = "set -m; \"$0\" top --interval 100ms \"$1\"; echo \"stopped $?\"; read line; fg";
    let (terminal, modes) = from_a_shell(script, &load.address);
    terminal.shows("locks/s");
    terminal.types("\x1a");
    terminal.shows("stopped ");
    assert_restored(&terminal, &modes);
    terminal.types("go\n");
    terminal.until("the view is back", |lines| {
        has(lines, "locks/s") && terminal.screen().alternate_screen()
    });
    terminal.types("q");
    terminal.shows("code 0");
    assert_restored(&terminal, &modes);
}
