//! Fencing tokens as parameters and columns, with the feature `sqlx`.

use shardlock::FencingToken;
use sqlx::{Connection, PgConnection, Row};
use support::postgres::Postgres;
use support_locks::connect;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_is_a_bigint_in_queries() {
    let postgres = Postgres::start();
    let mut database = PgConnection::connect(&postgres.url()).await.expect("connect");
    let locks = connect("memory://").await;
    let token = locks.lock("k").await.expect("lock").token();

    let query = "SELECT $1 AS same, $1 + 1 AS next, NULL::bigint AS none, 0::bigint AS zero";
    let row = sqlx::query(query)
        .bind(token)
        .fetch_one(&mut database)
        .await
        .expect("query");
    assert_eq!(row.get::<FencingToken, _>("same"), token);
    assert!(row.get::<FencingToken, _>("next") > token);
    assert_eq!(row.get::<Option<FencingToken>, _>("none"), None);
    let error = row.try_get::<FencingToken, _>("zero").expect_err("no token is 0");
    assert!(error.to_string().contains("0 is not a fencing token"), "{error}");

    let query = sqlx::query_scalar("SELECT $1::bigint IS NULL");
    let is_null: bool = query
        .bind(None::<FencingToken>)
        .fetch_one(&mut database)
        .await
        .expect("query");
    assert!(is_null);
    // Other columns are no tokens.
    let other = sqlx::query_scalar::<_, FencingToken>("SELECT 'text'").fetch_one(&mut database);
    assert!(other.await.is_err());

    let beyond = FencingToken::new(1 << 63).expect("not 0");
    let error = sqlx::query("SELECT $1").bind(beyond).execute(&mut database).await;
    let error = error.expect_err("it does not fit").to_string();
    assert!(error.contains("does not fit into an i64"), "{error}");
}
