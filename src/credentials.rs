//! The login that servers ask for, if it is not in a shard's URL.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::FutureExt;

use crate::error::InvalidSetting;
use crate::text::printable;

/// The maximum size of a password file. Tokens of cloud providers have a few kilobytes.
const PASSWORD_FILE_BYTES_MAX: u64 = 16 * 1024;

/// A password. `Debug` hides it, and there is no `Display`.
///
/// ```
/// let password = shardlock::config::Password::from("s3cret");
/// assert_eq!(password.expose(), "s3cret");
/// assert_eq!(format!("{password:?}"), "***");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Arc<str>);

impl Password {
    /// Returns the password itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Password {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<String> for Password {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A user and a password, as returned by the callback of [`Builder::credentials`].
///
/// ```
/// use shardlock::config::Credentials;
///
/// // A user of the server's ACL, or of etcd.
/// let user = Credentials::new("worker", "s3cret");
/// // The default user of a Redis server (`requirepass`).
/// let default_user = Credentials::password("s3cret");
/// # assert_ne!(user, default_user);
/// ```
///
/// [`Builder::credentials`]: crate::config::Builder::credentials
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    pub(crate) username: Option<String>,
    pub(crate) password: Password,
}

impl Credentials {
    /// Creates the credentials of a user.
    pub fn new(username: impl Into<String>, password: impl Into<Password>) -> Self {
        Self {
            username: Some(username.into()),
            password: password.into(),
        }
    }

    /// Creates the credentials of the default user of a Redis server. Etcd has no such user.
    pub fn password(password: impl Into<Password>) -> Self {
        Self {
            username: None,
            password: password.into(),
        }
    }
}

/// The connection for which credentials are requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialsRequest {
    pub(crate) shard: Arc<str>,
    pub(crate) address: String,
}

impl CredentialsRequest {
    /// Returns the name of the shard.
    #[must_use]
    pub fn shard(&self) -> &str {
        &self.shard
    }

    /// Returns the address of the server: `host:port`, or the path of a Unix socket.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }
}

type BoxError = Box<dyn Error + Send + Sync>;
type Answer = Pin<Box<dyn Future<Output = Result<Credentials, BoxError>> + Send>>;

/// A callback that returns credentials.
#[derive(Clone)]
pub(crate) struct CredentialsCallback(Arc<dyn Fn(CredentialsRequest) -> Answer + Send + Sync>);

impl CredentialsCallback {
    pub(crate) fn new<F, Fut, E>(callback: F) -> Self
    where
        F: Fn(CredentialsRequest) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Credentials, E>> + Send + 'static,
        E: Into<BoxError>,
    {
        Self(Arc::new(move |request| {
            let answer = callback(request);
            Box::pin(async move { answer.await.map_err(Into::into) })
        }))
    }

    /// Calls the callback. A panic in it must not end the thread that renews leases, so it is an
    /// error like any other.
    ///
    /// # Errors
    ///
    /// What the callback returned, as text.
    pub(crate) async fn call(&self, request: CredentialsRequest) -> Result<Credentials, String> {
        // Called inside of the future, so that a panic before the first await is caught, too.
        let answer = AssertUnwindSafe(async { (self.0)(request).await }).catch_unwind();
        match answer.await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err("it panicked".to_owned()),
        }
    }
}

impl fmt::Debug for CredentialsCallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CredentialsCallback")
    }
}

/// The password in this file.
///
/// # Errors
///
/// The file can't be read or has no password.
pub(crate) fn of_file(path: &Path) -> Result<Password, InvalidSetting> {
    read_password(path).map_err(|problem| {
        let value = format!("{}, which {problem}", shown(path));
        InvalidSetting::new("password_file", value, "a readable file that contains the password")
    })
}

pub(crate) fn shown(path: &Path) -> String {
    printable(&path.display().to_string()).into_owned()
}

/// Reads the file. One line end after the password is not part of it.
///
/// # Errors
///
/// What is wrong with the file, without its contents.
pub(crate) fn read_password(path: &Path) -> Result<Password, String> {
    let unreadable = |error: io::Error| format!("can't be read ({error})");
    // Opening a FIFO would block until somebody writes to it.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(PASSWORD_FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > PASSWORD_FILE_BYTES_MAX {
        return Err(format!("is larger than {PASSWORD_FILE_BYTES_MAX} bytes"));
    }
    let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let password = text.strip_suffix('\r').unwrap_or(text);
    if password.is_empty() {
        return Err("is empty".to_owned());
    }
    if password.contains(['\n', '\r', '\0']) {
        return Err("has more than one line".to_owned());
    }
    Ok(password.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_file_is_read_without_its_line_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        let written = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read_password(&path).map(|password| password.expose().to_owned())
        };
        assert_eq!(written(b"s3cret"), Ok("s3cret".to_owned()));
        assert_eq!(written(b"s3cret\n"), Ok("s3cret".to_owned()));
        assert_eq!(written(b" s3cret \r\n"), Ok(" s3cret ".to_owned()));
        assert_eq!(written(b"").unwrap_err(), "is empty");
        assert_eq!(written(b"\n").unwrap_err(), "is empty");
        assert_eq!(written(b"s3cret\n\n").unwrap_err(), "has more than one line");
        assert_eq!(written(b"\xff").unwrap_err(), "is not UTF-8");
        let most = vec![b'x'; PASSWORD_FILE_BYTES_MAX as usize];
        assert!(written(&most).is_ok());
        assert_eq!(
            written(&[&most[..], b"x"].concat()).unwrap_err(),
            "is larger than 16384 bytes"
        );
        assert_eq!(read_password(dir.path()).unwrap_err(), "is not a regular file");
        std::fs::remove_file(&path).unwrap();
        assert!(read_password(&path).unwrap_err().starts_with("can't be read ("));
    }
}
