//! URLs of Unix sockets, in the form of redis-rs:
//! `redis+unix:///path?db=number&user=name&pass=password`.

use super::servers::{DATABASE_MAX, SOCKET, ServerUrl, parse_database};
use super::{Endpoint, EndpointKind};

const FORM: &str = "redis+unix:///path[?db=number&user=name&pass=password]";

/// The longest path that fits into a socket address.
const PATH_BYTES_MAX: usize = 107;

/// Parses the part after the `://`.
///
/// # Errors
///
/// The form that the URL must have.
pub(super) fn parse(rest: &str) -> Result<Endpoint, String> {
    if !rest.starts_with('/') {
        return Err(format!("{FORM} with three slashes, and the login after the ?"));
    }
    let (encoded_path, query) = match rest.split_once(['?', '#']) {
        Some((path, query)) => (path, query.split('&').collect()),
        None => (rest, Vec::new()),
    };
    let unexpected = || format!("{FORM} with nothing but db, user and pass after the ?, each once");
    if rest.contains('#') {
        return Err(unexpected());
    }
    let (mut database, mut user, mut password) = (None, None, None);
    for pair in query {
        let (name, value) = pair.split_once('=').ok_or_else(unexpected)?;
        let known = match name {
            "db" => &mut database,
            "user" => &mut user,
            "pass" => &mut password,
            _ => return Err(unexpected()),
        };
        if value.is_empty() || known.replace(value).is_some() {
            return Err(unexpected());
        }
    }
    let database = parse_database(database.unwrap_or_default())
        .ok_or_else(|| format!("{FORM} with a database from 0 to {DATABASE_MAX}"))?;
    let login = match (user, password) {
        (user, Some(password)) => Some((user.unwrap_or_default(), password)),
        (Some(_), None) => return Err(format!("{FORM} with pass if user is given")),
        (None, None) => None,
    };
    // The client library would decode a plus as a space and replace invalid UTF-8. In addition, a
    // URL with an address allows fewer unescaped characters.
    let encoded = |text: &str| {
        let decoded = percent_encoding::percent_decode_str(text).decode_utf8().ok()?;
        Some(percent_encoding::utf8_percent_encode(&decoded, percent_encoding::NON_ALPHANUMERIC).to_string())
    };
    let encoded_login = match login {
        Some((user, password)) => encoded(user)
            .zip(encoded(password))
            .map(Some)
            .ok_or_else(|| format!("{FORM} with UTF-8 in the user and the password"))?,
        None => None,
    };
    let decoded = percent_encoding::percent_decode_str(encoded_path).decode_utf8();
    let path = decoded.map_err(|_| format!("{FORM} with a path in UTF-8"))?;
    if path.ends_with('/') || path.len() > PATH_BYTES_MAX {
        return Err(format!(
            "{FORM} with the path of a socket, at most {PATH_BYTES_MAX} bytes"
        ));
    }
    if path.split('/').any(|segment| matches!(segment, "." | "..")) {
        // The client library removes them, and with a symbolic link the rest is another path.
        return Err(format!("{FORM} with a path without the segments . and .."));
    }
    if let [.., letter, b':' | b'|'] = path.as_bytes()
        && letter.is_ascii_alphabetic()
    {
        // The client library takes that for a drive and connects to the path with a trailing slash.
        return Err(format!(
            "{FORM} with a path that does not end like a drive (a letter and a colon)"
        ));
    }
    let login_of_client = encoded_login
        .as_ref()
        .map(|(user, password)| (user.as_str(), password.as_str()));
    let server = ServerUrl::of_socket(&path, encoded_path, login_of_client, database);
    let shown_login = match login {
        Some(("", _)) => "&pass=***".to_owned(),
        Some((user, _)) => format!("&user={user}&pass=***"),
        None => String::new(),
    };
    let shown = format!("{SOCKET}{encoded_path}?db={database}{shown_login}");
    Ok(Endpoint::new(EndpointKind::Redis(server), shown))
}
