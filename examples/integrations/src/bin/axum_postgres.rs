//! Deposits over HTTP, one at a time for each account, on any number of hosts. PostgreSQL rejects
//! the write of a host that has lost its lock without knowing it.
//!
//! ```sh
//! export SHARDLOCK_SHARDS=redis://127.0.0.1 DATABASE_URL=postgres://localhost/bank
//! cargo run --package shardlock-examples --bin axum_postgres
//! curl -X POST http://127.0.0.1:3000/accounts/7/deposit/10
//! ```

use std::env;
use std::time::Duration;

use axum::error_handling::HandleErrorLayer;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Extension, Router};
use shardlock::config::Config;
use shardlock::tower::{BoxError, Hold, LockLayer, LockLayerError};
use shardlock::{FencingToken, LockManager};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tower::ServiceBuilder;

/// `fence` is the token of the latest holder of the account's lock.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS accounts
    (id bigint PRIMARY KEY, balance bigint NOT NULL DEFAULT 0, fence bigint NOT NULL DEFAULT 0)";

/// Keeps holders with older tokens out, from here on. Touches no row if a later one was here.
const CLAIM: &str = "INSERT INTO accounts (id, fence) VALUES ($1, $2)
    ON CONFLICT (id) DO UPDATE SET fence = excluded.fence WHERE accounts.fence <= excluded.fence
    RETURNING balance";

/// Touches no row if a later holder has claimed the account.
const WRITE: &str = "UPDATE accounts SET balance = $3 WHERE id = $1 AND fence = $2";

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Settings such as SHARDLOCK_SHARDS and SHARDLOCK_TTL.
    let locks = LockManager::builder().config(Config::from_env()?).connect().await?;
    let database = PgPool::connect(&env::var("DATABASE_URL")?).await?;
    sqlx::query(TABLE).execute(&database).await?;
    let bank = Bank {
        database,
        // How long the work takes that needs the lock: another service, a computation.
        work: Duration::from_millis(env::var("WORK_MS").map_or(Ok(0), |millis| millis.parse())?),
    };

    let address = env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    axum::serve(listener, router(locks.clone(), bank))
        .with_graceful_shutdown(async { drop(tokio::signal::ctrl_c().await) })
        .await?;
    // Waits until the last locks are released.
    locks.shutdown().await?;
    Ok(())
}

fn router(locks: LockManager, bank: Bank) -> Router {
    // A request for /accounts/7/deposit/10 needs the lock account:7.
    let lock_of = move |request: &Request| {
        let account = request.uri().path().split('/').nth(2)?;
        Some(locks.lock(format!("account:{account}")).timeout(Duration::from_secs(5)))
    };
    let layer = LockLayer::new(lock_of).attach(|request: &mut Request, hold: &Hold| {
        request.extensions_mut().insert(hold.token());
    });
    Router::new()
        .route("/accounts/{id}/deposit/{amount}", post(deposit))
        // On the matched routes only, so that other paths are not locked.
        .route_layer(ServiceBuilder::new().layer(HandleErrorLayer::new(refuse)).layer(layer))
        .with_state(bank)
}

#[derive(Clone)]
struct Bank {
    database: PgPool,
    work: Duration,
}

/// Runs under the lock of the account, and is dropped if the lock is lost.
async fn deposit(
    State(bank): State<Bank>,
    Path((id, amount)): Path<(i64, i64)>,
    Extension(token): Extension<FencingToken>,
) -> Result<String, (StatusCode, String)> {
    let claim = sqlx::query_scalar(CLAIM).bind(id).bind(token);
    let claimed: Option<i64> = claim.fetch_optional(&bank.database).await.map_err(unavailable)?;
    let balance = claimed.ok_or_else(superseded)? + amount;

    tokio::time::sleep(bank.work).await;

    let write = sqlx::query(WRITE).bind(id).bind(token).bind(balance);
    let written = write.execute(&bank.database).await.map_err(unavailable)?;
    match written.rows_affected() {
        1 => Ok(format!("{balance}\n")),
        _ => Err(superseded()),
    }
}

/// What a client sees if the request was not served under its lock.
async fn refuse(error: BoxError) -> (StatusCode, String) {
    let status = match error.downcast_ref::<LockLayerError>() {
        // Somebody else had the lock for as long as the request could wait.
        Some(error) if error.is_busy() => StatusCode::CONFLICT,
        // The lock was lost, or its server can't be reached.
        Some(_) => StatusCode::SERVICE_UNAVAILABLE,
        None => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, format!("{error}\n"))
}

fn superseded() -> (StatusCode, String) {
    let message = "a later holder of the lock is at work; nothing was written\n";
    (StatusCode::CONFLICT, message.to_owned())
}

fn unavailable(error: sqlx::Error) -> (StatusCode, String) {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n"))
}
