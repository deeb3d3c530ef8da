//! Violations that the documentation excludes. Each exclusion has a name and applies only around
//! the faults it is about.

use super::faults::Faults;
use super::{Finding, Terms};

pub(crate) struct Excuse {
    pub(crate) name: &'static str,
    /// The part of the documentation that states it.
    pub(crate) source: &'static str,
    pub(crate) faults: &'static [&'static str],
    pub(crate) violations: &'static [&'static str],
    /// Whether the exclusion also applies if every replica has confirmed every lease.
    also_confirmed: bool,
}

pub(crate) const EXCUSES: &[Excuse] = &[
    Excuse {
        name: "crash-without-persistence",
        source: "docs/guarantees.md, a single primary: without persistence, a crash forgets all leases",
        faults: &["crash-server"],
        violations: &["overlap", "vanished"],
        also_confirmed: true,
    },
    Excuse {
        name: "failover-without-confirmation",
        source: "docs/guarantees.md, a failover and waiting for replicas: a failover can forget a lease that the promoted \
                 replica had not received, unless min_replicas_acked is the number of replicas",
        faults: &["switch-over", "failover", "crash-primary", "hung-primary"],
        violations: &["overlap", "vanished"],
        also_confirmed: false,
    },
    Excuse {
        name: "deleted-by-hand",
        source: "docs/guarantees.md, what is not promised: a holder whose lease was deleted learns of it at its next \
                 renewal; docs/linger.md: tokens until then are smaller than later ones of others",
        faults: &["delete-lease", "flush-all"],
        violations: &["overlap", "vanished", "token-order"],
        also_confirmed: true,
    },
    Excuse {
        name: "server-clock-jump",
        source: "docs/guarantees.md, what is not promised and tokens across a failover: the server decides on the end of a \
                 lease by its own clock; tokens grow on servers whose clocks agree",
        faults: &["clock-jump"],
        violations: &["overlap", "vanished", "token-order"],
        also_confirmed: true,
    },
];

impl Excuse {
    pub(crate) fn of(finding: &Finding, faults: &Faults, terms: Terms) -> Option<&'static Self> {
        EXCUSES.iter().find(|excuse| {
            let applies =
                excuse.violations.contains(&finding.violation) && (excuse.also_confirmed || !terms.is_confirmed);
            // A holder relies on a forgotten lease until it would have expired.
            applies
                && faults.iter().any(|fault| {
                    let last = fault.over.saturating_add(terms.ttl);
                    excuse.faults.contains(&fault.name.as_str()) && fault.begun < finding.at && finding.at < last
                })
        })
    }
}
