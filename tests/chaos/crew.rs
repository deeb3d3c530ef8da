//! The workers of a round.

use std::path::PathBuf;
use std::time::Duration;

use support::Worker;
use support::worker;

use super::scene::Scene;
use super::worker::NAME;

/// Number of concurrent workers. Each works at its own place, with its own network path to the
/// servers.
pub const PLACES: usize = 3;

pub struct Crew {
    history: PathBuf,
    seed: u64,
    members: Vec<Member>,
    /// Number of workers started so far.
    count: usize,
}

pub struct Member {
    pub name: String,
    pub worker: Worker,
}

impl Crew {
    pub fn start(history: PathBuf, seed: u64, scene: &dyn Scene) -> Self {
        let mut crew = Self {
            history,
            seed,
            members: Vec::new(),
            count: 0,
        };
        for place in 0..PLACES {
            let member = crew.spawn(place, scene);
            crew.members.push(member);
        }
        for member in &crew.members {
            assert_eq!(member.worker.line(), "ready");
        }
        crew
    }

    fn spawn(&mut self, place: usize, scene: &dyn Scene) -> Member {
        self.count += 1;
        let name = format!("w{}", self.count);
        let (url, seed) = (
            scene.url(place),
            self.seed.wrapping_mul(100).wrapping_add(self.count as u64),
        );
        let (ttl, longest) = (scene.ttl().as_millis(), scene.longest_ttl().as_millis());
        // With a late renewal, a holder relies on its lease for longer.
        let renew = if self.seed.is_multiple_of(4) { 0.1 } else { 0.4 };
        let vars = [
            ("SHARDLOCK_TEST_PLACE", place.to_string()),
            ("SHARDLOCK_TEST_RENEW", renew.to_string()),
            ("SHARDLOCK_TEST_WHO", name.clone()),
            ("SHARDLOCK_TEST_URL", url),
            ("SHARDLOCK_TEST_SEED", seed.to_string()),
            ("SHARDLOCK_TEST_TTL", ttl.to_string()),
            ("SHARDLOCK_TEST_LONGEST_TTL", longest.to_string()),
            ("SHARDLOCK_TEST_REPLICAS", scene.replicas_acked().to_string()),
            ("SHARDLOCK_TEST_HISTORY", self.history.display().to_string()),
        ];
        let vars: Vec<_> = vars.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let worker = worker::spawn(NAME, &vars);
        Member { name, worker }
    }

    pub fn at(&mut self, place: usize) -> &mut Member {
        &mut self.members[place]
    }

    /// Kills a worker with SIGKILL and starts a new one at its place.
    pub fn replace(&mut self, place: usize, scene: &dyn Scene) {
        self.members[place].worker.kill();
        let member = self.spawn(place, scene);
        assert_eq!(member.worker.line(), "ready");
        self.members[place] = member;
    }

    /// Asks all workers to finish, and returns the names of those that do not finish in time.
    pub fn end(mut self, within: Duration) -> Vec<String> {
        for member in &mut self.members {
            member.worker.send("end");
        }
        let look = Duration::from_millis(50);
        // Count polls instead of measuring time, because time during which the machine is stalled
        // must not count.
        let looks = within.as_millis() / look.as_millis();
        let ended = |member: &Member| {
            let mut said = (0..looks).map(|_| member.worker.line_within(look));
            said.find_map(|line| line).as_deref() == Some("ended")
        };
        let late = self.members.iter().filter(|member| !ended(member));
        late.map(|member| member.name.clone()).collect()
    }
}
