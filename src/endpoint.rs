//! What a shard is and where: its URL, parsed once and never shown with its password.

use std::fmt;
use std::str::FromStr;

use deadpool_redis::redis::IntoConnectionInfo;
use url::Url;

use crate::error::Invalid;

/// The port of Redis where a URL names none.
const REDIS_PORT: u16 = 6379;

/// The largest number that the server's `databases` setting allows for.
const DATABASE_MAX: u32 = i32::MAX as u32;

/// The longest URL, in bytes.
const URL_BYTES_MAX: usize = 2048;

/// The longest name of a store in memory, in bytes.
const MEMORY_NAME_BYTES_MAX: usize = 64;

/// Kinds of stores whose URLs are known but can't be used yet.
const UNSUPPORTED: [&str; 5] = ["rediss", "redis+sentinel", "redis+cluster", "redlock", "etcd"];

const SUPPORTED: &str = "supported: redis://, memory://";

/// The parsed URL of a shard.
///
/// | URL | store |
/// |---|---|
/// | `redis://[[user]:password@]host[:port][/database]` | a Redis (or Valkey) primary; port 6379 and database 0 unless named |
/// | `memory://[name]` | a store inside this process |
///
/// A character of the user or the password that means something in a URL (`@`, `:`, `/`, `?`, `#`, `%`) is written
/// percent-encoded, `%40` for `@`. Neither `Display` nor `Debug` nor an error ever shows the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    kind: EndpointKind,
    /// What `Display` shows: the URL in full, with `***` for the password.
    shown: String,
}

// No `Debug`: the URL holds the password.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum EndpointKind {
    Redis { url: String },
    Memory { name: String },
}

impl Endpoint {
    /// Parses a URL.
    ///
    /// # Errors
    ///
    /// [`Invalid`], with the password left out, if the URL is malformed, is of a kind that this version does not
    /// support, or has a port, database or host that cannot be.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let invalid = |bound: &str| Invalid::new("url", redact(text), bound);
        if text.is_empty() {
            return Err(Invalid::new("url", "empty", format!("a URL; {SUPPORTED}")));
        }
        if text.len() > URL_BYTES_MAX {
            let value = format!("{} bytes long", text.len());
            return Err(Invalid::new("url", value, format!("1 to {URL_BYTES_MAX} bytes long")));
        }
        // The URL parser drops tabs and line ends without a word, which would change a password.
        if text.chars().any(|char| char.is_whitespace() || char.is_control()) {
            return Err(invalid(
                "a URL without spaces and control characters; write them percent-encoded",
            ));
        }
        let Some((scheme, rest)) = split_scheme(text) else {
            return Err(invalid(&format!("a URL; {SUPPORTED}")));
        };
        match scheme.to_ascii_lowercase().as_str() {
            "redis" => Self::parse_redis(text),
            "memory" => Self::parse_memory(text, rest),
            known if UNSUPPORTED.contains(&known) => Err(invalid(&format!(
                "of another kind: {known}:// is not supported by this version; {SUPPORTED}"
            ))),
            _ => Err(invalid(&format!("a URL of a known kind; {SUPPORTED}"))),
        }
    }

    fn parse_redis(text: &str) -> Result<Self, Invalid> {
        let invalid = |bound: &str| Invalid::new("url", redact(text), bound);
        let url = Url::parse(text).map_err(|error| invalid(bound_of(error)))?;
        let host = url.host_str().unwrap_or_default();
        if host.is_empty() {
            return Err(invalid(bound_of(url::ParseError::EmptyHost)));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(invalid(
                "without a ? or # part (in a password, write %3F for ? and %23 for #)",
            ));
        }
        if url.password().is_none() && !url.username().is_empty() {
            // The server would never be told the user, and what stands there is often meant as the password.
            return Err(invalid(
                "with a password after the user: redis://user:password@host, or redis://:password@host",
            ));
        }
        let port = url.port().unwrap_or(REDIS_PORT);
        if port == 0 {
            return Err(invalid(bound_of(url::ParseError::InvalidPort)));
        }
        let Some(database) = parse_database(url.path()) else {
            return Err(invalid(&format!(
                "redis://host:port/database with a database from 0 to {DATABASE_MAX}"
            )));
        };
        // The client has rules of its own, such as no wildcard address. Its words may quote the URL, so they stay out.
        if url.clone().into_connection_info().is_err() {
            return Err(invalid(
                "a URL that the Redis client takes: no wildcard address such as 0.0.0.0 as the host, and UTF-8 \
                 in the user and password",
            ));
        }
        let login = match url.password() {
            Some(_) => format!("{}:***@", url.username()),
            None => String::new(),
        };
        let shown = format!("redis://{login}{host}:{port}/{database}");
        let kind = EndpointKind::Redis { url: url.into() };
        Ok(Self { kind, shown })
    }

    fn parse_memory(text: &str, name: &str) -> Result<Self, Invalid> {
        if name.len() > MEMORY_NAME_BYTES_MAX || !name.bytes().all(is_name_byte) {
            let bound =
                format!("memory:// and a name of at most {MEMORY_NAME_BYTES_MAX} letters, digits, dots, _ and -");
            return Err(Invalid::new("url", redact(text), bound));
        }
        let shown = format!("memory://{name}");
        let kind = EndpointKind::Memory { name: name.into() };
        Ok(Self { kind, shown })
    }

    pub(crate) fn kind(&self) -> &EndpointKind {
        &self.kind
    }
}

impl FromStr for Endpoint {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
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

/// Whether names of shards and of stores in memory may have this byte.
pub(crate) fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

fn bound_of(error: url::ParseError) -> &'static str {
    match error {
        url::ParseError::EmptyHost => "redis://[user:password@]host[:port][/database] with a host that is not empty",
        url::ParseError::InvalidPort => {
            "redis://[user:password@]host[:port][/database] with a port from 1 to 65535 (in a password, write %2F for /)"
        }
        _ => "redis://[user:password@]host[:port][/database]",
    }
}

fn parse_database(path: &str) -> Option<u32> {
    let number = path.strip_prefix('/').unwrap_or(path);
    if number.is_empty() {
        return Some(0);
    }
    // A plain parse would let "+1" pass.
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let database = number.parse().ok().filter(|_| digits)?;
    (database <= DATABASE_MAX).then_some(database)
}

fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let named = !scheme.is_empty()
        && scheme
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    named.then_some((scheme, rest))
}

/// What may be shown of a URL, well-formed or not: no password, nor what could be one.
///
/// A malformed URL is the very case in which a parser takes the password for a port or a path, so this looks at the text
/// only, and hides too much rather than too little.
pub(crate) fn redact(text: &str) -> String {
    let (scheme, rest) = match split_scheme(text) {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), text),
    };
    let (login, place) = match rest.rsplit_once('@') {
        // The last @ may belong to a path or query, or a / to the password: there's no telling what is secret.
        Some((login, _)) if login.contains(['/', '?', '#']) => return format!("{scheme}***"),
        Some((login, place)) => match login.split_once(':') {
            Some((user, password)) if !password.is_empty() => (format!("{user}:***@"), place),
            _ => ("***@".to_owned(), place),
        },
        None => (String::new(), rest),
    };
    format!("{scheme}{login}{}", redact_place(place))
        .escape_debug()
        .to_string()
}

/// The same for what follows the `@`: `host:port/database`. What stands where a port should may be a password whose `@`
/// was forgotten, unless it is a number after a host.
fn redact_place(place: &str) -> String {
    let (place, hidden) = match place.find(['?', '#']) {
        Some(at) => (&place[..at], format!("{}***", &place[at..=at])),
        None => (place, String::new()),
    };
    let host_end = match place.find(']') {
        Some(bracket) if place.starts_with('[') => bracket,
        _ => 0,
    };
    let Some(colon) = place[host_end..].find(':').map(|at| at + host_end) else {
        return format!("{place}{hidden}");
    };
    let after = &place[colon + 1..];
    let port = after.split('/').next().unwrap_or_default();
    if colon > 0 && port.bytes().all(|byte| byte.is_ascii_digit()) {
        format!("{place}{hidden}")
    } else {
        format!("{}:***{hidden}", &place[..colon])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Endpoint {
        Endpoint::parse(text).unwrap()
    }

    fn refusal(text: &str) -> String {
        Endpoint::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn redis_urls_are_shown_in_full_without_the_password() {
        for (text, shown) in [
            ("redis://localhost", "redis://localhost:6379/0"),
            ("redis://localhost/", "redis://localhost:6379/0"),
            ("redis://localhost:/3", "redis://localhost:6379/3"),
            ("REDIS://10.0.0.1:7000/15", "redis://10.0.0.1:7000/15"),
            ("redis://[::1]:7000", "redis://[::1]:7000/0"),
            ("redis://:s3cret@host", "redis://:***@host:6379/0"),
            ("redis://user:s3cret@host:1/2", "redis://user:***@host:1/2"),
            ("redis://user:s3%40cret@host", "redis://user:***@host:6379/0"),
        ] {
            let endpoint = parsed(text);
            assert_eq!(endpoint.to_string(), shown, "{text}");
            assert_eq!(format!("{endpoint:?}"), format!("Endpoint({shown:?})"));
        }
    }

    #[test]
    fn the_client_gets_the_password() {
        let endpoint: Endpoint = "redis://user:s3%40cret@[::1]:7000/2".parse().unwrap();
        let EndpointKind::Redis { url } = endpoint.kind() else {
            panic!("{endpoint} is a Redis")
        };
        let info = url.as_str().into_connection_info().unwrap();
        assert_eq!(info.addr().to_string(), "::1:7000");
        assert_eq!(info.redis_settings().username(), Some("user"));
        assert_eq!(info.redis_settings().password(), Some("s3@cret"));
        assert_eq!(info.redis_settings().db(), 2);
    }

    #[test]
    fn memory_urls_have_an_optional_name() {
        let name = |text: &str| match parsed(text).kind() {
            EndpointKind::Memory { name } => name.clone(),
            EndpointKind::Redis { .. } => panic!("{text} is no Redis"),
        };
        assert_eq!(name("memory://"), "");
        assert_eq!(name("memory://Test-1.a_b"), "Test-1.a_b");
        assert_eq!(parsed("memory://x").to_string(), "memory://x");
        assert!(refusal("memory://a/b").contains("memory:// and a name of at most 64"));
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        for scheme in UNSUPPORTED {
            let message = refusal(&format!("{scheme}://:s3cret@a:1,b:2/main"));
            let expected = format!("{scheme}:// is not supported by this version; supported: redis://, memory://");
            assert!(message.contains(&expected), "{message}");
            assert!(!message.contains("s3cret"), "{message}");
        }
        assert!(refusal("http://host").contains("supported: redis://, memory://"));
        assert!(refusal("localhost:6379").contains("url is localhost:6379, but must be a URL"));
    }

    #[test]
    fn values_outside_their_bounds_are_refused_with_value_and_bound() {
        for (text, value, bound) in [
            ("", "empty", "a URL"),
            ("redis://", "redis://", "a host that is not empty"),
            ("redis:///0", "redis:///0", "a host that is not empty"),
            ("redis://:6379", "redis://:***", "a host that is not empty"),
            ("redis://host:99999", "redis://host:99999", "a port from 1 to 65535"),
            ("redis://host:0", "redis://host:0", "a port from 1 to 65535"),
            ("redis://host:port", "redis://host:***", "a port from 1 to 65535"),
            ("redis://host/one", "redis://host/one", "a database from 0 to"),
            ("redis://host/-1", "redis://host/-1", "a database from 0 to"),
            ("redis://host/+1", "redis://host/+1", "a database from 0 to"),
            (
                "redis://host/2147483648",
                "redis://host/2147483648",
                "from 0 to 2147483647",
            ),
            ("redis://host/1/2", "redis://host/1/2", "a database from 0 to"),
            ("redis://0.0.0.0", "redis://0.0.0.0", "no wildcard address"),
            ("redis://host?db=1", "redis://host?***", "without a ? or # part"),
            (
                "redis://secret@host",
                "redis://***@host",
                "with a password after the user",
            ),
            ("redis://ho st", "redis://ho st", "without spaces"),
        ] {
            let message = refusal(text);
            let expected = format!("url is {value}, but must be ");
            assert!(message.starts_with(&expected) && message.contains(bound), "{message}");
        }
        let long = refusal(&format!("redis://{}", "h".repeat(2048)));
        assert_eq!(long, "url is 2056 bytes long, but must be 1 to 2048 bytes long");
    }

    #[test]
    fn a_malformed_url_does_not_show_its_password() {
        for text in [
            "redis://:s3cret@host:99999",
            "redis://user:s3cret@host:99999",
            "redis://user:s3cret@host:port",
            "redis://user:s3cret@host/database",
            "redis://user:s3cret@",
            "redis://user:s3/s3cret@host",
            "redis://user:1/s3cret@host",
            "redis://user:1#s3cret@host",
            "redis://user:1?s3cret@host",
            "redis://user:s3#s3cret@host",
            "redis://user:s3@s3cret@host:x",
            "redis://user:s3 s3cret@host",
            "redis://s3cret@host",
            "redis://s3cret:@host",
            "redis://:s3cret:6379",
            "redis://host:s3cret",
            "redis://:s3cret",
            "redis://host?password=s3cret",
            "redis://host?password=s3@s3cret",
            "redis://host#s3cret",
            "redis//:s3cret@host",
            "redis:/s3cret@host",
            "redis:s3cret@host",
            "user:s3://s3cret@host",
            "user:s3cret@host",
            "s3cret@host",
            ":s3cret",
            "etcd://user:s3cret@host",
            "memory://user:s3cret@host",
            "postgres://user:s3cret@host",
            "redis://user:%FFs3cret@host",
        ] {
            let error = Endpoint::parse(text).unwrap_err();
            assert!(!error.to_string().contains("s3cret"), "{text}: {error}");
            assert!(!format!("{error:?}").contains("s3cret"), "{text}: {error:?}");
        }
    }

    proptest! {
        #[test]
        fn no_password_is_ever_shown(
            before in "[a-z:/@?#%.=,\\[\\]]{0,6}",
            after in "[a-z0-9:/@?#%.=,\\[\\]]{0,6}",
            port in 0_u32..99_999,
        ) {
            let text = format!("redis://user:{before}SECRET{after}@host:{port}");
            let shown = match Endpoint::parse(&text) {
                Ok(endpoint) => format!("{endpoint} {endpoint:?}"),
                Err(error) => format!("{error} {error:?}"),
            };
            prop_assert!(!shown.contains("SECRET"), "{text}: {shown}");
        }
    }
}
