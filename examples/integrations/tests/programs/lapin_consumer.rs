//! Two consumers of one queue.

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use support::rabbitmq::RabbitMq;
use support::{RedisServer, wait_until};

use crate::{PATIENCE, Program};

const CUSTOMERS: [&str; 4] = ["anne", "bert", "cora", "dora"];

const ORDERS: usize = 8;

/// How many messages a consumer handles at a time.
const PREFETCH: usize = 16;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_of_each_customer_are_handled_in_sequence() {
    let (redis, rabbitmq) = (RedisServer::start(), RabbitMq::start());
    let (url, queue) = (redis.url(), rabbitmq.url());
    let vars = [
        ("SHARDLOCK_SHARDS", url.as_str()),
        ("REDIS_URL", &url),
        ("AMQP_URL", &queue),
    ];
    let program = env!("CARGO_BIN_EXE_lapin_consumer");
    // Each order is sent twice, and each pair of orders in the wrong sequence: 2, 2, 1, 1, 4, 4.
    let numbers = (1..=ORDERS).map(|number| if number % 2 == 0 { number - 1 } else { number + 1 });
    let mut orders = vec!["publish".to_owned()];
    for number in numbers.map(|number| number.to_string()) {
        for customer in CUSTOMERS {
            orders.extend([customer, &number, customer, &number].map(str::to_owned));
        }
    }
    // No order at all, which is dropped.
    orders.extend(["anne", "many"].map(str::to_owned));
    let orders: Vec<&str> = orders.iter().map(String::as_str).collect();
    // Both receive from the first order on, so that neither does everything.
    let consumers = [(); 2].map(|()| Program::start(program, &vars, &[]));
    consumers.iter().for_each(|consumer| drop(consumer.line("ready")));
    Program::start(program, &vars, &orders).finish();

    let mut seen: [Vec<String>; 2] = Default::default();
    wait_until("all orders are handled and recognised", PATIENCE, || {
        for (consumer, seen) in consumers.iter().zip(&mut seen) {
            seen.extend(consumer.lines.try_iter());
        }
        seen.iter().map(Vec::len).sum::<usize>() >= 2 * CUSTOMERS.len() * ORDERS
    });
    assert!(
        seen.iter().all(|lines| !lines.is_empty()),
        "one consumer did everything"
    );
    let expected: Vec<usize> = (1..=ORDERS).collect();
    for customer in CUSTOMERS {
        let handled: Vec<usize> = redis.query(&["LRANGE", &format!("orders:{customer}"), "0", "-1"]);
        assert_eq!(handled, expected, "{customer}");
    }
    drop(consumers);

    // Whatever was not acknowledged returns to the queue when its consumer is gone: at most what
    // was on its way.
    let connection = Connection::connect(&queue, ConnectionProperties::default())
        .await
        .expect("connect");
    let channel = connection.create_channel().await.expect("a channel");
    let options = QueueDeclareOptions::durable();
    let declared = channel.queue_declare("orders".into(), options, FieldTable::default());
    let left = declared.await.expect("the queue is there").message_count() as usize;
    assert!(left <= PREFETCH, "{left} messages are left");
}
