//! Frames on screens of several sizes.

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::{Color, Modifier};
use shardlock::LockMode;

use super::*;
use crate::top::keys::{Action, Edit, Motion};
use crate::top::source::{Age, HeldLock, HeldMode, Holder, HotKey, Locks, PolledSample, Quantiles, Sample, Shard};

const fn exactly(ms: u64) -> Age {
    Age {
        time: Duration::from_millis(ms),
        at_least: false,
    }
}

fn hot(key: &str, contended: u64, waiters: usize, held_ms: Option<u64>) -> HotKey {
    HotKey {
        key: key.to_owned(),
        shard: "a".to_owned(),
        contended: Some(contended),
        waiters,
        holder: held_ms.map(|ms| Holder {
            process: "vm-7".to_owned(),
            age: exactly(ms),
        }),
        waits: Some(Quantiles {
            p50: Duration::from_micros(1500),
            p99: Duration::from_millis(340),
        }),
    }
}

fn held(key: &str, age_ms: u64, caller: &str) -> HeldLock {
    HeldLock {
        key: key.to_owned(),
        shard: "a".to_owned(),
        holder: "vm-7".to_owned(),
        mode: HeldMode::default(),
        age: exactly(age_ms),
        remaining: Some(Duration::from_millis(9_400)),
        waiters: 0,
        token: Some(477_961_681_116_137),
        caller: Some(caller.to_owned()),
    }
}

fn shard(name: &str, up: bool, acquired: u64) -> Shard {
    Shard {
        name: name.to_owned(),
        kind: "redis".to_owned(),
        up,
        leases: 2,
        waiters: 12,
        locks: Some(Locks {
            acquired,
            local: acquired / 2,
            remote: acquired / 10,
        }),
        round_trips: Quantiles {
            p50: Duration::from_micros(130),
            p99: Duration::from_micros(820),
        },
    }
}

const LONG: &str = "tenant:7f3c9a51-0b1d-4f0e-9a77-d1c2b3a49586:invoice:2026-11:settlement";

fn sample(round: u64) -> Sample {
    Sample {
        manager: Some("vm-7-0123456789abcdef".to_owned()),
        uptime: Some(Duration::from_secs(192)),
        hot: vec![
            hot("coupon:123", 1000 + round * 250, 12, Some(3)),
            hot(LONG, 100 + round * 8, 3, None),
            hot("鍵:1", 40, 0, None),
        ],
        held: vec![
            held("nightly-report", 4_321_000, "src/jobs/nightly/report.rs:57:13"),
            held("coupon:123", 3, "src/coupon.rs:9:5"),
        ],
        held_total: 2,
        shards: vec![shard("a", true, round * 12_345), shard("b", false, round * 10)],
        ..Sample::default()
    }
}

/// A model with two samples, a second apart, and the time of the second.
fn model() -> (Model, Instant) {
    let mut model = Model::new(["127.0.0.1:9187".to_owned()], View::Hot);
    let start = Instant::now();
    for round in 0..2 {
        let at = start + Duration::from_secs(round);
        let sample = Ok(sample(round));
        model.apply_sample(PolledSample { source: 0, sample, at });
    }
    (model, start + Duration::from_secs(1))
}

const SETTING: DisplaySettings = DisplaySettings {
    interval: Duration::from_secs(1),
    colours: true,
};

fn drawn(model: &mut Model, now: Instant, columns: u16, rows: u16) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    let draw = |drawing: &mut ratatui::Frame<'_>| {
        let area = drawing.area();
        frame(drawing.buffer_mut(), area, model, SETTING, now);
    };
    terminal.draw(draw).unwrap();
    terminal
}

/// Compares the first lines and the last line of a screen of this size.
#[track_caller]
fn shows(model: &mut Model, now: Instant, (columns, rows): (u16, u16), top: &[&str], bottom: &str) {
    let terminal = drawn(model, now, columns, rows);
    let blanks = usize::from(rows) - top.len() - 1;
    let expected = top
        .iter()
        .copied()
        .chain(std::iter::repeat_n("", blanks))
        .chain([bottom]);
    let padded = expected.map(|line| {
        let width = format::width(line);
        assert!(width <= usize::from(columns), "{line}");
        format!("{line}{}", " ".repeat(usize::from(columns) - width))
    });
    let mut buffer = Buffer::with_lines(padded.collect::<Vec<_>>());
    // Only the text is compared.
    let mut seen = terminal.backend().buffer().clone();
    for cell in buffer.content.iter_mut().chain(&mut seen.content) {
        cell.set_style(ratatui::style::Style::reset());
    }
    assert_eq!(seen, buffer);
}

const KEYS: &str = " q quit   ? help   tab view   s sort   r reverse   / filter   space pause";

#[test]
fn hot_keys_on_a_screen_of_80_by_24() {
    let (mut model, now) = model();
    let top = [
        " shardlock top  127.0.0.1:9187  vm-7, up 3m12s                         every 1s ",
        " 12.4k locks/s   24 waiting   2 held   1/2 shards up",
        "  1 hot keys 3   2 held 2   3 shards 2",
        "KEY                        HOLDER             AGE  WAITERS    P50    P99 CONT/S▼",
        "coupon:123                 vm-7            3.00ms       12 1.50ms  340ms     250",
        "tenant:7f3c9a…1:settlement not here             -        3 1.50ms  340ms     8.0",
        "鍵:1                       -                    -        0 1.50ms  340ms       0",
    ];
    shows(&mut model, now, (80, 24), &top, KEYS);
}

#[test]
fn held_locks_on_a_screen_of_80_by_24() {
    let (mut model, now) = model();
    model.apply(Action::NextView);
    let top = [
        " shardlock top  127.0.0.1:9187  vm-7, up 3m12s                         every 1s ",
        " 12.4k locks/s   24 waiting   2 held   1/2 shards up",
        "  1 hot keys 3   2 held 2   3 shards 2",
        "KEY                      HOLDER            AGE▼   LEFT  WAITERS CALLER",
        "nightly-report           vm-7             1h12m   9.4s        0 …report.rs:57:13",
        "coupon:123               vm-7            3.00ms   9.4s        0 …c/coupon.rs:9:5",
    ];
    shows(&mut model, now, (80, 24), &top, KEYS);
}

#[test]
fn keys_that_are_held_together_on_a_screen_of_80_by_24() {
    let (mut model, now) = model();
    let of = |key: &str, ms, mode| HeldLock {
        mode: HeldMode::of_guard(mode),
        ..held(key, ms, "src/calls.rs:9:5")
    };
    let permits = |weight| LockMode::Permits { weight, limit: 10 };
    let mut sample = sample(1);
    sample.held.extend([
        of("partner-api", 5_000, permits(2)),
        of("partner-api", 20, permits(1)),
        of("prices", 30, LockMode::Shared),
    ]);
    let sample = Ok(sample);
    model.apply_sample(PolledSample {
        source: 0,
        sample,
        at: now,
    });
    model.apply(Action::NextView);
    let top = [
        " shardlock top  127.0.0.1:9187  vm-7, up 3m12s                         every 1s ",
        " - locks/s   24 waiting   4 held   1/2 shards up",
        "  1 hot keys 3   2 held 4   3 shards 2",
        "KEY                MODE           HOLDERS HOLDER            AGE▼   LEFT  WAITERS",
        "nightly-report     exclusive            1 vm-7             1h12m   9.4s        0",
        "partner-api        3/10 permits         2 vm-7              5.0s   9.4s        0",
        "prices             shared               1 vm-7            30.0ms   9.4s        0",
        "coupon:123         exclusive            1 vm-7            3.00ms   9.4s        0",
    ];
    shows(&mut model, now, (80, 24), &top, KEYS);
}

#[test]
fn shards_on_a_screen_of_80_by_24() {
    let (mut model, now) = model();
    model.apply(Action::LastView);
    let top = [
        " shardlock top  127.0.0.1:9187  vm-7, up 3m12s                         every 1s ",
        " 12.4k locks/s   24 waiting   2 held   1/2 shards up",
        "  1 hot keys 3   2 held 2   3 shards 2",
        "SHARD▲     STATE     LEASES  WAITERS  LOCKS/S  LOCAL/S  REMOTE/S  RT P50  RT P99",
        "a          up             2       12    12.3k     6172      1234  0.13ms  0.82ms",
        "b          down           2       12       10      5.0       1.0  0.13ms  0.82ms",
    ];
    shows(&mut model, now, (80, 24), &top, KEYS);
    let terminal = drawn(&mut model, now, 80, 24);
    let buffer = terminal.backend().buffer();
    assert_eq!(buffer[(0, 5)].fg, Color::Red);
    assert!(buffer[(16, 2)].modifier.is_empty() && buffer[(30, 2)].modifier.contains(Modifier::REVERSED));
}

#[test]
fn a_small_screen_keeps_what_matters_most() {
    let (mut model, now) = model();
    let top = [
        " shardlock top  127.0.0.1:9187 every 1s ",
        "  1 hot keys 3   2 held 2   3 shards 2",
        "KEY                       WAITERS    P99",
        "coupon:123                     12  340ms",
        "tenant:7f3c9…:settlement        3  340ms",
        "鍵:1                            0  340ms",
    ];
    shows(&mut model, now, (40, 7), &top, &KEYS[..40]);
    shows_texts(&mut model, now, (24, 3), &["KEY", "coupon:123"]);
}

#[track_caller]
fn shows_texts(model: &mut Model, now: Instant, (columns, rows): (u16, u16), texts: &[&str]) {
    let screen = drawn(model, now, columns, rows).backend().to_string();
    for text in texts {
        assert!(screen.contains(text), "{text:?} is not on\n{screen}");
    }
}

#[test]
fn every_size_can_be_drawn_in_every_state() {
    let (mut model, now) = model();
    for columns in [0, 1, 2, 3, 10, 24, 47, 80, 81, 130] {
        for rows in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 24, 60] {
            for action in [
                Action::NextView,
                Action::Help,
                Action::Help,
                Action::Move(Motion::Last),
                Action::Filter(Edit::Begin),
                Action::Escape,
            ] {
                model.apply(action);
                drawn(&mut model, now, columns, rows);
            }
        }
    }
}

#[test]
fn unavailable_source_is_shown_with_the_reason_and_its_rows_stay_and_are_faint() {
    let (mut model, now) = model();
    let reason = || Err("connection refused".to_owned());
    model.apply_sample(PolledSample {
        source: 0,
        sample: reason(),
        at: now,
    });
    model.apply_sample(PolledSample {
        source: 0,
        sample: reason(),
        at: now + Duration::from_secs(2),
    });
    let later = now + Duration::from_secs(3);
    shows_texts(
        &mut model,
        later,
        (80, 24),
        &[
            " 127.0.0.1:9187 unavailable for 3.0s, stale for 3.0s: connection refused",
            "coupon:123 ",
        ],
    );
    let terminal = drawn(&mut model, later, 80, 24);
    assert_eq!(terminal.backend().buffer()[(1, 1)].fg, Color::Red);
    assert!(terminal.backend().buffer()[(0, 4)].modifier.contains(Modifier::DIM));
    model.apply_sample(PolledSample {
        source: 0,
        sample: Ok(sample(2)),
        at: later,
    });
    shows_texts(&mut model, later, (80, 24), &["locks/s"]);
}

#[test]
fn the_help_fits_on_a_screen_of_80_by_24() {
    let (mut model, now) = model();
    model.apply(Action::Help);
    let last = help::lines().last().unwrap().to_string();
    shows_texts(
        &mut model,
        now,
        (80, 24),
        &["sort by the next column", last.trim(), "q quit"],
    );
    assert!(help::lines().iter().all(|line| line.width() <= 80));
}

#[test]
fn frame_without_colours_has_none() {
    let (mut model, now) = model();
    let area = Rect::new(0, 0, 80, 24);
    let mut buffer = Buffer::empty(area);
    let settings = DisplaySettings {
        colours: false,
        ..SETTING
    };
    frame(&mut buffer, area, &mut model, settings, now);
    assert!(
        buffer
            .content
            .iter()
            .all(|cell| cell.fg == Color::Reset && cell.bg == Color::Reset)
    );
    assert!(
        buffer
            .content
            .iter()
            .any(|cell| cell.modifier.contains(Modifier::REVERSED))
    );
}

#[test]
fn plain_text_has_all_rows_whole() {
    let (model, now) = model();
    let text = plain_text(&model, &[View::Hot, View::Shards], now);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "127.0.0.1:9187 vm-7-0123456789abcdef");
    assert_eq!(lines[1], "12.4k locks/s   24 waiting   2 held   1/2 shards up");
    assert!(lines[3].starts_with("KEY ") && lines[3].ends_with(" CONT/S▼"), "{text}");
    assert!(lines[5].starts_with(&format!("{LONG} ")), "{text}");
    assert!(lines[8].starts_with("SHARD▲ KIND "), "{text}");
}

#[test]
fn clients_of_an_agent_fit_every_width_and_have_a_tab_only_if_there_is_an_agent() {
    let page = r#"{"total":1,"connections":3,"connections_max":10,"locks":5,"waiting":1,"clients":[
        {"pid":4242,"uid":1000,"gid":1000,"address":null,"name":"","library":"redis-py 6.4.0","connections":3,
         "age_ms":9.5,"locks":5,"waiting":1,"held":[
           {"key":"a","mode":"exclusive","token":9,"age_ms":4500,"remaining_ms":3,"connection":4},
           {"key":"b","mode":"exclusive","token":9,"age_ms":1.5,"remaining_ms":3,"connection":4}],
         "waits":[{"key":"c","mode":"shared","waited_ms":250,"connection":5}]}]}"#;
    let without = Model::new(["p".to_owned()], View::Hot);
    assert!(!without.views().contains(&View::Clients));
    let mut model = Model::new(["agent".to_owned()], View::Clients);
    let now = Instant::now();
    model.apply_sample(PolledSample {
        source: 0,
        sample: Ok(Sample {
            clients: Some(serde_json::from_str(page).unwrap()),
            ..Sample::default()
        }),
        at: now,
    });
    let text = plain_text(&model, model.views(), now);
    let row = text.lines().last().unwrap();
    for part in [
        "4242 ",
        " redis-py 6.4.0 ",
        " 1000 ",
        "4.5s",
        "250ms",
        "a, b and 3 more; waits for c",
    ] {
        assert!(row.contains(part), "no {part:?} in {row}");
    }
    let settings = DisplaySettings {
        interval: Duration::from_secs(1),
        colours: true,
    };
    for width in 1..130 {
        let area = Rect::new(0, 0, width, 12);
        let mut buffer = Buffer::empty(area);
        frame(&mut buffer, area, &mut model, settings, now);
    }
    model.apply(Action::NextView);
    assert_eq!(model.view(), View::Hot);
    model.apply(Action::LastView);
    assert_eq!(model.view(), View::Clients);
}
