//! The permissions that an ACL user needs on each kind of shard. The rules of `config/acl.conf`,
//! those that `shardlock doctor` requires, and the commands that the library sends agree.

use std::collections::BTreeSet;

use serde_json::Value;
use shardlock::LockManager;
use shardlock::config::Builder;
use shardlock::introspect::Slot;
use support::sentinel::Watched;
use support::{Cluster, PATIENCE, Quorum, RedisServer};
use support_locks::{Kind, STORE_TIMEOUT, Servers, lock, soon, until};

use super::acl::{PASSWORD, USER, additions, rules, set_user, whole_range_of};
use crate::tool::{bare, run};

/// Shards of one kind. All of their servers know the user.
struct Subject<'a> {
    kind: Kind,
    servers: &'a dyn Servers,
    /// All servers, including those that accept no writes now.
    all: Vec<&'a RedisServer>,
    settings: &'static [&'static str],
}

impl Subject<'_> {
    fn url(&self) -> String {
        let url = self.servers.urls(0).remove(0);
        url.replacen("://", &format!("://{USER}:{PASSWORD}@"), 1)
    }

    /// A manager that logs in as the user.
    fn builder(&self) -> Builder {
        let builder = self.kind.settings(LockManager::builder().shard(self.url()));
        match self.settings {
            [] => builder,
            _ => builder.min_replicas_acked(1),
        }
    }

    fn permit(&self, rules: &BTreeSet<String>) {
        let login = ["on".to_owned(), format!(">{PASSWORD}")];
        let all: Vec<String> = login.into_iter().chain(rules.iter().cloned()).collect();
        for server in &self.all {
            set_user(server, &all);
        }
    }

    /// The rules that the doctor reports as missing.
    fn asked_for(&self) -> BTreeSet<String> {
        let mut command = bare(&["doctor", "--json"]);
        command.env("SHARDLOCK_SHARDS", self.url());
        for setting in self.settings {
            command.args(["--set", setting]);
        }
        let ended = run(command);
        let said: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
        let servers = said["shards"][0]["servers"].as_array().expect("servers").iter();
        let findings = servers.flat_map(|server| server["findings"].as_array().expect("findings"));
        let words = |finding: &Value| finding["fix"].as_str().unwrap_or_default().to_owned();
        findings
            .filter(|finding| finding["check"] == "acl")
            .map(words)
            .flat_map(|fix| fix.split(' ').map(str::to_owned).collect::<Vec<_>>())
            .filter(|word| word.starts_with(['+', '~', '&']))
            .collect()
    }

    /// The commands executed since the last reset of the statistics, as rules.
    fn sent(&self) -> BTreeSet<String> {
        let commands = self.all.iter().flat_map(|server| server.commands().into_keys());
        // `INFO` is a single rule. The file lists the other commands by their subcommands.
        commands.map(|command| format!("+{command}")).collect()
    }

    /// Denied commands, except those that do not matter according to the file.
    fn denied(&self) -> Vec<String> {
        let logs = self
            .all
            .iter()
            .flat_map(|server| server.query::<Vec<redis::Value>>(&["ACL", "LOG"]));
        let entries = logs.map(|entry| format!("{entry:?}"));
        entries.filter(|entry| !entry.contains("client|set")).collect()
    }

    /// Checks that all three agree. `added` are the rules that the file lists for this kind, and
    /// `never` those that only other kinds need. `unseen` are commands that this test does not
    /// trigger.
    async fn agrees(&self, added: &[&str], never: &[&str], unseen: &[&str]) {
        let as_set = |rules: &[&str]| -> BTreeSet<String> { rules.iter().map(|&rule| rule.to_owned()).collect() };
        let is_in_file = |rule: &&str| additions().iter().flatten().any(|added| added == rule);
        assert_eq!(added.iter().find(|rule| !is_in_file(rule)), None, "not in the file");
        let is_rule = |rule: &String| rule.starts_with(['+', '~', '&']);
        let base: BTreeSet<String> = rules().into_iter().filter(is_rule).collect();
        let needed: BTreeSet<String> = base.union(&as_set(added)).cloned().collect();
        let needed: BTreeSet<String> = needed.difference(&as_set(never)).cloned().collect();

        let (commands, patterns): (BTreeSet<String>, BTreeSet<String>) =
            needed.iter().cloned().partition(|rule| rule.starts_with('+'));

        // Both by trying and by asking the server. The server checks keys and channels only if the
        // user may run the command.
        for rehearsal in [&[][..], &["+acl|dryrun", "+acl|whoami"]] {
            let rehearsal = as_set(rehearsal);
            self.permit(&rehearsal);
            assert_eq!(self.asked_for(), commands, "{:?} {rehearsal:?}", self.kind);
            self.permit(&commands.union(&rehearsal).cloned().collect());
            assert_eq!(self.asked_for(), patterns, "{:?} {rehearsal:?}", self.kind);
        }
        // With everything that is needed, nothing is reported.
        self.permit(&needed);
        assert_eq!(self.asked_for(), BTreeSet::new());

        for server in &self.all {
            server.command(&["ACL", "LOG", "RESET"]);
            server.reset_stats();
        }
        let errors = soon(
            "the whole range",
            whole_range_of(|| self.builder(), self.servers, "lock:"),
        )
        .await;
        assert_eq!(errors.all(), [""; 0]);
        assert_eq!(self.denied(), [""; 0]);
        let sent = self.sent();
        let commands = commands.iter().filter(|rule| !unseen.contains(&rule.as_str()));
        let idle: Vec<_> = commands.filter(|rule| !sent.contains(*rule)).collect();
        assert_eq!(
            idle, [""; 0],
            "these commands were not sent by {:?}: {sent:?}",
            self.kind
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_agree_on_a_single_server() {
    let server = RedisServer::start();
    let subject = Subject {
        kind: Kind::Redis,
        servers: &server,
        all: vec![&server],
        settings: &[],
    };
    subject.agrees(&[], &[], &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_agree_behind_sentinels_with_confirming_replicas() {
    let watched = Watched::start(1);
    // A busy machine must not cause a failover.
    watched.consider_down_after(PATIENCE);
    let subject = Subject {
        kind: Kind::Sentinel,
        servers: &watched,
        all: watched.servers().iter().collect(),
        settings: &["min_replicas_acked=1"],
    };
    subject.agrees(&["+wait"], &[], &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_agree_on_nodes_of_a_quorum() {
    let nodes = Quorum::start(3);
    let subject = Subject {
        kind: Kind::Redlock,
        servers: &nodes,
        all: nodes.nodes().iter().collect(),
        settings: &[],
    };
    subject.agrees(&["+info", "+ping", "+script|load"], &[], &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_agree_on_nodes_of_a_cluster() {
    let cluster = Cluster::start(3, 0);
    let subject = Subject {
        kind: Kind::Cluster,
        servers: &cluster,
        all: cluster.nodes().iter().collect(),
        settings: &[],
    };
    let added = [
        "+cluster|slots",
        "+asking",
        "+spublish",
        "+ssubscribe",
        "+sunsubscribe",
        "+pubsub|shardnumsub",
    ];
    // In a cluster, inboxes are sharded channels, and the owner of a slot is always a primary.
    let of_others = ["+publish", "+pubsub|numsub", "+subscribe", "+role"];
    // ASKING is only sent during a slot migration and INCRBY only in a busy slot, see below, and
    // SUNSUBSCRIBE only after a minute without waiters.
    let unseen = ["+asking", "+incrby", "+sunsubscribe"];
    subject.agrees(&added, &of_others, &unseen).await;

    let slot = Slot::of(b"lock:moving").number();
    let from = cluster.owner(slot);
    let to = (from + 1) % cluster.nodes().len();
    let builder = subject.builder().store_timeout(STORE_TIMEOUT);
    let locks = builder.connect().await.expect("connect");
    until("the counter of a slot is used again", async || {
        for _ in 0..2 {
            lock(&locks, "busy").await.release().await.expect("release");
        }
        subject.sent().contains("+incrby")
    })
    .await;
    cluster.begin_migration(slot, from, to);
    // Commands with several keys are not served until the slot has migrated.
    locks.inspect("moving").await.expect("inspect");
    cluster.finish_migration(slot, from, to);
    assert!(subject.sent().contains("+asking"));
    assert_eq!(subject.denied(), [""; 0]);
}
