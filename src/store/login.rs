//! The login of a connection, if the shard's URL has none: from the settings, from a file that is
//! read at each connect, or from a callback of the program.

use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
use crate::credentials::{Credentials, CredentialsCallback, CredentialsRequest, of_file, read_password, shown};
use crate::error::InvalidSetting;
use crate::text::printable;
use crate::time_limit::within;

/// Where the credentials of a shard's connections come from. The default is nowhere: those of the
/// URL, if it has any, are used.
#[derive(Debug, Clone, Default)]
pub(crate) struct Login {
    source: LoginSource,
    shard: Arc<str>,
    /// The time limit for the callback.
    limit: Duration,
}

/// See [`Login`].
#[derive(Debug, Clone, Default)]
pub(crate) enum LoginSource {
    #[default]
    Url,
    Settings(Credentials),
    File {
        username: Option<String>,
        path: PathBuf,
    },
    Callback(CredentialsCallback),
}

impl Login {
    pub(crate) fn new(source: LoginSource, shard: &str, limit: Duration) -> Self {
        Self {
            source,
            shard: shard.into(),
            limit,
        }
    }

    /// Whether the next connection may get other credentials than the last.
    #[cfg_attr(not(feature = "etcd"), allow(dead_code))]
    pub(crate) const fn can_change(&self) -> bool {
        matches!(self.source, LoginSource::File { .. } | LoginSource::Callback(_))
    }

    /// Checks what can be checked without a connection.
    ///
    /// # Errors
    ///
    /// The file can't be read or has no password.
    pub(crate) fn check(&self) -> Result<(), InvalidSetting> {
        match &self.source {
            LoginSource::File { path, .. } => of_file(path).map(drop),
            _ => Ok(()),
        }
    }

    /// The credentials for a new connection to the server at this address. `None` stands for those
    /// of the URL.
    ///
    /// # Errors
    ///
    /// Why there are none now. Counts as unavailable: a file may be about to be replaced, and a
    /// callback may depend on another service.
    pub(crate) async fn credentials(&self, address: &str) -> io::Result<Option<Credentials>> {
        match &self.source {
            LoginSource::Url => Ok(None),
            LoginSource::Settings(credentials) => Ok(Some(credentials.clone())),
            LoginSource::File { username, path } => {
                let failed = |problem| io::Error::other(format!("password_file {} {problem}", shown(path)));
                let password = read_password(path).map_err(failed)?;
                Ok(Some(Credentials {
                    username: username.clone(),
                    password,
                }))
            }
            LoginSource::Callback(callback) => {
                let request = CredentialsRequest {
                    shard: Arc::clone(&self.shard),
                    address: address.to_owned(),
                };
                let asking = within(Moment::now(), self.limit, pin!(callback.call(request))).await;
                let problem = match asking {
                    Ok(Ok(credentials)) => return Ok(Some(credentials)),
                    Ok(Err(problem)) => format!("the credentials callback failed: {problem}"),
                    Err(_) => format!(
                        "the credentials callback gave no answer within half of store_timeout ({:?})",
                        self.limit
                    ),
                };
                Err(io::Error::other(printable(&problem).into_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(source: LoginSource) -> Login {
        Login {
            source,
            shard: "a".into(),
            limit: Duration::from_millis(20),
        }
    }

    fn callback<F>(callback: impl Fn(CredentialsRequest) -> F + Send + Sync + 'static) -> Login
    where
        F: Future<Output = Result<Credentials, String>> + Send + 'static,
    {
        login(LoginSource::Callback(CredentialsCallback::new(callback)))
    }

    #[test]
    fn missing_file_is_an_invalid_setting_that_names_it() {
        let source = LoginSource::File {
            username: None,
            path: "/nowhere/password".into(),
        };
        let error = login(source).check().unwrap_err();
        assert_eq!(error.field, "password_file");
        assert!(
            error.value.starts_with("/nowhere/password, which can't be read ("),
            "{error}"
        );
    }

    #[tokio::test]
    async fn callback_receives_the_shard_and_the_address() {
        let echo =
            callback(async |request: CredentialsRequest| Ok(Credentials::new(request.shard(), request.address())));
        let credentials = echo.credentials("h:1").await.unwrap();
        assert_eq!(credentials, Some(Credentials::new("a", "h:1")));
        assert!(login(LoginSource::Url).credentials("h:1").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn callback_that_fails_panics_or_hangs_is_an_error() {
        let message = async |login: Login| login.credentials("h:1").await.unwrap_err().to_string();
        let failed = callback(async |_| Err("the vault\x1b is sealed".to_owned()));
        assert_eq!(
            message(failed).await,
            r"the credentials callback failed: the vault\u{1b} is sealed"
        );
        let late = callback(async |_| panic!("in the future"));
        assert_eq!(message(late).await, "the credentials callback failed: it panicked");
        fn panics() -> std::future::Ready<Result<Credentials, String>> {
            panic!("before the future")
        }
        let early = callback(|_| panics());
        assert_eq!(message(early).await, "the credentials callback failed: it panicked");
        let hung = callback(async |_| std::future::pending().await);
        assert!(
            message(hung)
                .await
                .contains("no answer within half of store_timeout (20ms)")
        );
    }
}
