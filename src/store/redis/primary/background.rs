//! The connection of the background thread, and its substitute while it can't be opened.

use std::sync::Arc;
use std::time::Duration;

use super::link::{Link, Live};
use crate::store::StoreError;

/// A server that accepts no more connections (`maxclients`, a changed password, no memory) still
/// serves the existing ones. Renewals must not fail then, so one of the request connections carries
/// them. It is the second choice because it is blocked whenever the application's runtime is.
pub(super) struct BackgroundLinks {
    pub(super) own: Arc<Link>,
    pub(super) others: Vec<Arc<Link>>,
}

impl BackgroundLinks {
    /// Returns a connection and its link. If a request connection is open, the background's own
    /// connection is given only `patience` to open.
    pub(super) async fn get(&self, patience: Duration) -> Result<(Arc<Link>, Live), StoreError> {
        if let Some(live) = self.own.live() {
            return Ok((Arc::clone(&self.own), live));
        }
        let open = || {
            self.others
                .iter()
                .find_map(|link| Some((Arc::clone(link), link.live()?)))
        };
        let own = self.own.get();
        let opened = match open() {
            Some(_) => tokio::time::timeout(patience, own).await.ok(),
            None => Some(own.await),
        };
        match opened {
            Some(Ok(live)) => Ok((Arc::clone(&self.own), live)),
            // The server has another map, so it no longer keeps our leases.
            Some(Err(error @ StoreError::MapMismatch { .. })) => Err(error),
            Some(Err(error)) => {
                let other = open();
                if other.is_some() {
                    crate::log::debug!(
                        ?error,
                        "failed to open the background connection; using a request connection instead"
                    );
                }
                other.ok_or(error)
            }
            None => match open() {
                Some(other) => Ok(other),
                // The other connection broke meanwhile.
                None => self.own.get().await.map(|live| (Arc::clone(&self.own), live)),
            },
        }
    }
}
