//! Tests of merging, sorting, filtering and pausing.

use std::time::Duration;

use shardlock::LockMode;

use super::*;
use crate::top::source::{Age, HeldLock, HeldMode, Holder, HotKey, Quantiles, Sample, Shard};

fn age(ms: u64) -> Age {
    Age {
        time: Duration::from_millis(ms),
        at_least: false,
    }
}

fn hot(key: &str, contended: u64, waiters: usize, holder: Option<(&str, u64)>, p99_ms: u64) -> HotKey {
    HotKey {
        key: key.to_owned(),
        shard: "s".to_owned(),
        contended: Some(contended),
        waiters,
        holder: holder.map(|(process, ms)| Holder {
            process: process.to_owned(),
            age: age(ms),
        }),
        waits: Some(Quantiles {
            p50: Duration::from_millis(1),
            p99: Duration::from_millis(p99_ms),
        }),
    }
}

fn held(key: &str, holder: &str, ms: u64, token: u64) -> HeldLock {
    HeldLock {
        key: key.to_owned(),
        shard: "s".to_owned(),
        holder: holder.to_owned(),
        mode: HeldMode::default(),
        age: age(ms),
        remaining: None,
        waiters: 1,
        token: Some(token),
        caller: None,
    }
}

fn model_of(samples: Vec<Sample>) -> Model {
    let labels = (0..samples.len()).map(|number| format!("p{number}"));
    let mut model = Model::new(labels, View::Hot);
    let at = Instant::now();
    for (source, sample) in samples.into_iter().enumerate() {
        model.apply_sample(PolledSample {
            source,
            sample: Ok(sample),
            at,
        });
    }
    model
}

fn with_hot(hot: Vec<HotKey>) -> Sample {
    Sample {
        hot,
        ..Sample::default()
    }
}

fn keys(model: &Model) -> Vec<String> {
    model.rows().hot.into_iter().map(|row| row.key).collect()
}

#[test]
fn a_key_of_several_processes_is_one_row() {
    let model = model_of(vec![
        with_hot(vec![hot("k", 10, 2, None, 5)]),
        with_hot(vec![hot("k", 30, 3, Some(("two", 7)), 90), hot("other", 5, 1, None, 1)]),
    ]);
    let rows = model.rows().hot;
    assert_eq!(rows.len(), 2);
    assert_eq!((rows[0].key.as_str(), rows[0].contended, rows[0].waiters), ("k", 40, 5));
    assert_eq!((rows[0].holder.as_deref(), rows[0].age), (Some("two"), Some(age(7))));
    assert_eq!(rows[0].waits.unwrap().p99, Duration::from_millis(90));
    // The key has a waiter, and neither process holds it.
    assert_eq!(rows[1].holder.as_deref(), Some("not here"));
}

#[test]
fn later_of_two_reported_holders_is_shown() {
    let model = model_of(vec![
        Sample {
            held: vec![held("k", "one", 500, 7)],
            held_total: 1,
            ..with_hot(vec![hot("k", 1, 0, Some(("one", 500)), 1)])
        },
        Sample {
            held: vec![held("k", "two", 3, 8)],
            held_total: 1,
            ..with_hot(vec![hot("k", 1, 0, Some(("two", 3)), 1)])
        },
    ]);
    let rows = model.rows();
    assert_eq!(rows.hot[0].holder.as_deref(), Some("two"));
    assert_eq!(
        (rows.held.len(), rows.held[0].holder.as_str(), rows.held[0].waiters),
        (1, "two", 2)
    );
}

/// Each guard reports the tasks that wait for its key in its process.
#[test]
fn holders_of_a_key_together_are_one_row() {
    let of = |mode, ms, token, holder| HeldLock {
        mode: HeldMode::of_guard(mode),
        ..held("k", holder, ms, token)
    };
    let one = LockMode::Permits { weight: 1, limit: 10 };
    let two = LockMode::Permits { weight: 2, limit: 8 };
    let model = model_of(vec![
        Sample {
            held: vec![of(one, 500, 7, "one"), of(two, 20, 9, "one")],
            ..with_hot(vec![hot("k", 1, 1, Some(("one", 500)), 1)])
        },
        Sample {
            held: vec![of(one, 900, 6, "two")],
            ..Sample::default()
        },
    ]);
    let rows = model.rows();
    assert_eq!(rows.held.len(), 1);
    let row = &rows.held[0];
    assert_eq!((row.mode.to_string().as_str(), row.mode.holders()), ("4/8 permits", 3));
    assert_eq!(
        (row.holder.as_str(), row.age, row.token),
        ("several", age(900), Some(9))
    );
    assert_eq!(row.waiters, 2);
    assert_eq!(
        (rows.hot[0].holder.as_deref(), rows.hot[0].age),
        (Some("4/8 permits"), Some(age(900)))
    );
    let model = model_of(vec![Sample {
        held: vec![of(LockMode::Shared, 5, 1, "one"), of(LockMode::Shared, 6, 2, "one")],
        ..with_hot(vec![hot("k", 1, 1, Some(("one", 6)), 1)])
    }]);
    let rows = model.rows();
    let row = &rows.held[0];
    assert_eq!((row.holder.as_str(), row.mode.to_string().as_str()), ("one", "shared"));
    assert_eq!(rows.hot[0].holder.as_deref(), Some("2 shared"));
}

#[test]
fn held_lock_counts_waiters_in_other_processes() {
    let model = model_of(vec![
        Sample {
            held: vec![held("k", "one", 500, 7)],
            ..Sample::default()
        },
        with_hot(vec![hot("k", 1, 4, None, 1)]),
    ]);
    assert_eq!(model.rows().held[0].waiters, 5);
}

#[test]
fn key_held_for_long_with_waiters_is_shown_among_the_hot_keys() {
    let model = model_of(vec![Sample {
        held: vec![held("k", "one", 60_000, 7)],
        ..with_hot(vec![hot("other", 1, 0, None, 1)])
    }]);
    let rows = model.rows().hot;
    let stuck = rows.iter().find(|row| row.key == "k").unwrap();
    assert_eq!(
        (stuck.waiters, stuck.holder.as_deref(), stuck.waits),
        (1, Some("one"), None)
    );
    assert_eq!(model.totals().held, 1);
}

#[test]
fn a_shard_is_up_as_far_as_processes_see_it_so() {
    let shard = |up| Sample {
        shards: vec![Shard {
            name: "s".to_owned(),
            up,
            leases: 3,
            ..Shard::default()
        }],
        ..Sample::default()
    };
    let model = model_of(vec![shard(true), shard(false), shard(true)]);
    let rows = model.rows().shards;
    assert_eq!((rows.len(), rows[0].up, rows[0].of, rows[0].leases), (1, 2, 3, 9));
    assert_eq!((model.totals().shards_up, model.totals().shards), (0, 1));
}

#[test]
fn rows_are_sorted_by_any_column_and_the_other_way_round() {
    let mut model = model_of(vec![with_hot(vec![
        hot("b", 10, 1, None, 300),
        hot("a", 20, 9, Some(("x", 50)), 1),
        hot("c", 15, 5, None, 20),
    ])]);
    // After a single sample there are no rates, so the counts decide.
    assert_eq!(keys(&model), ["a", "c", "b"]);
    model.set_columns(vec![ColumnId::Name, ColumnId::Waiters, ColumnId::P99]);
    model.apply(Action::NextColumn);
    assert_eq!(
        (model.order(View::Hot).by, keys(&model)),
        (ColumnId::Name, ["a", "b", "c"].map(String::from).to_vec())
    );
    model.apply(Action::Reverse);
    assert_eq!(keys(&model), ["c", "b", "a"]);
    model.apply(Action::NextColumn);
    assert_eq!(keys(&model), ["a", "c", "b"]);
    model.apply(Action::NextColumn);
    assert_eq!(keys(&model), ["b", "c", "a"]);
    // Each view has its own order.
    assert_eq!(model.order(View::Held).by, ColumnId::Age);
}

#[test]
fn a_filter_finds_keys_and_holders_in_any_case() {
    let mut model = model_of(vec![with_hot(vec![
        hot("Coupon:1", 3, 0, Some(("vm-7", 1)), 1),
        hot("job:1", 2, 0, None, 1),
    ])]);
    let write = |model: &mut Model, text: &str| {
        model.apply(Action::Filter(Edit::Begin));
        for char in text.chars() {
            model.apply(Action::Filter(Edit::Add(char)));
        }
        model.apply(Action::Filter(Edit::Keep));
    };
    write(&mut model, "COUP");
    assert_eq!(keys(&model), ["Coupon:1"]);
    assert!(!model.editing_filter);
    model.apply(Action::Filter(Edit::Remove));
    write(&mut model, "x");
    assert!(keys(&model).is_empty());
    model.apply(Action::Escape);
    write(&mut model, "vm-7");
    assert_eq!(keys(&model), ["Coupon:1"]);
    model.apply(Action::Escape);
    assert_eq!(keys(&model).len(), 2);
}

#[test]
fn a_filter_has_an_end() {
    let mut model = model_of(vec![]);
    model.apply(Action::Filter(Edit::Begin));
    for _ in 0..FILTER_CHARS_MAX + 10 {
        model.apply(Action::Filter(Edit::Add('é')));
    }
    assert_eq!(model.filter().chars().count(), FILTER_CHARS_MAX);
}

#[test]
fn a_paused_view_takes_nothing_and_asks_for_nothing() {
    let mut model = model_of(vec![with_hot(vec![hot("k", 1, 0, None, 1)])]);
    model.apply(Action::Pause);
    assert!(model.control().paused);
    let sample = Ok(with_hot(vec![]));
    model.apply_sample(PolledSample {
        source: 0,
        sample,
        at: Instant::now(),
    });
    assert_eq!(keys(&model), ["k"]);
    model.apply(Action::Pause);
    assert!(!model.control().paused);
}

#[test]
fn scrolling_stays_within_the_rows() {
    let mut model = model_of(vec![]);
    assert_eq!(model.first_row(100, 10), 0);
    model.apply(Action::Move(Motion::PageDown));
    assert_eq!(model.first_row(100, 10), 9);
    model.apply(Action::Move(Motion::Last));
    assert_eq!(model.first_row(100, 10), 90);
    model.apply(Action::Move(Motion::Up));
    assert_eq!(model.first_row(100, 10), 89);
    // Fewer rows than before.
    assert_eq!(model.first_row(5, 10), 0);
}
