//! Two hosts that write to the accounts of one database.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use support::RedisServer;
use support::postgres::Postgres;

use crate::{PATIENCE, Program};

/// The servers, and how to start hosts that use them.
struct Bank {
    redis: RedisServer,
    postgres: Postgres,
}

impl Bank {
    fn start() -> Self {
        Self {
            redis: RedisServer::start(),
            postgres: Postgres::start(),
        }
    }

    /// A host whose requests take this long, with leases of this TTL, and its address.
    #[track_caller]
    fn host(&self, work_ms: &str, ttl: &str) -> (Program, String) {
        let (redis, database) = (self.redis.url(), self.postgres.url());
        let vars = [
            ("SHARDLOCK_SHARDS", redis.as_str()),
            ("SHARDLOCK_TTL", ttl),
            ("DATABASE_URL", &database),
            ("LISTEN", "127.0.0.1:0"),
            ("WORK_MS", work_ms),
        ];
        let program = Program::start(env!("CARGO_BIN_EXE_axum_postgres"), &vars, &[]);
        let address = program.line("listening on ").replace("listening on ", "");
        (program, address)
    }

    async fn database(&self) -> PgConnection {
        PgConnection::connect(&self.postgres.url()).await.expect("connect")
    }
}

/// Sends a request, and returns the status and the body of the response.
#[track_caller]
fn post(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
    let request = format!("POST {path} HTTP/1.1\r\nHost: bank\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("send");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("receive");
    let status = response.split(' ').nth(1).expect("a status").parse().expect("a number");
    (status, response.split_once("\r\n\r\n").expect("a body").1.to_owned())
}

/// Waits until a request has claimed the account.
async fn claimed(database: &mut PgConnection, id: i64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let query = sqlx::query_scalar("SELECT fence FROM accounts WHERE id = $1");
        let fence: Option<i64> = query.bind(id).fetch_optional(&mut *database).await.expect("query");
        if fence.is_some() {
            return;
        }
        assert!(Instant::now() < deadline, "account {id} was not claimed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn balance(database: &mut PgConnection, id: i64) -> i64 {
    let query = sqlx::query_scalar("SELECT balance FROM accounts WHERE id = $1");
    query.bind(id).fetch_one(database).await.expect("query")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deposits_of_two_hosts_are_all_counted() {
    let bank = Bank::start();
    let hosts = [bank.host("5", "10s"), bank.host("5", "10s")];
    // No request waits for more than five seconds, on a busy machine either.
    let deposits = 12_u8;
    thread::scope(|scope| {
        for (_, address) in hosts.iter().cycle().take(deposits.into()) {
            scope.spawn(move || assert_eq!(post(address, "/accounts/7/deposit/1").0, 200));
        }
    });
    assert_eq!(balance(&mut bank.database().await, 7).await, i64::from(deposits));
    assert_eq!(post(&hosts[0].1, "/nothing").0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_that_was_paused_writes_nothing() {
    let bank = Bank::start();
    // Longer than the test: the request ends because the lock is lost.
    let (paused, address) = bank.host("60000", "2s");
    let (_other, other_address) = bank.host("0", "2s");
    let mut database = bank.database().await;
    let client = thread::spawn(move || post(&address, "/accounts/7/deposit/1"));
    claimed(&mut database, 7).await;
    paused.process.stop();
    // Once the lease of the paused host has expired.
    assert_eq!(post(&other_address, "/accounts/7/deposit/10"), (200, "10\n".to_owned()));
    paused.process.cont();
    let (status, body) = client.join().expect("a response");
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("account:7"), "{body}");
    assert_eq!(balance(&mut database, 7).await, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_with_an_old_token_is_rejected() {
    let bank = Bank::start();
    let (_host, address) = bank.host("3000", "10s");
    let mut database = bank.database().await;
    let client = thread::spawn(move || post(&address, "/accounts/7/deposit/1"));
    claimed(&mut database, 7).await;
    // As a later holder does, while the first one believes that it has the lock.
    let claim = sqlx::query("UPDATE accounts SET fence = fence + 1, balance = 50 WHERE id = 7");
    assert_eq!(claim.execute(&mut database).await.expect("query").rows_affected(), 1);
    let (status, body) = client.join().expect("a response");
    assert_eq!(status, 409, "{body}");
    assert!(body.contains("nothing was written"), "{body}");
    assert_eq!(balance(&mut database, 7).await, 50);
}
