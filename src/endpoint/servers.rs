//! URLs of one or more servers: the login, the hosts, and the path.

use std::fmt;

use deadpool_redis::redis::IntoConnectionInfo;
use url::Url;

use super::{Endpoint, EndpointKind, is_name_byte};

/// The default port of Redis.
const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;
const ETCD_PORT: u16 = 2379;

/// The largest number that the `databases` setting of a server allows.
pub(super) const DATABASE_MAX: u32 = i32::MAX as u32;

/// The start of the URL of a socket.
pub(super) const SOCKET: &str = "redis+unix://";

/// The maximum number of hosts in a URL.
const HOSTS_MAX: usize = 32;
/// Fewer than three nodes tolerate no failure; more than fifteen only add cost.
const REDLOCK_NODES: (usize, usize) = (3, 15);

/// One server of a shard, as a URL for client libraries. `Debug` hides the password, and there is
/// no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerUrl {
    url: String,
    /// The address as `host:port`, or the path of a socket; safe to show.
    place: String,
}

impl ServerUrl {
    /// Returns the whole URL, for connecting. Show [`place`](Self::place) to people instead.
    #[must_use]
    pub fn with_password(&self) -> &str {
        &self.url
    }

    /// Returns the address as `host:port`, or the path of a Unix socket.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Returns whether connections to the server are encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.url.starts_with("rediss://") || self.url.starts_with("etcds://")
    }

    /// Returns whether the server is reached through a Unix socket of this machine.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        self.url.starts_with(SOCKET)
    }

    /// Returns whether the URL contains a password.
    #[must_use]
    pub fn has_login(&self) -> bool {
        match self.url.strip_prefix(SOCKET) {
            Some(rest) => rest.contains("&pass="),
            None => self.url.contains('@'),
        }
    }

    /// The URL of a server behind a socket. `login` is percent-encoded.
    pub(super) fn of_socket(path: &str, encoded_path: &str, login: Option<(&str, &str)>, database: u32) -> Self {
        let login = login.map_or_else(String::new, |(user, password)| match user {
            "" => format!("&pass={password}"),
            user => format!("&user={user}&pass={password}"),
        });
        Self {
            url: format!("{SOCKET}{encoded_path}?db={database}{login}"),
            place: path.to_owned(),
        }
    }

    /// The URL of an etcd member.
    pub(super) fn of_etcd(place: &str, login: Option<&(String, String)>, tls: bool) -> Self {
        let encode = |text| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC);
        let login = login.map_or_else(String::new, |(user, password)| {
            format!("{}:{}@", encode(user), encode(password))
        });
        let scheme = if tls { "etcds" } else { "etcd" };
        Self {
            url: format!("{scheme}://{login}{place}"),
            place: place.to_owned(),
        }
    }

    /// The same URL with another address.
    pub(crate) fn at(&self, place: &str) -> Self {
        if let Some(rest) = self.url.strip_prefix(SOCKET) {
            let value = |name: &str| {
                let pairs = rest.split_once('?').map_or("", |(_, query)| query).split('&');
                pairs
                    .filter_map(|pair| pair.split_once('='))
                    .find(|(known, _)| *known == name)
            };
            let login = value("pass").map_or_else(String::new, |(_, password)| {
                format!("{}:{password}@", value("user").map_or("", |(_, user)| user))
            });
            let database = value("db").map_or("0", |(_, database)| database);
            return Self {
                url: format!("redis://{login}{place}/{database}"),
                place: place.to_owned(),
            };
        }
        // The login is percent-encoded, so the last slash is the one before the database. If there
        // is none, the address comes last.
        let end = match self.url.rfind('/') {
            Some(slash) if !self.url[..slash].ends_with('/') => slash,
            _ => self.url.len(),
        };
        let start = end - self.place.len();
        Self {
            url: format!("{}{place}{}", &self.url[..start], &self.url[end..]),
            place: place.to_owned(),
        }
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServerUrl").field(&self.place).finish()
    }
}

/// How to connect to servers, independent of their addresses.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Access {
    tls: bool,
    /// `user:password@` as in the URL, or empty.
    login: String,
    database: u32,
}

impl Access {
    /// The URL of the server at `host:port`.
    pub(crate) fn url(&self, place: &str) -> ServerUrl {
        let scheme = if self.tls { "rediss" } else { "redis" };
        ServerUrl {
            url: format!("{scheme}://{}{place}/{}", self.login, self.database),
            place: place.to_owned(),
        }
    }
}

/// The path that a URL may have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PathRule {
    Database,
    /// A cluster has only database 0, which may be given.
    DatabaseZero,
    /// The name of a primary comes first; the caller checks it.
    Name,
    Nothing,
}

/// The form of a kind of URL.
pub(super) struct Rules {
    /// For errors.
    form: &'static str,
    port: u16,
    hosts: (usize, usize),
    path: PathRule,
    /// The names allowed in the query.
    query: &'static [&'static str],
}

impl Rules {
    pub(super) const REDIS: Self = Self {
        form: "redis://[user:password@]host[:port][/database]",
        port: REDIS_PORT,
        hosts: (1, 1),
        path: PathRule::Database,
        query: &[],
    };
    pub(super) const SENTINEL: Self = Self {
        form: "redis+sentinel://[user:password@]host[:port],.../name[/database]",
        port: SENTINEL_PORT,
        hosts: (1, HOSTS_MAX),
        path: PathRule::Name,
        query: &["sentinel_user", "sentinel_password"],
    };
    pub(super) const CLUSTER: Self = Self {
        form: "redis+cluster://[user:password@]host[:port],...",
        port: REDIS_PORT,
        hosts: (1, HOSTS_MAX),
        path: PathRule::DatabaseZero,
        query: &[],
    };
    pub(super) const REDLOCK: Self = Self {
        form: "redlock://[user:password@]host[:port],...[/database]",
        port: REDIS_PORT,
        hosts: REDLOCK_NODES,
        path: PathRule::Database,
        query: &[],
    };
    pub(super) const ETCD: Self = Self {
        form: "etcd://[user:password@]host[:port],...",
        port: ETCD_PORT,
        hosts: (1, HOSTS_MAX),
        path: PathRule::Nothing,
        query: &[],
    };
}

/// The parts of a URL.
pub(super) struct Parts {
    scheme: String,
    /// `user:password@`, percent-encoded, or empty.
    login: String,
    /// As `host:port`.
    places: Vec<String>,
    /// Without the leading slash.
    path: String,
    database: u32,
    query: Vec<(String, String)>,
    tls: bool,
}

impl Parts {
    /// # Errors
    ///
    /// The form that the URL must have.
    pub(super) fn parse(text: &str, scheme: &str, rest: &str, tls: bool, rules: &Rules) -> Result<Self, String> {
        let form = rules.form;
        let after_login = rest.rsplit_once('@');
        if after_login.is_some_and(|(login, _)| login.contains(['/', '?', '#'])) {
            return Err(format!(
                "{form}; in a password, write %2F for /, %3F for ? and %23 for #"
            ));
        }
        let (login, rest) = after_login.unwrap_or(("", rest));
        let (user, password) = login.split_once(':').unwrap_or((login, ""));
        if after_login.is_some() && user.is_empty() && password.is_empty() {
            // The password was forgotten, or a variable was not set.
            return Err(format!("{form} with a password before the @, or without an @"));
        }
        if password.is_empty() && !user.is_empty() {
            // The user alone would never be sent to the server, and it is often meant as the
            // password.
            return Err(format!(
                "with a password after the user: {scheme}://user:password@host, or {scheme}://:password@host"
            ));
        }
        let (rest, query) = match rest.split_once(['?', '#']) {
            None => (rest, Vec::new()),
            Some((rest, query)) => (rest, parse_query(text, query, rules)?),
        };
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let database = match (rules.path, path) {
            (PathRule::Database, path) => {
                parse_database(path).ok_or_else(|| format!("{form} with a database from 0 to {DATABASE_MAX}"))?
            }
            (PathRule::DatabaseZero, "" | "0") | (PathRule::Nothing, "") | (PathRule::Name, _) => 0,
            (PathRule::DatabaseZero, _) => return Err(format!("{form} without a database: a cluster has only 0")),
            (PathRule::Nothing, _) => return Err(format!("{form} without a path")),
        };
        let mut places = Vec::new();
        for host in hosts.split(',') {
            let place = parse_place(host, login, rules)?;
            if places.contains(&place) {
                return Err(format!("{form} with each host once; {place} is listed twice"));
            }
            places.push(place);
        }
        let (least, most) = rules.hosts;
        if !(least..=most).contains(&places.len()) {
            let range = if least == most {
                least.to_string()
            } else {
                format!("{least} to {most}")
            };
            return Err(format!("{form} with {range} hosts, not {}", places.len()));
        }
        Ok(Self {
            scheme: scheme.to_owned(),
            login: if password.is_empty() {
                String::new()
            } else {
                format!("{login}@")
            },
            places,
            path: path.to_owned(),
            database,
            query,
            tls,
        })
    }

    fn access(&self, database: u32) -> Access {
        Access {
            tls: self.tls,
            login: self.login.clone(),
            database,
        }
    }

    fn servers(&self) -> Vec<ServerUrl> {
        let access = self.access(self.database);
        self.places.iter().map(|place| access.url(place)).collect()
    }

    /// The URL without the password.
    fn shown(&self, path: &str) -> String {
        let login = match self.login.split_once(':') {
            Some((user, _)) => format!("{user}:***@"),
            None => String::new(),
        };
        format!("{}://{login}{}{path}", self.scheme, self.places.join(","))
    }

    pub(super) fn into_single(self) -> Endpoint {
        let shown = self.shown(&format!("/{}", self.database));
        // The rules allow exactly one.
        let url = self.access(self.database).url(&self.places[0]);
        Endpoint::new(EndpointKind::Redis(url), shown)
    }

    pub(super) fn into_sentinel(self, name_bytes_max: usize) -> Result<Endpoint, String> {
        let form = Rules::SENTINEL.form;
        let (name, database) = self.path.split_once('/').unwrap_or((&self.path, ""));
        if name.is_empty() || name.len() > name_bytes_max || !name.bytes().all(is_name_byte) {
            return Err(format!(
                "{form} with the name of a primary, 1 to {name_bytes_max} letters, digits, dots, _ and -"
            ));
        }
        let database =
            parse_database(database).ok_or_else(|| format!("{form} with a database from 0 to {DATABASE_MAX}"))?;
        let given = |name: &str| {
            self.query
                .iter()
                .find(|(known, _)| known == name)
                .map(|(_, value)| value.as_str())
        };
        // The login part of a URL allows fewer unescaped characters than the query.
        let encoded = |text: &str| {
            let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
            let decoded = decoded.map_err(|_| format!("{form} with UTF-8 in sentinel_user and sentinel_password"))?;
            let encoded = percent_encoding::utf8_percent_encode(&decoded, percent_encoding::NON_ALPHANUMERIC);
            Ok::<_, String>(encoded.to_string())
        };
        let sentinels = Access {
            tls: self.tls,
            login: match (given("sentinel_user"), given("sentinel_password")) {
                (user, Some(password)) => {
                    format!("{}:{}@", encoded(user.unwrap_or_default())?, encoded(password)?)
                }
                (Some(_), None) => return Err(format!("{form} with sentinel_password if sentinel_user is given")),
                (None, None) => String::new(),
            },
            database: 0,
        };
        let kind = EndpointKind::Sentinel {
            sentinels: self.places.iter().map(|place| sentinels.url(place)).collect(),
            primary: name.to_owned(),
            access: self.access(database),
        };
        Ok(Endpoint::new(kind, self.shown(&format!("/{name}/{database}"))))
    }

    pub(super) fn into_cluster(self) -> Endpoint {
        let kind = EndpointKind::Cluster { seeds: self.servers() };
        Endpoint::new(kind, self.shown(""))
    }

    pub(super) fn into_redlock(self) -> Endpoint {
        let kind = EndpointKind::Redlock { nodes: self.servers() };
        let shown = self.shown(&format!("/{}", self.database));
        Endpoint::new(kind, shown)
    }

    pub(super) fn into_etcd(self) -> Result<Endpoint, String> {
        let login = match Url::parse(&format!("redis://{}host", self.login)) {
            Ok(url) => url.password().map(|password| {
                let decode = |text: &str| {
                    percent_encoding::percent_decode_str(text)
                        .decode_utf8_lossy()
                        .into_owned()
                };
                (decode(url.username()), decode(password))
            }),
            Err(_) => return Err(Rules::ETCD.form.to_owned()),
        };
        if login.as_ref().is_some_and(|(user, _)| user.is_empty()) {
            return Err(format!("{} with a user before the password", Rules::ETCD.form));
        }
        let shown = self.shown("");
        let kind = EndpointKind::Etcd {
            hosts: self.places,
            login,
            tls: self.tls,
        };
        Ok(Endpoint::new(kind, shown))
    }
}

/// Checks `host[:port]` and adds the default port.
fn parse_place(host: &str, login: &str, rules: &Rules) -> Result<String, String> {
    let login = if login.is_empty() {
        String::new()
    } else {
        format!("{login}@")
    };
    let url = format!("redis://{login}{host}");
    let url = Url::parse(&url).map_err(|error| bound_of(error, rules.form))?;
    let name = url.host_str().unwrap_or_default();
    if name.is_empty() {
        return Err(bound_of(url::ParseError::EmptyHost, rules.form));
    }
    let port = url.port().unwrap_or(rules.port);
    if port == 0 {
        return Err(bound_of(url::ParseError::InvalidPort, rules.form));
    }
    // The client has rules of its own, such as no wildcard address. Its message may quote the URL,
    // so it is not included.
    if url.clone().into_connection_info().is_err() {
        return Err(
            "a URL that the Redis client accepts: no wildcard address such as 0.0.0.0 as the host, and UTF-8 in the user and \
             password"
                .to_owned(),
        );
    }
    Ok(format!("{name}:{port}"))
}

/// The values stay percent-encoded.
fn parse_query(text: &str, query: &str, rules: &Rules) -> Result<Vec<(String, String)>, String> {
    let unexpected = || match rules.query {
        [] => "without a ? or # part (in a password, write %3F for ? and %23 for #)".to_owned(),
        known => format!(
            "without a # part, and with nothing but {} after the ?",
            known.join(" and ")
        ),
    };
    if text.contains('#') {
        return Err(unexpected());
    }
    let pairs = query.split('&').map(|pair| {
        let (name, value) = pair.split_once('=')?;
        (rules.query.contains(&name) && !value.is_empty()).then(|| (name.to_owned(), value.to_owned()))
    });
    let pairs: Vec<(String, String)> = pairs.collect::<Option<_>>().ok_or_else(unexpected)?;
    for (index, (name, _)) in pairs.iter().enumerate() {
        if pairs[..index].iter().any(|(earlier, _)| earlier == name) {
            return Err(format!("with {name} once"));
        }
    }
    Ok(pairs)
}

fn bound_of(error: url::ParseError, form: &str) -> String {
    match error {
        url::ParseError::EmptyHost => format!("{form} with a host that is not empty"),
        url::ParseError::InvalidPort => {
            format!("{form} with a port from 1 to 65535 (in a password, write %2F for /)")
        }
        _ => form.to_owned(),
    }
}

pub(super) fn parse_database(path: &str) -> Option<u32> {
    if path.is_empty() {
        return Some(0);
    }
    // Parsing alone would accept "+1".
    let digits = path.bytes().all(|byte| byte.is_ascii_digit());
    let database = path.parse().ok().filter(|_| digits)?;
    (database <= DATABASE_MAX).then_some(database)
}
