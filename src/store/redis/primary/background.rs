//! The connection of the watchdog's thread, and what takes its place while it can't be opened.

use std::sync::Arc;
use std::time::Duration;

use super::link::{Link, Live};
use crate::store::StoreError;

/// A server that takes no further connections (`maxclients`, a changed password, no memory) still serves those that it has. Renewals must not fail
/// then: one of the callers' connections carries them. It is second choice, since it stands still with the program's runtime.
pub(super) struct Background {
    pub(super) own: Arc<Link>,
    pub(super) others: Vec<Arc<Link>>,
}

impl Background {
    /// A connection and its link. Its own gets `patience` to be opened if there is another.
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
            // The server has another map: it keeps our leases no more.
            Some(Err(error @ StoreError::MapMismatch { .. })) => Err(error),
            Some(Err(error)) => {
                let other = open();
                if other.is_some() {
                    tracing::debug!(
                        ?error,
                        "the background's connection can't be opened; one of the requests' takes its place"
                    );
                }
                other.ok_or(error)
            }
            None => match open() {
                Some(other) => Ok(other),
                // It broke meanwhile.
                None => self.own.get().await.map(|live| (Arc::clone(&self.own), live)),
            },
        }
    }
}
