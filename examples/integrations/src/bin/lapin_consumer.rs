//! Consumers of RabbitMQ that handle the orders of each customer once and in sequence. RabbitMQ
//! gives the messages of one queue to several consumers, and may deliver a message twice.
//!
//! Under the lock of the customer, the number of an order says whether it is its turn. An order
//! that came too early returns to the queue. Without the lock, an order that was delivered twice
//! could be handled twice at the same time.
//!
//! ```sh
//! export SHARDLOCK_SHARDS=redis://127.0.0.1 REDIS_URL=redis://127.0.0.1
//! export AMQP_URL=amqp://127.0.0.1:5672/%2f
//! cargo run --package shardlock-examples --bin lapin_consumer -- publish anne 1 anne 2 bert 1
//! cargo run --package shardlock-examples --bin lapin_consumer
//! ```

use std::env;
use std::time::Duration;

use futures_util::TryStreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use redis::AsyncCommands;
use redis::aio::ConnectionManager;
use shardlock::LockManager;
use shardlock::config::Config;
use shardlock::tower::BoxError;

const QUEUE: &str = "orders";

/// How many messages a consumer handles at a time.
const PREFETCH: u16 = 16;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let connection = Connection::connect(&env::var("AMQP_URL")?, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(QUEUE.into(), durable, FieldTable::default())
        .await?;
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.split_first() {
        Some((command, orders)) if command == "publish" => publish(&channel, orders).await,
        _ => consume(&channel).await,
    }
}

/// Returns once the broker has confirmed all orders. Without confirmations, those that were on
/// their way when the program ended would be lost.
async fn publish(channel: &Channel, orders: &[String]) -> Result<(), BoxError> {
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    for order in orders.chunks_exact(2) {
        let message = order.join(" ");
        let options = BasicPublishOptions::default();
        let properties = BasicProperties::default();
        let sent = channel.basic_publish("".into(), QUEUE.into(), options, message.as_bytes(), properties);
        if !sent.await?.await?.is_ack() {
            return Err(format!("the broker did not take the order {message:?}").into());
        }
    }
    Ok(())
}

async fn consume(channel: &Channel) -> Result<(), BoxError> {
    let locks = LockManager::builder().config(Config::from_env()?).connect().await?;
    let client = redis::Client::open(env::var("REDIS_URL")?)?;
    let redis = ConnectionManager::new(client).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let deliveries = channel.basic_consume(QUEUE.into(), "".into(), options, FieldTable::default());
    let deliveries = deliveries.await?;
    println!("ready");
    let handling = deliveries
        .map_err(BoxError::from)
        .try_for_each_concurrent(None, |delivery| {
            let (locks, redis) = (locks.clone(), redis.clone());
            async move { handle(delivery, &locks, redis).await }
        });
    tokio::select! {
        result = handling => result?,
        // Messages that were not acknowledged return to the queue.
        signal = tokio::signal::ctrl_c() => signal?,
    }
    locks.shutdown().await?;
    Ok(())
}

/// What to do with a message, decided under the lock of its customer.
enum Turn {
    /// It was handled, now or when it was delivered before.
    Done,
    /// An earlier one is missing: another consumer has it, or it is behind this one.
    Early,
}

async fn handle(delivery: Delivery, locks: &LockManager, redis: ConnectionManager) -> Result<(), BoxError> {
    let Some((customer, number)) = parse(&delivery.data) else {
        eprintln!("not an order: {:?}", delivery.data.escape_ascii().to_string());
        // Not to be delivered again. The broker may keep it in a dead letter exchange.
        delivery.nack(BasicNackOptions::default()).await?;
        return Ok(());
    };
    // The body is cancelled if the lock is lost. The message then returns to the queue.
    let key = format!("customer:{customer}");
    let turn = locks.with_lock(key, async |_guard| take(redis, &customer, number).await);
    match turn.await.unwrap_or_else(|lost| Err(lost.into())) {
        Ok(Turn::Done) => {
            delivery.ack(BasicAckOptions::default()).await?;
        }
        Ok(Turn::Early) => requeue(&delivery).await?,
        Err(error) => {
            eprintln!("{customer} {number}: {error}");
            requeue(&delivery).await?;
        }
    }
    Ok(())
}

/// The customer and the number of an order such as `anne 3`.
fn parse(message: &[u8]) -> Option<(String, u64)> {
    let (customer, number) = std::str::from_utf8(message).ok()?.split_once(' ')?;
    Some((customer.to_owned(), number.parse().ok()?))
}

/// Handles the order if it is the next one of its customer.
async fn take(mut redis: ConnectionManager, customer: &str, number: u64) -> Result<Turn, BoxError> {
    let done = format!("orders:{customer}");
    let last: Option<u64> = redis.lindex(&done, -1).await?;
    let next = last.unwrap_or(0) + 1;
    if number > next {
        return Ok(Turn::Early);
    }
    if number == next {
        // The work.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let () = redis.rpush(&done, number).await?;
        println!("handled {customer} {number}");
    } else {
        println!("known {customer} {number}");
    }
    Ok(Turn::Done)
}

async fn requeue(delivery: &Delivery) -> Result<(), BoxError> {
    // It is delivered again at once, so give the earlier one time.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let options = BasicNackOptions {
        requeue: true,
        ..BasicNackOptions::default()
    };
    delivery.nack(options).await?;
    Ok(())
}
