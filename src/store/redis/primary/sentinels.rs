//! Asks sentinels for the primary, and receives their notifications when it changes.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_redis::redis::aio::{PubSub, PubSubSink};
use deadpool_redis::redis::{ErrorKind, Value, cmd};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::super::client::{Target, with_reason};
use super::super::connection::{self, InFlight};
use super::super::reply::to_store_error;
use crate::endpoint::{Access, ServerUrl};
use crate::error::InvalidSetting;
use crate::store::{StoreError, TlsFiles};

/// The sentinels that watch one primary.
pub(super) struct Sentinels {
    servers: Vec<ServerUrl>,
    /// The sentinels' name for the primary.
    name: String,
    /// How to log in to the servers that the sentinels name.
    access: Access,
    tls: TlsFiles,
    /// The sentinel to ask first: the one that answered last, or that reported the last switch.
    first: AtomicUsize,
    /// The time limit for one sentinel's answer.
    limit: Duration,
    /// How long to wait for one sentinel before also asking the next.
    patience: Duration,
}

/// The channel on which a sentinel announces that a primary changed.
const SWITCHES: &str = "+switch-master";
/// The upper bound of [`Sentinels::patience`]: much longer than an answer takes within a data
/// centre.
const PATIENCE_MAX: Duration = Duration::from_millis(50);
/// The minimum idle time before checking that a sentinel still answers: short compared with a
/// failover.
const CHECK_EVERY_MIN: Duration = Duration::from_secs(1);

impl Sentinels {
    /// `timeout` is the time limit of a request. All sentinels must have been asked within it.
    pub(super) fn new(servers: Vec<ServerUrl>, name: String, access: Access, tls: TlsFiles, timeout: Duration) -> Self {
        let count = u32::try_from(servers.len()).unwrap_or(u32::MAX).max(1);
        Self {
            servers,
            name,
            access,
            tls,
            first: AtomicUsize::new(0),
            limit: timeout / 2,
            patience: (timeout / 4 / count).min(PATIENCE_MAX),
        }
    }

    pub(super) fn check(&self) -> Result<(), InvalidSetting> {
        for server in &self.servers {
            Target::new(server, &self.tls)?;
        }
        // The primary's address is not known yet, but its login and encryption are.
        Target::new(&self.access.url("127.0.0.1:1"), &self.tls).map(drop)
    }

    pub(super) fn count(&self) -> usize {
        self.servers.len()
    }

    /// `host:port` of a sentinel.
    pub(super) fn place(&self, index: usize) -> &str {
        self.servers[index].place()
    }

    pub(super) fn ask_first(&self, index: usize) {
        self.first.store(index, Ordering::Relaxed);
    }

    pub(super) fn ask_another_first(&self) {
        // The remainder is taken when the value is read.
        self.first.fetch_add(1, Ordering::Relaxed);
    }

    /// Asks the sentinels one after another until one names the primary. If one is slow, the next
    /// is asked concurrently.
    ///
    /// # Errors
    ///
    /// `Refused` if all of them answered and none knows the primary, otherwise `Unavailable`; with
    /// the answer or error of each.
    pub(super) async fn locate(&self) -> Result<ServerUrl, StoreError> {
        let (count, first) = (self.servers.len(), self.first.load(Ordering::Relaxed));
        let mut order = (0..count).map(|step| first.wrapping_add(step) % count);
        let mut asked = FuturesUnordered::new();
        let mut problems = Vec::with_capacity(count);
        loop {
            let next = order.next();
            let is_last = next.is_none();
            asked.extend(next.map(|index| async move { (index, self.ask(index).await) }));
            tokio::select! {
                answer = asked.next() => match answer {
                    Some((index, Ok(server))) => {
                        self.ask_first(index);
                        return Ok(server);
                    }
                    Some((index, Err(problem))) => problems.push((index, problem)),
                    None => return Err(self.nobody_knows(&problems)),
                },
                () = tokio::time::sleep(self.patience), if !is_last => {}
            }
        }
    }

    /// Asks one sentinel for the primary.
    pub(super) async fn ask(&self, index: usize) -> Result<ServerUrl, StoreError> {
        let answer = tokio::time::timeout(self.limit, async {
            let target = self.target(index)?;
            let in_flight = InFlight::default();
            let opening = connection::open(&target, None, connection::settings(), self.limit, &in_flight);
            let (mut connection, _driver) = with_reason(target.info(), self.limit, opening).await?;
            let mut question = cmd("SENTINEL");
            question.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name);
            let answer: Option<(String, String)> = question
                .query_async(&mut connection)
                .await
                .map_err(|error| to_store_error(&error))?;
            Ok(answer)
        });
        match answer.await {
            Ok(Ok(Some((host, port)))) => match place(&host, &port) {
                Some(place) => Ok(self.access.url(&place)),
                None => Err(StoreError::Refused(
                    format!("names an address that can't be used: {host:?}, port {port:?}").into(),
                )),
            },
            Ok(Ok(None)) => Err(StoreError::Refused(
                format!("knows no primary called {:?}", self.name).into(),
            )),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(StoreError::no_answer(self.limit)),
        }
    }

    fn nobody_knows(&self, problems: &[(usize, StoreError)]) -> StoreError {
        let words: Vec<String> = problems
            .iter()
            .map(|(index, problem)| {
                let (StoreError::Unavailable(reason) | StoreError::Refused(reason)) = problem else {
                    return self.place(*index).to_owned();
                };
                format!("{} {reason}", self.place(*index))
            })
            .collect();
        let all = format!("no sentinel names the primary {:?}: {}", self.name, words.join("; ")).into();
        let is_refusal = |(_, problem): &(usize, StoreError)| matches!(problem, StoreError::Refused(_));
        match problems.iter().all(is_refusal) {
            true => StoreError::Refused(all),
            false => StoreError::Unavailable(all),
        }
    }

    /// Subscribes to the switches that one sentinel announces.
    pub(super) async fn subscribe(&self, index: usize) -> Result<PubSub, StoreError> {
        let subscribed = tokio::time::timeout(self.limit, async {
            let target = self.target(index)?;
            let in_words = |error| to_store_error(&error);
            let mut switches = connection::subscriber(&target, None).await.map_err(in_words)?;
            switches.subscribe(SWITCHES).await.map_err(in_words)?;
            Ok(switches)
        });
        let too_slow = |_| Err(StoreError::no_answer(self.limit));
        subscribed.await.unwrap_or_else(too_slow)
    }

    /// How long a subscription may be idle before it is checked.
    pub(super) fn check_every(&self) -> Duration {
        self.limit.max(CHECK_EVERY_MIN)
    }

    /// Checks that a subscribed connection still reaches its sentinel.
    ///
    /// # Errors
    ///
    /// The sentinel did not answer in time, or the connection broke.
    pub(super) async fn check_answers(&self, subscribed: &mut PubSubSink) -> Result<(), StoreError> {
        match tokio::time::timeout(self.limit, subscribed.ping::<Value>()).await {
            Ok(Ok(_)) => Ok(()),
            // A sentinel whose ACL forbids the command has still answered.
            Ok(Err(error)) if matches!(error.kind(), ErrorKind::Server(_)) => Ok(()),
            Ok(Err(error)) => Err(to_store_error(&error)),
            Err(_) => Err(StoreError::Unavailable(
                format!("the subscription gave no answer within {:?}", self.limit).into(),
            )),
        }
    }

    /// The new address of our primary, if the message announces one:
    /// `<name> <old host> <old port> <new host> <new port>`.
    pub(super) fn switched(&self, message: &str) -> Option<String> {
        let mut words = message.split(' ');
        if words.next() != Some(&self.name) {
            return None;
        }
        place(words.nth(2)?, words.next()?)
    }

    fn target(&self, index: usize) -> Result<Target, StoreError> {
        let target = Target::new(&self.servers[index], &self.tls);
        target.map_err(|error| StoreError::Refused(error.to_string().into()))
    }
}

/// `host:port` as in a URL. Sentinels may report host names as well as addresses.
fn place(host: &str, port: &str) -> Option<String> {
    let port: u16 = port.parse().ok().filter(|&port| port > 0)?;
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    match host.parse() {
        Ok(IpAddr::V6(address)) => Some(format!("[{address}]:{port}")),
        Ok(IpAddr::V4(address)) => Some(format!("{address}:{port}")),
        Err(_) => (!host.is_empty() && host.bytes().all(is_name)).then(|| format!("{host}:{port}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Endpoint, EndpointKind};

    fn sentinels(url: &str) -> Sentinels {
        let endpoint = Endpoint::parse(url).unwrap();
        let EndpointKind::Sentinel {
            sentinels,
            primary,
            access,
        } = endpoint.kind().clone()
        else {
            panic!("{endpoint} is not watched by sentinels")
        };
        Sentinels::new(sentinels, primary, access, TlsFiles::default(), Duration::from_secs(1))
    }

    #[test]
    fn valid_addresses_are_accepted_and_malformed_ones_are_not() {
        for (host, port, expected) in [
            ("10.0.0.1", "6379", Some("10.0.0.1:6379")),
            ("::1", "7000", Some("[::1]:7000")),
            ("fe80::1%eth0", "7000", None),
            ("redis-1.example.com", "6379", Some("redis-1.example.com:6379")),
            ("", "6379", None),
            ("10.0.0.1", "0", None),
            ("10.0.0.1", "70000", None),
            ("user@host", "1", None),
            ("host/3", "1", None),
        ] {
            assert_eq!(place(host, port).as_deref(), expected, "{host} {port}");
        }
        let sentinels = sentinels("redis+sentinel://u:pw@a,b/m/3");
        for (host, url) in [("::1", "redis://u:pw@[::1]:7000/3"), ("h", "redis://u:pw@h:7000/3")] {
            let server = sentinels.access.url(&place(host, "7000").unwrap());
            assert_eq!(server.with_password(), url);
            assert!(Target::new(&server, &TlsFiles::default()).is_ok(), "{url}");
        }
    }

    #[test]
    fn only_switches_of_our_primary_count() {
        let sentinels = sentinels("redis+sentinel://a/m");
        let switched = |message: &str| sentinels.switched(message);
        assert_eq!(switched("m 10.0.0.1 1 10.0.0.2 2").as_deref(), Some("10.0.0.2:2"));
        assert_eq!(switched("m ::1 1 ::2 2").as_deref(), Some("[::2]:2"));
        for other in ["mm 10.0.0.1 1 10.0.0.2 2", "m", "m 10.0.0.1 1", "m a 1 b x", ""] {
            assert_eq!(switched(other), None, "{other:?}");
        }
    }

    #[tokio::test]
    async fn error_names_all_sentinels_if_none_can_be_reached() {
        let sentinels = sentinels("redis+sentinel://u:s3cret@127.0.0.1:1,localhost:2/m?sentinel_password=s3cret");
        let error = sentinels.locate().await.unwrap_err();
        let StoreError::Unavailable(words) = &error else {
            panic!("{error:?}")
        };
        for part in ["\"m\"", "127.0.0.1:1", "localhost:2", "refused"] {
            assert!(words.contains(part), "{words}");
        }
        assert!(!words.contains("s3cret"), "{words}");
    }
}
