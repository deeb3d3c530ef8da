//! The content of each page.

use std::fmt::Write;
use std::time::Duration;

use hyper::StatusCode;
use serde::Serialize;

use super::{AddedPage, Renderer};
use crate::config::ReadyWhen;
use crate::manager_inner::ManagerInner;
use crate::snapshot::{self, HeldLock, HotKey, ShardState};
use crate::telemetry::{HOT_KEY, METRICS, escaped};

/// The maximum number of held locks on the page.
const HELD_MAX: usize = 1000;

/// A page.
pub(super) struct Page {
    pub(super) status: StatusCode,
    pub(super) content_type: &'static str,
    pub(super) body: String,
}

impl Page {
    pub(super) fn text(status: StatusCode, body: &str) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: body.to_owned(),
        }
    }

    const fn of_json(status: StatusCode, body: String) -> Self {
        Self {
            status,
            content_type: "application/json",
            body,
        }
    }

    fn json(status: StatusCode, body: &impl Serialize) -> Self {
        match serde_json::to_string(body) {
            Ok(body) => Self::of_json(status, body),
            Err(error) => Self::text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }
}

/// The page at this path. `manager` is `None` once the manager is gone.
pub(super) fn page(path: &str, renderer: &Renderer, added: &[AddedPage], manager: Option<&ManagerInner>) -> Page {
    match (path, manager) {
        ("/metrics", _) => Page {
            status: StatusCode::OK,
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            body: metrics(renderer, manager),
        },
        ("/healthz", _) => Page::text(StatusCode::OK, "ok"),
        ("/readyz", Some(manager)) => ready(manager),
        ("/hot", Some(manager)) => Page::json(StatusCode::OK, &Hot::of(manager)),
        ("/held", Some(manager)) => Page::json(StatusCode::OK, &Held::of(manager)),
        ("/shards", Some(manager)) => Page::json(StatusCode::OK, &Shards::of(manager)),
        ("/readyz" | "/hot" | "/held" | "/shards", None) => {
            Page::text(StatusCode::SERVICE_UNAVAILABLE, "the lock manager is gone\n")
        }
        _ => match added.iter().find(|added| added.path == path) {
            Some(added) => Page::of_json(StatusCode::OK, (added.render)()),
            None => {
                let added: String = added.iter().map(|added| format!(", {}", added.path)).collect();
                let message = format!("no such page; try /metrics, /healthz, /readyz, /hot, /held, /shards{added}\n");
                Page::text(StatusCode::NOT_FOUND, &message)
            }
        },
    }
}

/// The output of the recorder, followed by the hot keys if they are wanted as metrics. The hot keys
/// are written here because a recorder can't remove keys that are no longer hot.
pub(super) fn metrics(renderer: &Renderer, manager: Option<&ManagerInner>) -> String {
    if let Some(manager) = manager {
        manager.flush_metrics();
    }
    let mut page = (renderer.render)();
    if let Some(manager) = manager.filter(|manager| manager.config.hot_key_metrics)
        && let Some(metric) = METRICS.iter().find(|metric| metric.name == HOT_KEY)
    {
        // Writing to a string can't fail.
        writeln!(page, "# HELP {HOT_KEY} {}\n# TYPE {HOT_KEY} gauge", metric.meaning).ok();
        for hot in snapshot::hot_keys(manager) {
            let (key, shard) = (escaped(&hot.key), escaped(&hot.shard));
            writeln!(page, "{HOT_KEY}{{key=\"{key}\",shard=\"{shard}\"}} {}", hot.contended).ok();
        }
        page.push('\n');
    }
    page
}

#[derive(Serialize)]
struct Ready {
    ready: bool,
    ready_when: &'static str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    shut_down: bool,
    shards: Vec<ReadyShard>,
}

#[derive(Serialize)]
struct ReadyShard {
    name: String,
    up: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::millis::optional::serialize"
    )]
    down_for_ms: Option<Duration>,
}

fn ready(manager: &ManagerInner) -> Page {
    let rule = manager.config.ready_when;
    let shut_down = manager.is_closed();
    let shards: Vec<_> = snapshot::shards(manager)
        .into_iter()
        .map(|shard| ReadyShard {
            name: shard.name,
            up: shard.is_up,
            reason: shard.reason,
            down_for_ms: shard.down_for,
        })
        .collect();
    let mut up = shards.iter().map(|shard| shard.up);
    let ready = !shut_down
        && match rule {
            ReadyWhen::AnyShardUp => up.any(|up| up),
            ReadyWhen::AllShardsUp => up.all(|up| up),
        };
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let ready_when = rule.as_str();
    Page::json(
        status,
        &Ready {
            ready,
            ready_when,
            shut_down,
            shards,
        },
    )
}

#[derive(Serialize)]
struct Hot {
    keys: Vec<HotKey>,
    k: usize,
}

impl Hot {
    fn of(manager: &ManagerInner) -> Self {
        Self {
            keys: snapshot::hot_keys(manager),
            k: manager.config.hot_keys,
        }
    }
}

#[derive(Serialize)]
struct Held {
    total: usize,
    held: Vec<HeldLock>,
}

impl Held {
    fn of(manager: &ManagerInner) -> Self {
        let (total, held) = snapshot::held(manager, HELD_MAX);
        Self { total, held }
    }
}

#[derive(Serialize)]
struct Shards {
    shards: Vec<ShardState>,
    manager: String,
    uptime_s: f64,
}

impl Shards {
    fn of(manager: &ManagerInner) -> Self {
        Self {
            shards: snapshot::shards(manager),
            manager: manager.id().to_owned(),
            uptime_s: (manager.uptime().as_secs_f64() * 1e3).round() / 1e3,
        }
    }
}
