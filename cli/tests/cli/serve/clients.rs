//! Who uses the agent: the page `/clients`, the metrics, and `shardlock top`.

use serde_json::{Value, json};
use support::{PATIENCE, RedisServer, RespClient, wait_until, worker};

use super::Agent;
use crate::exec::metrics::get;
use crate::tool::{bare, run};

/// An agent with an admin endpoint, and the address of the endpoint.
fn agent_with_admin(server: &RedisServer, options: &[&str]) -> (Agent, String) {
    let agent = Agent::with(server, &[&["--metrics", "127.0.0.1:0"], options].concat());
    let printed = agent.run.stderr();
    let address = printed.split("http://").nth(1).and_then(|rest| rest.split('/').next());
    let address = address.unwrap_or_else(|| panic!("no address in the output: {printed}"));
    (agent, address.to_owned())
}

/// The page once it is as wanted. The agent may still be handling what a client has sent.
#[track_caller]
fn clients_when(address: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut page = Value::Null;
    wait_until(what, PATIENCE, || {
        let answer = get(address, "/clients");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a page");
        page = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
        wanted(&page)
    });
    page
}

/// The value of a series on the page of metrics.
fn metric(address: &str, series: &str) -> f64 {
    let page = get(address, "/metrics");
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    let value = line.unwrap_or_else(|| panic!("no {series} in {page}"));
    value.parse().expect("a number")
}

#[track_caller]
fn until_metric(address: &str, series: &str, expected: f64) {
    wait_until(&format!("{series} is {expected}"), PATIENCE, || {
        metric(address, series) == expected
    });
}

#[test]
fn page_lists_processes_with_their_locks_and_waits() {
    let server = RedisServer::start();
    let (agent, address) = agent_with_admin(&server, &["--max-connections", "50", "--listen", "127.0.0.1:0"]);
    let socket = agent.socket.to_str().expect("UTF-8");
    let spawn = || worker::spawn("agent client", &[("SHARDLOCK_TEST_SOCKET", socket)]);
    let (mut holder, mut waiter) = (spawn(), spawn());
    holder.send("CLIENT SETNAME reports");
    holder.line();
    holder.send("LOCK k PERMITS 2 OF 3");
    let token: u64 = holder.line().parse().expect("a token");
    waiter.send("LOCK k");
    let mut remote = RespClient::tcp(&agent.address()).expect("connect over TCP");
    remote.integer(&["LOCK", "other"]);

    let page = clients_when(&address, "both locks and the wait are shown", |page| {
        page["locks"] == 2 && page["waiting"] == 1
    });
    assert_eq!(
        (&page["total"], &page["connections"], &page["connections_max"]),
        (&json!(3), &json!(3), &json!(50))
    );
    let client = |pid: u32| {
        let clients = page["clients"].as_array().expect("a list").iter();
        clients
            .clone()
            .find(|client| client["pid"] == pid)
            .unwrap_or_else(|| panic!("no {pid} in {page}"))
    };
    let (holding, waiting) = (client(holder.pid()), client(waiter.pid()));
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(
        (&holding["uid"], &holding["name"]),
        (&json!(uid), &json!("reports")),
        "{page}"
    );
    let lock = &holding["held"][0];
    assert_eq!(
        (&lock["key"], &lock["mode"], &lock["token"]),
        (
            &json!("k"),
            &json!({"permits": {"weight": 2, "limit": 3}}),
            &json!(token)
        ),
        "{page}"
    );
    assert!(
        lock["age_ms"].as_f64() >= Some(0.0) && lock["remaining_ms"].as_f64() > Some(0.0),
        "{page}"
    );
    assert_eq!(
        (&holding["locks"], &holding["waiting"]),
        (&json!(1), &json!(0)),
        "{page}"
    );
    let wait = &waiting["waits"][0];
    assert_eq!(
        (&wait["key"], &wait["mode"]),
        (&json!("k"), &json!("exclusive")),
        "{page}"
    );
    assert_eq!(waiting["held"], json!([]), "{page}");
    // The oldest first. Over TCP, there is an address and no process.
    assert_eq!(page["clients"][0]["pid"], holder.pid(), "{page}");
    let by_tcp = page["clients"]
        .as_array()
        .expect("a list")
        .iter()
        .find(|client| client["pid"].is_null());
    let by_tcp = by_tcp.unwrap_or_else(|| panic!("no client over TCP in {page}"));
    assert!(
        by_tcp["address"]
            .as_str()
            .is_some_and(|address| address.starts_with("127.0.0.1:")),
        "{page}"
    );
    assert_eq!(by_tcp["held"][0]["key"], "other", "{page}");

    // What a process had is gone with it.
    holder.kill();
    let page = clients_when(
        &address,
        "the killed process is gone, and the next one holds the key",
        |page| page["total"] == 2 && page["locks"] == 2 && page["waiting"] == 0,
    );
    let clients = page["clients"].as_array().expect("a list").iter();
    let waiter = clients.clone().find(|client| client["pid"] == waiter.pid());
    assert_eq!(waiter.expect("the next one")["held"][0]["key"], "k", "{page}");
}

#[test]
fn several_connections_of_a_process_are_one_client() {
    let server = RedisServer::start();
    let (agent, address) = agent_with_admin(&server, &[]);
    let mut connections: Vec<RespClient> = (0..4).map(|_| agent.connect()).collect();
    for (number, connection) in connections.iter_mut().enumerate() {
        connection.integer(&["LOCK", &format!("k{number}")]);
    }
    let page = clients_when(&address, "all locks are shown", |page| page["locks"] == 4);
    let mine = page["clients"].as_array().expect("a list").iter();
    let mine: Vec<&Value> = mine.filter(|client| client["pid"] == std::process::id()).collect();
    let [mine] = *mine else { panic!("{page}") };
    let connected = mine["connections"].as_u64().expect("a number");
    assert!((4..=5).contains(&connected), "{page}");
    let keys: Vec<&str> = mine["held"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|lock| lock["key"].as_str().unwrap())
        .collect();
    assert_eq!(keys, ["k0", "k1", "k2", "k3"], "oldest first");
}

/// However much there is, the page is bounded, and the totals are right.
#[test]
fn page_is_bounded_and_lists_the_oldest_locks() {
    let server = RedisServer::start();
    let (agent, address) = agent_with_admin(&server, &["--max-locks", "2000"]);
    let mut client = agent.connect();
    let mut batch = Vec::new();
    for number in 0..1_200 {
        batch.extend(support::resp::encoded(&["LOCK", &format!("k{number:04}"), "NOWAIT"]));
    }
    client.send_bytes(&batch).unwrap();
    for _ in 0..1_200 {
        assert!(matches!(client.reply(), redis::Value::Int(_)));
    }
    let page = clients_when(&address, "all locks are counted", |page| page["locks"] == 1_200);
    let held = page["clients"][0]["held"].as_array().expect("a list");
    assert_eq!((held.len(), &page["clients"][0]["locks"]), (1_000, &json!(1_200)));
    let keys: Vec<&str> = held.iter().map(|lock| lock["key"].as_str().unwrap()).collect();
    assert!(
        keys.is_sorted() && keys[0] == "k0000" && keys[999] == "k0999",
        "{keys:?}"
    );
}

#[test]
fn metrics_count_connections_requests_and_disconnect_releases() {
    let server = RedisServer::start();
    let (agent, address) = agent_with_admin(&server, &["--max-connections", "2", "--max-request-bytes", "1024"]);
    let connections = "shardlock_agent_connections";
    until_metric(&address, connections, 0.0);
    assert_eq!(metric(&address, "shardlock_agent_connections_limit"), 2.0);
    // Everything that has not happened is 0.
    for series in [
        "shardlock_agent_connections_refused_total",
        "shardlock_agent_requests_total{command=\"lock\"}",
        "shardlock_agent_requests_total{command=\"unknown\"}",
        "shardlock_agent_protocol_errors_total{kind=\"malformed\"}",
        "shardlock_agent_protocol_errors_total{kind=\"too_long\"}",
        "shardlock_agent_locks",
        "shardlock_agent_waiters",
        "shardlock_agent_disconnect_releases_total",
    ] {
        assert_eq!(metric(&address, series), 0.0, "{series}");
    }

    let (mut one, mut other) = (agent.connect(), agent.connect());
    let token = one.integer(&["LOCK", "a"]).to_string();
    one.integer(&["lock", "b"]);
    one.error(&["GET", "a"]);
    other.send(&["LOCK", "a"]);
    until_metric(&address, connections, 2.0);
    until_metric(&address, "shardlock_agent_waiters", 1.0);
    assert_eq!(metric(&address, "shardlock_agent_locks"), 2.0);
    assert!(agent.connect().rest().starts_with("-LIMIT"));
    assert_eq!(metric(&address, "shardlock_agent_connections_refused_total"), 1.0);

    assert_eq!(one.integer(&["UNLOCK", "a", &token]), 1);
    assert!(matches!(other.reply(), redis::Value::Int(_)));
    until_metric(&address, "shardlock_agent_waiters", 0.0);
    assert_eq!(
        metric(&address, "shardlock_agent_requests_total{command=\"lock\"}"),
        3.0
    );
    assert_eq!(
        metric(&address, "shardlock_agent_requests_total{command=\"unlock\"}"),
        1.0
    );
    assert_eq!(
        metric(&address, "shardlock_agent_requests_total{command=\"unknown\"}"),
        1.0
    );

    // One lock each: that of `a` was passed on.
    drop((one, other));
    until_metric(&address, connections, 0.0);
    assert_eq!(metric(&address, "shardlock_agent_disconnect_releases_total"), 2.0);
    assert_eq!(metric(&address, "shardlock_agent_locks"), 0.0);
    for (bytes, kind) in [(&b"*x\r\n"[..], "malformed"), (b"*1\r\n$1025\r\n", "too_long")] {
        let mut client = agent.connect();
        client.send_bytes(bytes).unwrap();
        client.rest();
        until_metric(&address, connections, 0.0);
        let series = format!("shardlock_agent_protocol_errors_total{{kind=\"{kind}\"}}");
        assert_eq!(metric(&address, &series), 1.0, "{series}");
    }
}

#[test]
fn top_shows_the_clients_of_an_agent() {
    let server = RedisServer::start();
    let (agent, address) = agent_with_admin(&server, &[]);
    let (mut holder, mut waiter) = (agent.connect(), agent.connect());
    holder.text(&["CLIENT", "SETNAME", "reports"]);
    holder.integer(&["LOCK", "nightly"]);
    waiter.send(&["LOCK", "nightly"]);
    agent.wait_until_waiting(1);

    let top = |args: &[&str]| {
        let ended = run(bare(
            &[&["top", "--once", "--interval", "100ms"], args, &[&address]].concat(),
        ));
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
        ended.stdout
    };
    let printed = top(&[]);
    let tables: Vec<&str> = printed.split("\n\n").collect();
    let clients = tables.last().expect("a table");
    assert_eq!(tables.len(), 5, "{printed}");
    let pid = std::process::id().to_string();
    let row = clients
        .lines()
        .find(|line| line.starts_with(&pid))
        .unwrap_or_else(|| panic!("{printed}"));
    assert!(clients.starts_with("CLIENT ") && row.contains(" reports "), "{printed}");
    assert!(row.ends_with("nightly; waits for nightly"), "{printed}");

    let document: Value = serde_json::from_str(&top(&["--json"])).expect("JSON");
    let mine = document["clients"].as_array().expect("clients").iter();
    let mine = mine
        .clone()
        .find(|client| client["pid"] == std::process::id())
        .expect("this process");
    assert_eq!(
        (&mine["held"][0]["key"], &mine["agent"]),
        (&json!("nightly"), &json!(address)),
        "{document}"
    );
    let only: Value = serde_json::from_str(&top(&["--json", "--view", "clients"])).expect("JSON");
    assert!(only["hot"].is_null() && only["clients"].is_array(), "{only}");
}

#[test]
fn live_view_has_a_tab_for_the_clients() {
    let server = RedisServer::start();
    let (agent, address) = agent_with_admin(&server, &[]);
    let mut holder = agent.connect();
    holder.integer(&["LOCK", "nightly"]);
    let terminal = crate::top::top(&[&address]);
    terminal.shows("4 clients 1");
    terminal.types("4");
    let pid = std::process::id().to_string();
    terminal.until("the client is shown with its lock", |lines| {
        lines.iter().any(|line| line.contains(&pid) && line.contains("nightly"))
    });
    drop(holder);
    terminal.shows("no agent with clients");
}
