//! The meaning of etcd's errors.

use std::error::Error as _;

use etcd_client::Error;

use crate::store::StoreError;

/// Why a request to etcd failed.
#[derive(Debug, Clone)]
pub(super) enum EtcdError {
    /// The etcd lease of the request does not exist, or no longer exists.
    LeaseGone,
    /// The etcd lease that was to be created already exists.
    LeaseThere,
    Other(StoreError),
}

impl From<StoreError> for EtcdError {
    fn from(error: StoreError) -> Self {
        Self::Other(error)
    }
}

impl EtcdError {
    /// For a request that does not handle errors of its lease.
    pub(super) fn into_store_error(self) -> StoreError {
        match self {
            Self::LeaseGone => {
                StoreError::Unavailable("etcd ended this cycle's lease during the request; try again".into())
            }
            Self::LeaseThere => StoreError::Unavailable("etcd already has a lease with this id; try again".into()),
            Self::Other(error) => error,
        }
    }

    /// Whether another server, or the same one a little later, may answer differently.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Other(StoreError::Unavailable(_)))
    }
}

/// The client library's message for a keep-alive that finds no lease.
pub(super) const LEASE_NOT_FOUND: &str = "lease not found";

/// The numbers of gRPC's status codes.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const UNIMPLEMENTED: i32 = 12;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// The meaning of a client library error for a store with this namespace.
pub(super) fn classify(error: &Error, namespace: &str) -> EtcdError {
    match explain(error, namespace) {
        EtcdError::Other(explained) => EtcdError::Other(explained.caused_by(error)),
        of_lease => of_lease,
    }
}

fn explain(error: &Error, namespace: &str) -> EtcdError {
    let refused = |reason: String| EtcdError::Other(StoreError::Refused(reason.into()));
    let description = describe(error);
    let status = match error {
        Error::GRpcStatus(status) => status,
        Error::LeaseKeepAliveError(reason) if reason == LEASE_NOT_FOUND => return EtcdError::LeaseGone,
        Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => return refused(description),
        _ => return EtcdError::Other(StoreError::Unavailable(description.into())),
    };
    let message = status.message();
    match i32::from(status.code()) {
        code::NOT_FOUND if message.contains("lease not found") => EtcdError::LeaseGone,
        code::FAILED_PRECONDITION if message.contains("lease already exists") => EtcdError::LeaseThere,
        code::FAILED_PRECONDITION if message.contains("authentication is not enabled") => {
            refused(format!("{description}; leave the user and the password out"))
        }
        code::PERMISSION_DENIED => refused(with_needs(&description, namespace)),
        code::INVALID_ARGUMENT if message.contains("user name is empty") => refused(format!(
            "{description}; name a user and its password: etcd://USER:PASSWORD@HOST, or username and password"
        )),
        code::INVALID_ARGUMENT if message.contains("authentication failed") => {
            refused(format!("{description}; check the user and the password"))
        }
        // Another request with a newer token follows.
        code::INVALID_ARGUMENT if message.contains("revision of auth store is old") => {
            EtcdError::Other(StoreError::Unavailable(description.into()))
        }
        code::RESOURCE_EXHAUSTED if message.contains("space exceeded") => refused(format!(
            "{description}; compact and defragment etcd, raise its quota, then `etcdctl alarm disarm`"
        )),
        code::INVALID_ARGUMENT | code::UNIMPLEMENTED | code::UNAUTHENTICATED => refused(description),
        _ => EtcdError::Other(StoreError::Unavailable(description.into())),
    }
}

/// Whether the user, its password or its token is not accepted.
pub(super) fn is_of_login(error: &Error) -> bool {
    let Error::GRpcStatus(status) = error else {
        return false;
    };
    match i32::from(status.code()) {
        code::INVALID_ARGUMENT => status.message().contains("authentication failed"),
        code::UNAUTHENTICATED => true,
        _ => false,
    }
}

/// Why a watch was refused, if the user lacks a permission. Etcd reports that only as text.
pub(super) fn missing_permission(reason: &str, namespace: &str) -> Option<String> {
    reason
        .contains("permission denied")
        .then(|| with_needs(reason, namespace))
}

fn with_needs(refusal: &str, namespace: &str) -> String {
    format!(
        "{refusal}; the user needs readwrite on all keys that begin with {namespace:?}: \
         `etcdctl role grant-permission ROLE --prefix=true readwrite {namespace}`"
    )
}

/// The error and its causes.
fn describe(error: &Error) -> String {
    let mut description = match error {
        Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    let mut source = match error {
        Error::GRpcStatus(status) => status.source(),
        Error::TransportError(error) => error.source(),
        _ => None,
    };
    while let Some(cause) = source {
        let cause_words = cause.to_string();
        if !description.contains(&cause_words) {
            description = format!("{description}: {cause_words}");
        }
        source = cause.source();
    }
    description
}
