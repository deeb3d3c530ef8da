//! The statements and the code of docs/fencing-sql.md, on a real PostgreSQL.

use std::error::Error;
use std::time::Duration;

use shardlock::{FencingToken, LockManager};
use support::postgres::Postgres;
use support_locks::connect;
use tokio_postgres::{Client, NoTls};

type BoxError = Box<dyn Error + Send + Sync>;

const GUIDE: &str = include_str!("../../docs/fencing-sql.md");
const THIS_FILE: &str = include_str!("fencing_sql.rs");

const CLAIM: &str = "UPDATE accounts SET fence = $2 WHERE id = $1 AND fence <= $2 RETURNING balance;";
const WRITE: &str = "UPDATE accounts SET balance = $3 WHERE id = $1 AND fence = $2;";

/// The code blocks of the guide in this language.
fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let after = GUIDE.split(&fence[..]).skip(1);
    after.map(|text| text.split("```").next().unwrap()).collect()
}

/// The only block of SQL that contains this.
fn statement(part: &str) -> &'static str {
    let found: Vec<_> = blocks("sql").into_iter().filter(|sql| sql.contains(part)).collect();
    assert_eq!(found.len(), 1, "{part}: {found:?}");
    found[0].trim_end()
}

/// Adds to a balance under the lock of the account.
async fn deposit(locks: &LockManager, db: &Client, id: i64, amount: i64) -> Result<(), BoxError> {
    let guard = locks
        .lock(format!("account:{id}"))
        .timeout(Duration::from_secs(5))
        .await?;
    let token = i64::try_from(guard.token())?;
    let claimed = db.query_opt(CLAIM, &[&id, &token]).await?;
    let balance: i64 = claimed.ok_or("a later holder is at work")?.get(0);

    // Whatever takes long: another service, a computation.
    let balance = balance + amount;

    if db.execute(WRITE, &[&id, &token, &balance]).await? != 1 {
        return Err("a later holder is at work; nothing was written".into());
    }
    guard.release().await?;
    Ok(())
}

/// A database with the table of the guide and one account.
async fn database() -> (Postgres, Client) {
    let postgres = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
    let client = client(&postgres).await;
    client.batch_execute(statement("CREATE TABLE")).await.unwrap();
    client
        .execute("INSERT INTO accounts (id, balance) VALUES (7, 100)", &[])
        .await
        .unwrap();
    (postgres, client)
}

async fn client(postgres: &Postgres) -> Client {
    let (client, connection) = tokio_postgres::connect(&postgres.settings(), NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn balance(database: &Client) -> i64 {
    let row = database
        .query_one("SELECT balance FROM accounts WHERE id = 7", &[])
        .await;
    row.unwrap().get(0)
}

/// Two tokens of one key: that of a holder who lost the lock, and that of the next one.
async fn tokens(locks: &LockManager) -> (i64, i64) {
    let mut tokens = Vec::new();
    for _ in 0..2 {
        let guard = locks.lock("account:7").await.unwrap();
        tokens.push(guard.token());
        guard.release().await.unwrap();
    }
    let number = |token: FencingToken| i64::try_from(token).unwrap();
    (number(tokens[0]), number(tokens[1]))
}

#[test]
fn guide_shows_the_code_that_runs_here() {
    assert_eq!(
        (statement("RETURNING balance"), statement("SET balance = $3")),
        (CLAIM, WRITE)
    );
    let shown = blocks("rust");
    assert_eq!(shown.len(), 1);
    assert!(
        THIS_FILE.contains(shown[0]),
        "the guide shows other code:\n{}",
        shown[0]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_statements_keep_the_writes_of_an_old_holder_out() {
    let (postgres, database) = database().await;
    let locks = connect("memory://").await;
    let other = client(&postgres).await;
    let (one, two) = tokio::join!(deposit(&locks, &database, 7, 10), deposit(&locks, &other, 7, 5));
    one.unwrap();
    two.unwrap();
    assert_eq!(balance(&database).await, 115);

    let (old, new) = tokens(&locks).await;
    let claim = async |token: i64| database.query_opt(CLAIM, &[&7_i64, &token]).await.unwrap();
    let write = async |token: i64, balance: i64| database.execute(WRITE, &[&7_i64, &token, &balance]).await.unwrap();
    assert!(claim(old).await.is_some());
    assert!(claim(new).await.is_some());
    // The old holder continues after a pause: it can neither write nor claim again.
    assert_eq!(write(old, 0).await, 0);
    assert!(claim(old).await.is_none());
    assert_eq!(write(new, 120).await, 1);
    // The same holder may write again.
    assert!(claim(new).await.is_some());
    assert_eq!(write(new, 121).await, 1);
    assert_eq!(balance(&database).await, 121);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn insert_or_update_touches_no_row_with_a_larger_token() {
    let (_postgres, database) = database().await;
    let locks = connect("memory://").await;
    let (old, new) = tokens(&locks).await;
    let upsert = statement("ON CONFLICT");
    let upsert = async |id: i64, token: i64, balance: i64| {
        let done = database.execute(upsert, &[&id, &token, &balance]).await;
        done.unwrap()
    };
    // Inserted, updated, refused.
    assert_eq!(upsert(8, old, 1).await, 1);
    assert_eq!(upsert(8, new, 2).await, 1);
    assert_eq!(upsert(8, old, 3).await, 0);
    assert_eq!(upsert(7, new, 4).await, 1);
    assert_eq!(balance(&database).await, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trigger_fences_statements_without_a_token_check() {
    let (_postgres, mut database) = database().await;
    let locks = connect("memory://").await;
    let (old, new) = tokens(&locks).await;
    database.batch_execute(statement("CREATE TRIGGER")).await.unwrap();
    let set_token = statement("set_config");

    let mut write = async |token: Option<i64>, sql: &str| -> Result<u64, String> {
        let transaction = database.transaction().await.unwrap();
        if let Some(token) = token {
            transaction.execute(set_token, &[&token.to_string()]).await.unwrap();
        }
        let done = transaction.execute(sql, &[]).await;
        let done = done.map_err(|error| error.as_db_error().unwrap().message().to_owned())?;
        transaction.commit().await.unwrap();
        Ok(done)
    };
    let update = "UPDATE accounts SET balance = balance + 1 WHERE id = 7";
    // The claim that the guide names.
    assert!(GUIDE.contains("UPDATE accounts SET fence = fence\nWHERE id = $1"));
    assert_eq!(
        write(Some(old), "UPDATE accounts SET fence = fence WHERE id = 7").await,
        Ok(1)
    );
    assert_eq!(write(Some(new), update).await, Ok(1));
    let too_old = format!("fencing token {old} is older than {new}: the lock was lost");
    assert_eq!(write(Some(old), update).await, Err(too_old.clone()));
    assert_eq!(write(Some(old), "DELETE FROM accounts").await, Err(too_old));
    let missing = Err("set app.fence to the fencing token of the lock before writing".to_owned());
    // Also after transactions of the same connection that had one.
    assert_eq!(write(None, update).await, missing);
    assert_eq!(
        write(None, "INSERT INTO accounts (id, balance) VALUES (9, 1)").await,
        missing
    );
    assert_eq!(
        write(Some(new), "INSERT INTO accounts (id, balance) VALUES (9, 1)").await,
        Ok(1)
    );
    assert_eq!(write(Some(new), "DELETE FROM accounts").await, Ok(2));
}
