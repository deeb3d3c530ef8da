//! The admin endpoint of a process, over HTTP.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST};
use hyper::http::uri::Authority;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use shardlock::admin::DEFAULT_ADDRESS;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Sample, pages};

/// The time limit for one sample, connecting included.
const TIME_MAX: Duration = Duration::from_secs(2);
/// The maximum size of a page, in bytes: a thousand held locks with the longest keys take a quarter
/// of it.
const PAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How much of an error response is shown, in characters.
const REFUSAL_CHARS_MAX: usize = 120;

/// The address of an admin endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::top) struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// The default address of an admin endpoint.
    pub(in crate::top) fn default_address() -> Self {
        Self {
            host: DEFAULT_ADDRESS.ip().to_string(),
            port: DEFAULT_ADDRESS.port(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl FromStr for Address {
    type Err = String;

    /// Parses `HOST:PORT`. A port alone means this machine, a host alone the default port.
    /// `http://HOST:PORT/metrics`, as the tool prints it, is accepted too.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("https://") {
            return Err("an admin endpoint speaks plain HTTP; give HOST:PORT".to_owned());
        }
        let address = text.strip_prefix("http://").unwrap_or(text);
        let (address, path) = address.split_once('/').unwrap_or((address, ""));
        if !["", "metrics"].contains(&path) {
            return Err(format!(
                "{text:?} has a path, but the paths of an admin endpoint are fixed; give HOST:PORT"
            ));
        }
        let default = Self::default_address();
        if let Ok(port) = address.strip_prefix(':').unwrap_or(address).parse() {
            return Ok(Self { port, ..default });
        }
        let invalid = || format!("{text:?} is not HOST:PORT, such as {default}");
        let authority: Authority = address.parse().map_err(|_| invalid())?;
        let (host, rest) = address.split_at_checked(authority.host().len()).ok_or_else(invalid)?;
        if host.is_empty() || host != authority.host() {
            return Err(invalid());
        }
        let port = match rest.strip_prefix(':') {
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(invalid)?,
            None if rest.is_empty() => default.port,
            None => return Err(invalid()),
        };
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

/// A process that is read through its admin endpoint.
#[derive(Debug)]
pub(in crate::top) struct Endpoint {
    address: Address,
}

impl Endpoint {
    pub(in crate::top) const fn new(address: Address) -> Self {
        Self { address }
    }

    pub(super) fn label(&self) -> String {
        self.address.to_string()
    }

    pub(super) async fn sample(&self) -> Result<Sample, String> {
        let pages = async {
            let (hot, held, shards) = (self.page("/hot"), self.page("/held"), self.page("/shards"));
            tokio::try_join!(hot, held, shards, self.page_of_agent("/clients"))
        };
        match tokio::time::timeout(TIME_MAX, pages).await {
            Ok(pages) => pages.map(|(hot, held, shards, clients)| pages::read(hot, held, shards, clients)),
            Err(_) => Err(format!("no answer within {}", humantime::format_duration(TIME_MAX))),
        }
    }

    async fn page<T: DeserializeOwned>(&self, path: &str) -> Result<T, String> {
        let (status, body) = self.get(path).await?;
        read(path, status, &body)
    }

    /// A page that only agents have.
    async fn page_of_agent<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, String> {
        match self.get(path).await? {
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (status, body) => read(path, status, &body).map(Some),
        }
    }

    async fn get(&self, path: &str) -> Result<(StatusCode, Bytes), String> {
        let host = self.address.host.trim_matches(['[', ']']);
        let stream = TcpStream::connect((host, self.address.port))
            .await
            .map_err(|error| without_os_error_number(&error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        // Ends the connection with the request. The request reports the connection's errors as
        // well.
        let mut connection_task = JoinSet::new();
        connection_task.spawn(connection);
        let request = Request::get(path)
            .header(HOST, self.address.to_string())
            .header(CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), PAGE_BYTES_MAX);
        let body = body.collect().await.map_err(|error| format!("{path}: {error}"))?;
        Ok((status, body.to_bytes()))
    }
}

fn read<T: DeserializeOwned>(path: &str, status: StatusCode, body: &[u8]) -> Result<T, String> {
    if status != StatusCode::OK {
        let message = String::from_utf8_lossy(body);
        let message: String = message
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(REFUSAL_CHARS_MAX)
            .collect();
        return Err(format!("{path} returned {}: {message}", status.as_u16()));
    }
    serde_json::from_slice(body).map_err(|error| format!("{path} is not what an admin endpoint returns: {error}"))
}

/// The error message without the OS error number.
fn without_os_error_number(error: &std::io::Error) -> String {
    let text = error.to_string();
    let message = text.split(" (os error").next().unwrap_or_default();
    message.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_leave_out_what_is_usual() {
        let read = |text: &str| text.parse::<Address>().unwrap().to_string();
        assert_eq!(read("10.0.0.1:80"), "10.0.0.1:80");
        assert_eq!(read("10.0.0.1"), "10.0.0.1:9187");
        assert_eq!(read("9100"), "127.0.0.1:9100");
        assert_eq!(read(":9100"), "127.0.0.1:9100");
        assert_eq!(read("[::1]:9100"), "[::1]:9100");
        assert_eq!(read("http://app-1:9100/metrics"), "app-1:9100");
    }

    #[test]
    fn invalid_addresses_are_refused() {
        for text in ["", "https://a:1", "a:b", "a:", "a:0", "a:70000", "user@a:1", "a b"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
