//! Hides passwords in URLs.

use super::split_scheme;

/// Returns the URL, well-formed or not, without its password and anything that could be one.
///
/// In a malformed URL a parser may take the password for a port or a path. This function therefore
/// looks only at the text, and rather hides too much than too little.
pub(crate) fn redact(text: &str) -> String {
    let (scheme, rest) = match split_scheme(text) {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), text),
    };
    let (login, place) = match rest.rsplit_once('@') {
        // The last @ may belong to a path or query, or a / to the password; what is secret can't be
        // known.
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

/// Does the same for the part after the `@`: `host:port/database`. Text in place of the port is
/// hidden, since it may be a password whose `@` was forgotten, unless it is a number after a host.
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
