//! Properties that must hold for any data from a primary and its sentinels. See [`crate::fuzzing`].

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::Duration;

use deadpool_redis::redis::IntoConnectionInfo;

use super::sentinels::Sentinels;
use super::vote::VoteEligibility;
use crate::clock::Moment;
use crate::endpoint::{Endpoint, EndpointKind};
use crate::store::TlsFiles;

/// A sentinel's message about a switch, and `INFO server`, which decides whether a quorum node may
/// vote.
pub(in crate::store::redis) fn places(text: &str) {
    let endpoint = Endpoint::parse("redis+sentinel://u:p@a/m/3").unwrap();
    let EndpointKind::Sentinel {
        sentinels,
        primary,
        access,
    } = endpoint.kind().clone()
    else {
        panic!("{endpoint} is not watched by sentinels")
    };
    let sentinels = Sentinels::new(
        sentinels,
        primary,
        access.clone(),
        TlsFiles::default(),
        Duration::from_secs(1),
    );
    if let Some(place) = sentinels.switched(text) {
        assert!(text.starts_with("m "));
        let info = access.url(&place).with_password().into_connection_info();
        // A host that the client library rejects, such as a wildcard address, is detected when
        // connecting.
        if let Ok(info) = info {
            assert_eq!(info.addr().to_string(), place.replace(['[', ']'], ""));
            assert_eq!(info.redis_settings().username(), Some("u"));
            assert_eq!(info.redis_settings().password(), Some("p"));
            assert_eq!(info.redis_settings().db(), 3);
        }
    }
    let vote = VoteEligibility::new(Duration::from_secs(10));
    let asked_at = Moment::from_nanos(1_000_000_000);
    match vote.learn(asked_at, Some(text)) {
        Ok(()) => assert!(text.contains("uptime_in_seconds:")),
        Err(_) => assert!(!vote.has_vote()),
    }
}
