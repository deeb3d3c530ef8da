//! The spans of two requests, of which one waits for the other.

use std::collections::HashMap;

use support::RedisServer;

use crate::Program;

/// A span as the exporter prints it.
#[derive(Debug)]
struct Span(HashMap<String, String>);

impl Span {
    fn get(&self, field: &str) -> &str {
        self.0.get(field).unwrap_or_else(|| panic!("no {field} in {self:?}"))
    }
}

/// The fields of each span: indented by one tab, and separated by a colon from their values.
fn spans(lines: &[String]) -> Vec<Span> {
    let mut found = Vec::new();
    for line in lines {
        if line.starts_with("Span #") {
            found.push(Span(HashMap::new()));
        }
        let field = line.strip_prefix('\t').filter(|rest| !rest.starts_with('\t'));
        if let (Some(span), Some((name, value))) = (found.last_mut(), field.and_then(|field| field.split_once(':'))) {
            span.0.insert(name.trim().to_owned(), value.trim().to_owned());
        }
    }
    found
}

#[test]
fn spans_show_that_the_second_request_waited_for_the_first() {
    let redis = RedisServer::start();
    let url = redis.url();
    let program = env!("CARGO_BIN_EXE_opentelemetry");
    // No renewal is due, which would be a span as well.
    let vars = [("SHARDLOCK_SHARDS", url.as_str()), ("SHARDLOCK_TTL", "600s")];
    let lines = Program::start(program, &vars, &[]).finish();
    let spans = spans(&lines);
    let named = |name: &str| -> Vec<&Span> { spans.iter().filter(|span| span.get("Name") == name).collect() };
    let checkouts = named("checkout");
    assert_eq!((checkouts.len(), spans.len()), (2, 6), "{spans:#?}");
    let child = |name: &str, of: &Span| {
        let mut children = named(name).into_iter();
        let child = children.find(|span| span.get("ParentSpanId") == of.get("SpanId"));
        child.unwrap_or_else(|| panic!("no {name} in {of:?}: {spans:#?}"))
    };
    // They are exported in the order in which they end.
    let [(first, first_hold), (second, second_hold)] =
        [0, 1].map(|index| ["acquire", "hold"].map(|name| child(name, checkouts[index])).into());
    // The second one waited until the first one had released the lock. The times are ISO dates.
    assert!(first.get("End time") <= first_hold.get("Start time"), "{spans:#?}");
    assert!(second.get("Start time") < first_hold.get("End time"), "{spans:#?}");
    assert!(second.get("End time") >= first_hold.get("End time"), "{spans:#?}");
    assert!(
        second_hold.get("Start time") >= first_hold.get("End time"),
        "{spans:#?}"
    );
}
