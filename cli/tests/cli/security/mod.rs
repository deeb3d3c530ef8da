//! TLS connections, users with few permissions, and passwords that stay secret.

mod acl;
mod needs;
mod recorder;
pub(crate) mod secrets;
pub(crate) mod tls;
