//! The checks of a configuration as a whole.

use super::fields::FIELDS;
use super::{Config, bounds};
use crate::endpoint::{Endpoint, EndpointKind};
use crate::error::InvalidSetting;

impl Config {
    /// Checks every value.
    ///
    /// # Errors
    ///
    /// [`InvalidSetting`] for the first value that is outside its bounds.
    pub fn validate(&self) -> Result<(), InvalidSetting> {
        FIELDS
            .iter()
            .try_for_each(|field| (field.check)(self).map_err(|problem| problem.of(field.name)))?;
        self.check_together()
    }

    /// Checks the settings that depend on one another.
    fn check_together(&self) -> Result<(), InvalidSetting> {
        match (&self.tls_cert, &self.tls_key) {
            (Some(_), None) => {
                return Err(InvalidSetting::new(
                    "tls_key",
                    "none",
                    "the file with the key of tls_cert",
                ));
            }
            (None, Some(_)) => {
                return Err(InvalidSetting::new(
                    "tls_cert",
                    "none",
                    "the file with the certificate of tls_key",
                ));
            }
            _ => {}
        }
        self.check_login()?;
        let endpoints: Vec<Endpoint> = self
            .shards
            .iter()
            .filter_map(|shard| Endpoint::parse(&shard.url).ok())
            .collect();
        let is_redlock = |endpoint: &Endpoint| matches!(endpoint.kind(), EndpointKind::Redlock { .. });
        let has_redlock = endpoints.iter().any(is_redlock);
        for (name, time) in [("ttl", self.ttl), ("min_hold", self.min_hold)] {
            if time > self.redlock_max_ttl && has_redlock {
                let bound = format!("at least the {name} ({time:?}) if a shard is redlock://");
                return Err(InvalidSetting::new(
                    "redlock_max_ttl",
                    format!("{:?}", self.redlock_max_ttl),
                    bound,
                ));
            }
        }
        if endpoints.is_empty() {
            return Ok(());
        }
        // A setting that applies to no shard would promise something that is not done.
        let replicates = |endpoint: &Endpoint| {
            use EndpointKind::{Cluster, Redis, Sentinel};
            matches!(endpoint.kind(), Redis(_) | Sentinel { .. } | Cluster { .. })
        };
        if self.min_replicas_acked > 0 && !endpoints.iter().any(replicates) {
            return Err(InvalidSetting::new(
                "min_replicas_acked",
                self.min_replicas_acked.to_string(),
                "0 unless a shard is redis://, redis+sentinel:// or redis+cluster://, the kinds with replicas",
            ));
        }
        for (name, file) in [
            ("tls_ca", &self.tls_ca),
            ("tls_cert", &self.tls_cert),
            ("tls_key", &self.tls_key),
        ] {
            if let Some(file) = file
                && !endpoints.iter().any(Endpoint::is_encrypted)
            {
                return Err(InvalidSetting::new(
                    name,
                    bounds::plain(&file.display().to_string()),
                    "none unless a shard's URL uses TLS (rediss:// and the like)",
                ));
            }
        }
        Ok(())
    }
}
