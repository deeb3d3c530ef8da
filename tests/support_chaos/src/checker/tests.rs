//! Handwritten histories: the checker finds each kind of violation, and each excuse applies only
//! around its fault.

use super::{EXCUSES, Terms, Verdict, check};
use crate::clock::{Nanos, SECOND};
use crate::faults::Fault;
use crate::history::Line;

const TERMS: Terms = Terms {
    ttl: SECOND,
    is_confirmed: false,
};
const CONFIRMED: Terms = Terms {
    is_confirmed: true,
    ..TERMS
};

/// A history with times in milliseconds.
fn history(text: &str) -> Vec<Line> {
    let millis = |nanos: Nanos| nanos * 1_000_000;
    let mut lines: Vec<Line> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(|line| {
            use crate::history::Event;
            let mut line = Line::parse(line).unwrap_or_else(|| panic!("{line:?}"));
            line.at = millis(line.at);
            match &mut line.event {
                Event::Asked { limit, .. } => *limit = millis(*limit),
                Event::Granted { left, .. } | Event::Valid { left } | Event::Ending { left } => *left = millis(*left),
                _ => {}
            }
            line
        })
        .collect();
    lines.sort_by_key(|line| line.at);
    lines
}

fn judge(text: &str) -> Verdict {
    check(&history(text), TERMS)
}

fn found(verdict: &Verdict) -> Vec<&'static str> {
    verdict
        .violations
        .iter()
        .map(|violation| violation.finding.violation)
        .collect()
}

#[track_caller]
fn assert_finds(text: &str, violations: &[&str]) {
    let verdict = judge(text);
    let stories: Vec<_> = verdict
        .violations
        .iter()
        .map(|violation| violation.story.as_str())
        .collect();
    assert_eq!(found(&verdict), violations, "{}", stories.concat());
}

const GOOD: &str = "
    0 w1 1 asked k 1000
    1 w1 1 granted 10 900
    2 w2 1 asked k 1000
    5 w1 1 ending 896
    6 w1 1 ended ok
    7 w2 1 granted 11 900
    8 w2 1 ending 899
    9 w2 1 ended unknown
    9 w3 1 asked k 0
    10 w3 1 failed held
    11 w1 0 down
    11 w2 0 down";

#[test]
fn good_history_has_no_violations() {
    let verdict = judge(GOOD);
    assert_eq!(found(&verdict), [""; 0]);
    assert_eq!(
        (verdict.asked, verdict.granted, verdict.longest_wait),
        (3, 2, 5_000_000)
    );
    assert_eq!(verdict.failed["held"], 1);
}

#[test]
fn lines_are_read_as_they_were_written() {
    for line in history(GOOD) {
        assert_eq!(Line::parse(&line.to_string()), Some(line));
    }
}

#[test]
fn overlap_of_two_guards_is_found() {
    let text = "
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        2 w2 1 asked k 1000
        4 w2 1 granted 11 900
        5 w1 1 ending 896
        6 w1 1 ended ok
        7 w2 1 ending 895
        8 w2 1 ended ok";
    assert_finds(text, &["overlap"]);
}

#[test]
fn overlap_with_a_killed_holder_whose_guard_was_valid_is_found() {
    let text = "
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        2 w2 1 asked k 1000
        800 w2 1 granted 11 900";
    assert_finds(text, &["overlap"]);
}

/// The lock of a client of an agent ends with its connection.
#[test]
fn killed_client_of_an_agent_holds_its_lock_until_the_kill_and_no_longer() {
    let text = "
        0 agent-c1 1 asked k 1000
        1 agent-c1 1 granted 10 900
        2 w2 1 asked k 1000
        100 nemesis 1 fault kill-client agent-c1
        GRANT w2 1 granted 11 900
        150 nemesis 1 over";
    assert_finds(&text.replace("GRANT", "99"), &["overlap"]);
    assert_finds(&text.replace("GRANT", "101"), &[]);
    // Another client that was killed ends nothing.
    let other = text
        .replace("GRANT", "101")
        .replace("kill-client agent-c1", "kill-client agent-c2");
    assert_finds(&other, &["overlap"]);
}

#[test]
fn group_of_processes_is_stopped_together() {
    let text = "
        0 agent-c1 1 asked k 10
        1 nemesis 1 fault stop-agent agent-*
        9000 nemesis 1 over
        9001 agent-c1 1 failed timeout";
    assert_finds(text, &[]);
    assert_finds(&text.replace("agent-c1", "w1"), &["ask-overdue"]);
}

#[test]
fn grant_after_the_validity_of_a_killed_holder_is_no_overlap() {
    let text = "
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        2 w2 1 asked k 1000
        902 w2 1 granted 11 900";
    assert_finds(text, &[]);
}

#[test]
fn successful_release_after_another_grant_is_an_overlap() {
    let text = "
        0 w1 1 asked k 1000
        1 w1 1 granted 10 100
        200 w2 1 asked k 1000
        201 w2 1 granted 11 900
        202 w2 1 ending 899
        203 w2 1 ended ok
        300 w1 1 ending 0
        301 w1 1 ended ok";
    assert_finds(text, &["overlap"]);
}

#[test]
fn guard_that_is_invalid_when_granted_holds_nothing() {
    let text = "
        0 w1 1 asked k 1000
        1 w2 1 asked k 1000
        500 w2 1 granted 11 900
        550 w1 1 granted 10 0
        600 w1 1 ending 0
        601 w1 1 ended lost
        700 w2 1 ending 700
        701 w2 1 ended ok";
    assert_finds(text, &[]);
}

#[test]
fn same_token_twice_is_found() {
    assert_finds(&GOOD.replace("granted 11", "granted 10"), &["same-token"]);
}

#[test]
fn smaller_token_of_a_later_holder_is_found() {
    assert_finds(&GOOD.replace("granted 11", "granted 9"), &["token-order"]);
}

#[test]
fn smaller_token_of_a_later_request_is_found_also_without_validity() {
    let text = "
        0 w1 1 asked k 1000
        1 w1 1 granted 10 0
        2 w1 1 ending 0
        3 w1 1 ended lost
        4 w2 1 asked k 1000
        5 w2 1 granted 9 0
        6 w2 1 ending 0
        7 w2 1 ended lost";
    assert_finds(text, &["token-order"]);
}

#[test]
fn refused_token_is_found() {
    assert_finds(
        &GOOD.replace("failed held", "failed token-regression"),
        &["token-order"],
    );
}

#[test]
fn loss_that_is_reported_late_is_found() {
    let text = "
        0 nemesis 1 fault hung-server -
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        2500 w1 1 loss expired
        2501 w1 1 ending 0
        2502 w1 1 ended lost
        3000 nemesis 1 over";
    assert_finds(text, &["late-loss"]);
    // The process was stopped; it was notified as soon as possible.
    assert_finds(&text.replace("hung-server -", "stop-worker w1"), &[]);
}

#[test]
fn loss_that_was_never_reported_is_found() {
    let text = "
        0 nemesis 1 fault hung-server -
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        2500 w1 1 valid 0
        2501 w1 1 ending 0
        2502 w1 1 ended lost";
    assert_finds(text, &["late-loss"]);
}

#[test]
fn lease_that_vanishes_without_a_cause_is_found() {
    let text = "
        0 nemesis 1 fault hung-server -
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        300 w1 1 loss taken
        301 w1 1 ending 0
        302 w1 1 ended lost";
    assert_finds(text, &["vanished"]);
    assert_finds(&text.replace("hung-server", "delete-lease"), &[]);
}

#[test]
fn loss_without_a_fault_is_worth_a_look() {
    let text = "
        0 nemesis 1 fault hung-server -
        500 nemesis 1 over
        7000 w1 1 asked k 1000
        7001 w1 1 granted 10 900
        7901 w1 1 loss expired
        7902 w1 1 ending 0
        7903 w1 1 ended lost";
    let verdict = judge(text);
    assert_eq!(found(&verdict), [""; 0]);
    assert_eq!(verdict.worth_a_look.len(), 1);
    assert_eq!(
        judge(&text.replace("500 nemesis", "5000 nemesis")).worth_a_look.len(),
        0
    );
}

#[test]
fn request_that_outlasts_its_limit_is_found() {
    let text = "
        0 nemesis 1 fault hung-server -
        0 w1 1 asked k 1000
        5500 w1 1 failed timeout
        6000 nemesis 1 over";
    assert_finds(text, &["ask-overdue"]);
    assert_finds(&text.replace("hung-server -", "stop-worker w1"), &[]);
    assert_finds(&text.replace("hung-server -", "machine-stall everybody"), &[]);
}

#[test]
fn request_without_an_end_is_found() {
    let text = "
        0 w1 1 asked k 1000
        8000 w1 0 down";
    assert_finds(text, &["ask-overdue"]);
    // A process that was killed in time is not responsible for its request.
    assert_finds("0 w1 1 asked k 1000\n 8000 w2 0 down", &[]);
}

#[test]
fn release_without_an_end_is_found() {
    let text = "
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        2 w1 1 ending 899
        8000 w1 0 down";
    assert_finds(text, &["release-overdue"]);
}

#[test]
fn key_that_is_not_granted_to_its_waiter_is_found() {
    let text = "
        0 w1 1 asked k 1000
        1 w1 1 granted 10 900
        2 w1 1 ending 899
        3 w1 1 ended ok
        4 w2 1 asked k 9000
        7000 w2 1 granted 11 900
        7001 w2 1 ending 899
        7002 w2 1 ended ok";
    assert_finds(text, &["key-stuck"]);
    // A fault was the cause.
    let fault = "
        3000 nemesis 1 fault hung-server -
        4000 nemesis 1 over";
    assert_finds(&format!("{text}{fault}"), &[]);
}

#[test]
fn request_that_starves_while_others_are_served_is_found() {
    let mut text = "0 w1 1 asked k 8000\n 8000 w1 1 failed timeout".to_owned();
    for number in 1..600_u64 {
        let at = number * 10;
        text += &format!(
            "\n {at} w2 {number} asked k 1000\n {at} w2 {number} granted {number} 900\n {at} w2 {number} ending 900\n {at} w2 {number} ended ok"
        );
    }
    assert_finds(&text, &["starved"]);
}

#[test]
fn leftover_key_is_found() {
    assert_finds(
        &format!("{GOOD}\n 99 nemesis 0 left lock:k is on a server"),
        &["left-behind"],
    );
}

const FORGOTTEN: &str = "
    0 w1 1 asked k 1000
    1 w1 1 granted 10 900
    100 nemesis 1 fault FAULT -
    200 nemesis 1 over
    300 w2 1 asked k 1000
    301 w2 1 granted 11 900
    302 w2 1 ending 900
    303 w2 1 ended ok
    400 w1 1 loss expired
    401 w1 1 ending 0
    402 w1 1 ended lost";

#[test]
fn overlap_is_excused_only_around_a_fault_that_explains_it() {
    for fault in ["crash-server", "switch-over", "delete-lease", "clock-jump"] {
        let verdict = judge(&FORGOTTEN.replace("FAULT", fault));
        assert_eq!(found(&verdict), [""; 0], "{fault}");
        assert_eq!(verdict.count_excused("overlap"), 1, "{fault}");
        // After the end of the fault.
        let later = FORGOTTEN
            .replace("100 nemesis", "9100 nemesis")
            .replace("200 nemesis", "9200 nemesis");
        assert!(
            found(&judge(&later.replace("FAULT", fault))).contains(&"overlap"),
            "{fault}"
        );
    }
    for fault in ["hung-server", "partition-both", "kill-worker", "script-flush"] {
        assert_finds(&FORGOTTEN.replace("FAULT", fault), &["overlap"]);
    }
}

#[test]
fn failover_excuses_nothing_if_every_replica_has_every_lease() {
    let history = history(&FORGOTTEN.replace("FAULT", "switch-over"));
    assert_eq!(found(&check(&history, CONFIRMED)), ["overlap"]);
}

#[test]
fn failover_excuses_no_decreasing_token() {
    let text = FORGOTTEN
        .replace("granted 11", "granted 9")
        .replace("FAULT", "failover");
    assert_finds(&text, &["token-order"]);
}

#[test]
fn story_has_the_lines_and_the_faults_around_a_violation() {
    let verdict = judge(&FORGOTTEN.replace("FAULT", "hung-server"));
    let story = &verdict.violations[0].story;
    for part in [
        "overlap of key k",
        "fault hung-server",
        "w1 1 granted 10",
        "w2 1 granted 11",
        "w1 1 loss expired",
    ] {
        assert!(story.contains(part), "{part:?} is not in:\n{story}");
    }
}

#[test]
fn excuses_name_faults_that_exist() {
    for excuse in EXCUSES {
        for name in excuse.faults {
            assert!(
                Fault::ALL.iter().any(|fault| fault.name() == *name),
                "{}: {name}",
                excuse.name
            );
        }
    }
}
