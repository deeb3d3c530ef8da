//! The URL of a shard: its kind and address, parsed once and never shown with its password.

mod redact;
mod servers;
mod socket;

use std::fmt;
use std::str::FromStr;

use crate::credentials::Credentials;
use crate::error::InvalidSetting;
pub(crate) use redact::redact;
pub(crate) use servers::Access;
pub use servers::ServerUrl;
use servers::{Parts, Rules};

/// The maximum length of a URL, in bytes.
const URL_BYTES_MAX: usize = 2048;

/// The maximum length of the name of an in-memory store, in bytes.
const MEMORY_NAME_BYTES_MAX: usize = 64;

/// The maximum length of the name of a primary that sentinels watch, in bytes.
const PRIMARY_NAME_BYTES_MAX: usize = 64;

const SUPPORTED: &str = "supported: redis://, redis+unix://, redis+sentinel://, redis+cluster://, redlock://, etcd://, memory://; rediss://, \
     rediss+sentinel://, rediss+cluster://, redlocks:// and etcds:// with TLS; valkey in place of redis";

/// The parsed URL of a shard.
///
/// - `redis://[[user]:password@]host[:port][/database]`: a Redis or Valkey primary; port 6379 and
///   database 0 by default
/// - `redis+unix:///path[?db=number&user=name&pass=password]`: the same through a Unix socket;
///   `unix://` is an alias
/// - `redis+sentinel://[[user]:password@]host[:port],.../name[/database]`: the primary that
///   Sentinel knows by that name; the hosts are sentinels, port 26379 by default
/// - `redis+cluster://[[user]:password@]host[:port],...`: a Redis Cluster; the hosts are some of
///   its nodes
/// - `redlock://[[user]:password@]host[:port],...[/database]`: a quorum of 3 to 15 independent
///   primaries
/// - `etcd://[user:password@]host[:port],...`: etcd, port 2379 by default; requires the feature
///   `etcd`
/// - `memory://[name]`: a store inside this process; managers with the same name share it, and
///   without a name each manager has its own
///
/// `valkey` can be used in place of `redis` in each of them; `Display` and [`scheme`](Self::scheme)
/// return `redis`.
///
/// `rediss://`, `rediss+sentinel://`, `rediss+cluster://`, `redlocks://` and `etcds://` are the
/// same over TLS and require the feature `tls`. The user and the password are those of the Redis
/// servers, or of etcd. Sentinels are contacted without a login, unless `?sentinel_password=` (and
/// `?sentinel_user=`) is given.
///
/// Etcd keeps a lease for whole seconds and at least for its minimum, about one and a half times
/// its election timeout. The key of a process that died is therefore freed somewhat later than its
/// TTL. The etcd user needs `readwrite` permission for all keys that begin with the namespace.
///
/// Characters of the user or the password that are special in a URL (`@`, `:`, `/`, `?`, `#`, `%`)
/// must be percent-encoded, such as `%40` for `@`. Neither `Display` nor `Debug` nor any error
/// shows the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    kind: EndpointKind,
    /// The text for `Display`: the URL in full, with `***` for the password.
    shown: String,
}

// No `Debug`: the URLs contain the password.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum EndpointKind {
    Redis(ServerUrl),
    Sentinel {
        sentinels: Vec<ServerUrl>,
        primary: String,
        /// How to connect to the server that the sentinels name.
        access: Access,
    },
    Cluster {
        seeds: Vec<ServerUrl>,
    },
    Redlock {
        nodes: Vec<ServerUrl>,
    },
    Etcd {
        /// As `host:port`.
        hosts: Vec<String>,
        login: Option<(String, String)>,
        tls: bool,
    },
    Memory {
        name: String,
    },
}

impl Endpoint {
    /// Parses a URL.
    ///
    /// # Errors
    ///
    /// [`InvalidSetting`], without the password, if the URL is malformed, is of a kind that this
    /// version or this build does not support, or has an invalid port, database or host.
    pub fn parse(text: &str) -> Result<Self, InvalidSetting> {
        let invalid = |bound: &str| InvalidSetting::new("url", redact(text), bound);
        if text.is_empty() {
            return Err(InvalidSetting::new("url", "empty", format!("a URL; {SUPPORTED}")));
        }
        if text.len() > URL_BYTES_MAX {
            let value = format!("{} bytes long", text.len());
            return Err(InvalidSetting::new(
                "url",
                value,
                format!("1 to {URL_BYTES_MAX} bytes long"),
            ));
        }
        // The URL parser drops tabs and line ends silently, which would change a password.
        if text.chars().any(|char| char.is_whitespace() || char.is_control()) {
            return Err(invalid(
                "a URL without spaces and control characters; write them percent-encoded",
            ));
        }
        let Some((scheme, rest)) = split_scheme(text) else {
            let is_address = |byte: u8| byte.is_ascii_alphanumeric() || b".:-_[]".contains(&byte);
            // What redact would hide may be a password.
            return Err(invalid(&match text.bytes().all(is_address) && redact(text) == text {
                true => format!("a URL, such as redis://{text}; {SUPPORTED}"),
                false => format!("a URL; {SUPPORTED}"),
            }));
        };
        let scheme = canonical(scheme);
        let tls = matches!(
            scheme.as_str(),
            "rediss" | "rediss+sentinel" | "rediss+cluster" | "redlocks" | "etcds"
        );
        let built = |feature: &str, is_built: bool| match is_built {
            true => Ok(()),
            false => Err(invalid(&format!(
                "of another kind: {scheme}:// needs the feature `{feature}`, which this build lacks"
            ))),
        };
        if tls {
            built("tls", cfg!(feature = "tls"))?;
        }
        let parts = |rules: &Rules| Parts::parse(text, &scheme, rest, tls, rules).map_err(|bound| invalid(&bound));
        match scheme.as_str() {
            "memory" => Self::parse_memory(text, rest),
            "redis" | "rediss" => Ok(parts(&Rules::REDIS)?.into_single()),
            "redis+unix" => socket::parse(rest).map_err(|bound| invalid(&bound)),
            "rediss+unix" => Err(invalid("redis+unix://: a Unix socket has no TLS")),
            "redis+sentinel" | "rediss+sentinel" => parts(&Rules::SENTINEL)?
                .into_sentinel(PRIMARY_NAME_BYTES_MAX)
                .map_err(|bound| invalid(&bound)),
            "redis+cluster" | "rediss+cluster" => Ok(parts(&Rules::CLUSTER)?.into_cluster()),
            "redlock" | "redlocks" => Ok(parts(&Rules::REDLOCK)?.into_redlock()),
            "etcd" | "etcds" => {
                built("etcd", cfg!(feature = "etcd"))?;
                parts(&Rules::ETCD)?.into_etcd().map_err(|bound| invalid(&bound))
            }
            _ => Err(invalid(&format!("a URL of a known kind; {SUPPORTED}"))),
        }
    }

    fn new(kind: EndpointKind, shown: String) -> Self {
        Self { kind, shown }
    }

    fn parse_memory(text: &str, name: &str) -> Result<Self, InvalidSetting> {
        if name.len() > MEMORY_NAME_BYTES_MAX || !name.bytes().all(is_name_byte) {
            let bound =
                format!("memory:// and a name of at most {MEMORY_NAME_BYTES_MAX} letters, digits, dots, _ and -");
            return Err(InvalidSetting::new("url", redact(text), bound));
        }
        let shown = format!("memory://{name}");
        let kind = EndpointKind::Memory { name: name.into() };
        Ok(Self { kind, shown })
    }

    /// Returns the kind of the shard: the part before `://`, in lower case.
    #[must_use]
    pub fn scheme(&self) -> &str {
        self.shown.split_once("://").map_or("", |(scheme, _)| scheme)
    }

    /// The servers in the URL, in its order: Redis servers, sentinels, nodes of a cluster
    /// or of a quorum, or members of etcd. Empty for `memory://`.
    pub(crate) fn servers(&self) -> Vec<ServerUrl> {
        match &self.kind {
            EndpointKind::Redis(server) => vec![server.clone()],
            EndpointKind::Sentinel { sentinels, .. } => sentinels.clone(),
            EndpointKind::Cluster { seeds } => seeds.clone(),
            EndpointKind::Redlock { nodes } => nodes.clone(),
            EndpointKind::Etcd { hosts, login, tls } => hosts
                .iter()
                .map(|host| ServerUrl::of_etcd(host, login.as_ref(), *tls))
                .collect(),
            EndpointKind::Memory { .. } => Vec::new(),
        }
    }

    /// The URL of a server at `host:port` that belongs to the shard but need not be in its
    /// URL, such as one reported by sentinels or by nodes of a cluster. `None` for `memory://`.
    pub(crate) fn server_at(&self, place: &str) -> Option<ServerUrl> {
        match &self.kind {
            EndpointKind::Sentinel { access, .. } => Some(access.url(place)),
            _ => self.servers().first().map(|server| server.at(place)),
        }
    }

    /// The name by which the sentinels of a `redis+sentinel://` shard know its primary.
    pub(crate) fn primary_name(&self) -> Option<&str> {
        match &self.kind {
            EndpointKind::Sentinel { primary, .. } => Some(primary),
            _ => None,
        }
    }

    /// Whether its servers may need a login that the URL does not have.
    pub(crate) fn lacks_login(&self) -> bool {
        match &self.kind {
            EndpointKind::Sentinel { access, .. } => !access.url("").has_login(),
            EndpointKind::Memory { .. } => false,
            _ => self.servers().first().is_some_and(|server| !server.has_login()),
        }
    }

    /// Whether connections to its servers are encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        matches!(
            self.scheme(),
            "rediss" | "rediss+sentinel" | "rediss+cluster" | "redlocks" | "etcds"
        )
    }

    pub(crate) fn kind(&self) -> &EndpointKind {
        &self.kind
    }
}

impl FromStr for Endpoint {
    type Err = InvalidSetting;

    fn from_str(text: &str) -> Result<Self, InvalidSetting> {
        Self::parse(text)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.shown).finish()
    }
}

/// Whether this byte is allowed in names of shards and of in-memory stores.
pub(crate) fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// Converts to lower case and replaces aliases.
fn canonical(scheme: &str) -> String {
    let scheme = scheme.to_ascii_lowercase();
    if scheme == "unix" {
        return "redis+unix".to_owned();
    }
    match scheme.strip_prefix("valkey") {
        Some(rest) if ["", "s"].contains(&rest.split('+').next().unwrap_or_default()) => format!("redis{rest}"),
        _ => scheme,
    }
}

/// Puts a login into a URL that has none.
pub(crate) fn with_login(url: &str, credentials: &Credentials) -> String {
    let encode = |text| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC);
    let Some((scheme, rest)) = split_scheme(url) else {
        return url.to_owned();
    };
    let username = credentials.username.as_deref().unwrap_or_default();
    let (user, password) = (encode(username), encode(credentials.password.expose()));
    if canonical(scheme) != "redis+unix" {
        return format!("{scheme}://{user}:{password}@{rest}");
    }
    let separator = if rest.contains('?') { '&' } else { '?' };
    let user = match username {
        "" => String::new(),
        _ => format!("user={user}&"),
    };
    format!("{url}{separator}{user}pass={password}")
}

fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let named = !scheme.is_empty()
        && scheme
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    named.then_some((scheme, rest))
}

#[cfg(test)]
mod tests;
