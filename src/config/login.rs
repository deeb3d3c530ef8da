//! The login that is given beside the URLs of the shards.

use super::{Config, bounds};
use crate::credentials::{Credentials, of_file};
use crate::endpoint::{Endpoint, EndpointKind, with_login};
use crate::error::InvalidSetting;

impl Config {
    /// Checks the login that is given beside the URLs.
    pub(super) fn check_login(&self) -> Result<(), InvalidSetting> {
        if let (Some(_), Some(path)) = (&self.password, &self.password_file) {
            let path = bounds::plain(&path.display().to_string());
            return Err(InvalidSetting::new(
                "password_file",
                path,
                "none if password is set; use only one of them",
            ));
        }
        let Some(name) = self.login_setting() else {
            return Ok(());
        };
        if let (Some(username), None, None) = (&self.username, &self.password, &self.password_file) {
            return Err(InvalidSetting::new(
                "username",
                bounds::echo(username),
                "none, or set together with password or password_file",
            ));
        }
        let needing = self.endpoints_without_login();
        let is_etcd = |endpoint: &Endpoint| matches!(endpoint.kind(), EndpointKind::Etcd { .. });
        if self.username.is_none() && needing.iter().any(is_etcd) {
            return Err(InvalidSetting::new(
                "username",
                "none",
                "set together with the password if a shard is etcd, which has no default user",
            ));
        }
        if self.shards.is_empty() || !needing.is_empty() {
            return Ok(());
        }
        Err(InvalidSetting::new(
            name,
            "set",
            "none unless a shard with servers has a URL without a login",
        ))
    }

    /// The first setting of the login that is set.
    pub(crate) fn login_setting(&self) -> Option<&'static str> {
        let set = [
            ("username", self.username.is_some()),
            ("password", self.password.is_some()),
            ("password_file", self.password_file.is_some()),
        ];
        set.into_iter().find(|(_, is_set)| *is_set).map(|(name, _)| name)
    }

    /// The shards whose servers may need a login that their URLs lack.
    pub(crate) fn endpoints_without_login(&self) -> Vec<Endpoint> {
        let endpoints = self.shards.iter().filter_map(|shard| Endpoint::parse(&shard.url).ok());
        endpoints.filter(Endpoint::lacks_login).collect()
    }

    /// Puts the login of the settings into the URLs that have none, for tools that connect to
    /// servers themselves. A password file is read now.
    ///
    /// # Errors
    ///
    /// The password file can't be used, or a URL gets too long.
    pub(crate) fn put_login_into_urls(&mut self) -> Result<(), InvalidSetting> {
        let password = match (&self.password, &self.password_file) {
            (Some(password), _) => password.clone(),
            (None, Some(path)) => of_file(path)?,
            (None, None) => return Ok(()),
        };
        let credentials = Credentials {
            username: self.username.take(),
            password,
        };
        for shard in &mut self.shards {
            if Endpoint::parse(&shard.url)?.lacks_login() {
                shard.url = with_login(&shard.url, &credentials);
                Endpoint::parse(&shard.url)?;
            }
        }
        (self.password, self.password_file) = (None, None);
        Ok(())
    }
}
