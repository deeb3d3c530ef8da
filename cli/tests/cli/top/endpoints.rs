//! How the view handles an endpoint that goes away, comes back, does not answer, or sends nonsense.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use support::RedisServer;
use support::server::free_port;

use super::load::{HOT, Load, STUCK};
use super::{has, row, top};

#[test]
fn rows_of_an_unavailable_endpoint_stay_until_it_returns() {
    let server = RedisServer::start();
    let mut load = Load::start(&server, true);
    let terminal = top(&[&load.address]);
    terminal.shows("locks/s");
    terminal.until("everything is shown", |lines| {
        row(lines, STUCK).is_some() && row(lines, HOT).is_some()
    });
    load.worker.kill();
    let away = format!("{} unavailable for ", load.address);
    let lines = terminal.until("the process is away", |lines| {
        has(lines, &away) && has(lines, ": connection refused")
    });
    assert!(has(&lines, ", stale for "), "{lines:#?}");
    assert!(row(&lines, STUCK).is_some() && row(&lines, HOT).is_some(), "{lines:#?}");
    // The keyboard still works.
    terminal.types("3");
    terminal.shows("RT P99");
    terminal.types("1");
    let again = Load::start_at(&server, false, &load.address);
    let lines = terminal.until("the process is back", |lines| {
        has(lines, &again.process()) && !has(lines, "unavailable")
    });
    assert!(has(&lines, " locks/s   "), "{lines:#?}");
    terminal.until("its keys are shown", |lines| row(lines, HOT).is_some());
}

#[test]
fn endpoint_may_become_available_after_the_start() {
    let server = RedisServer::start();
    let address = format!("127.0.0.1:{}", free_port());
    let terminal = top(&["--admin", &address]);
    let lines = terminal.shows(" unavailable for ");
    assert!(has(&lines, "no data yet") && !has(&lines, "stale"), "{lines:#?}");
    let _load = Load::start_at(&server, false, &address);
    terminal.shows(" locks/s   ");
}

/// Starts a listener that calls `answer` with each connection, and returns its address.
fn listen(answer: impl Fn(std::net::TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || listener.incoming().flatten().for_each(answer));
    address
}

#[test]
fn silent_endpoint_does_not_block_the_keyboard() {
    let address = listen(|stream| {
        // Keep the connection open until the client closes it.
        thread::spawn(move || {
            let mut stream = stream;
            stream.read_to_end(&mut Vec::new()).ok();
        });
    });
    let mut terminal = top(&[&address]);
    terminal.shows("waiting for data ...");
    terminal.types("?");
    terminal.shows("sort by the next column");
    terminal.types("?");
    terminal.shows(" unavailable for ");
    terminal.shows("no answer within 2s");
    terminal.types("q");
    assert_eq!(terminal.process.wait(support::PATIENCE).code(), Some(0));
}

#[test]
fn invalid_and_endless_responses_are_errors_with_a_reason() {
    let answer = |response: &'static str, forever: bool| {
        listen(move |mut stream| {
            let mut request = [0; 4096];
            let read = stream.read(&mut request);
            let mut written = read.and_then(|_| stream.write_all(response.as_bytes()));
            while forever && written.is_ok() {
                written = stream.write_all(&[b' '; 65536]);
            }
        })
    };
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
    let cases = [
        (
            answer("HTTP/1.1 503 No\r\nContent-Length: 10\r\n\r\nthe \x1b[2Jno", false),
            " returned 503: the ?[2Jno",
        ),
        (
            answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", false),
            "is not what an admin",
        ),
        (answer(head, true), "length limit exceeded"),
        (answer("SSH-2.0-OpenSSH_9.2p1\r\n", false), "invalid HTTP"),
    ];
    for (address, words) in &cases {
        let terminal = top(&[address]);
        terminal.shows(words);
    }
}
