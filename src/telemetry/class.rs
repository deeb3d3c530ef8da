//! Metrics by class and mode: outcomes of lock requests, waits and holds.
//!
//! The classes of exclusive locks exist from the start. Those of shared locks and permits are
//! created when the first one is requested: most processes use neither, and a class has dozens of
//! series.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;

use super::recorder::{Counter, Histogram, counter, histogram};

use super::stripes::Counts;
use super::table::{ACQUISITIONS, HOLD, WAIT};
use super::tally::{Flushed, Thinning};
use crate::engine::Path;
use crate::error::{LockError, LockErrorKind};
use crate::mode::LockMode;

/// The class that counts all classes beyond `max_classes`.
pub(super) const OTHER_CLASS: &str = "other";

/// The numbers of the default class and of the class that counts all others. Further classes are
/// numbered in the order in which they first occur.
pub(crate) const DEFAULT_CLASS: u16 = 0;
pub(super) const OTHER_CLASS_NUMBER: u16 = 1;

/// The outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestOutcome {
    Acquired(Path),
    Busy,
    Timeout,
    QueueFull,
    Unavailable,
    Refused,
    Closed,
    Cancelled,
}

impl RequestOutcome {
    /// The index in [`ALL`](Self::ALL).
    const fn index(self) -> usize {
        match self {
            Self::Acquired(Path::Uncontended) => 0,
            Self::Acquired(Path::LocalHandOff) => 1,
            Self::Acquired(Path::RemoteGrant) => 2,
            Self::Acquired(Path::Lingering) => 3,
            Self::Acquired(Path::Joined) => 4,
            Self::Busy => 5,
            Self::Timeout => 6,
            Self::QueueFull => 7,
            Self::Unavailable => 8,
            Self::Refused => 9,
            Self::Closed => 10,
            Self::Cancelled => 11,
        }
    }

    const ALL: [Self; 12] = [
        Self::Acquired(Path::Uncontended),
        Self::Acquired(Path::LocalHandOff),
        Self::Acquired(Path::RemoteGrant),
        Self::Acquired(Path::Lingering),
        Self::Acquired(Path::Joined),
        Self::Busy,
        Self::Timeout,
        Self::QueueFull,
        Self::Unavailable,
        Self::Refused,
        Self::Closed,
        Self::Cancelled,
    ];

    pub(crate) fn of(error: &LockError) -> Self {
        match error.kind() {
            LockErrorKind::Timeout => Self::Timeout,
            LockErrorKind::QueueFull
            | LockErrorKind::TooManyWaiters
            | LockErrorKind::TooManyKeys
            | LockErrorKind::TooManyLeases => Self::QueueFull,
            LockErrorKind::Unavailable | LockErrorKind::ShardDown => Self::Unavailable,
            LockErrorKind::Closed => Self::Closed,
            LockErrorKind::Invalid
            | LockErrorKind::Unsupported
            | LockErrorKind::Refused
            | LockErrorKind::ShardMapMismatch
            | LockErrorKind::Lost
            | LockErrorKind::TokenRegression => Self::Refused,
        }
    }

    /// Whether a request in this mode can end like this.
    const fn is_possible_in(self, mode: LockMode) -> bool {
        !matches!(self, Self::Acquired(Path::Joined)) || matches!(mode, LockMode::Shared)
    }

    const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Acquired(Path::Uncontended) => ("acquired", "uncontended"),
            Self::Acquired(Path::LocalHandOff) => ("acquired", "local"),
            Self::Acquired(Path::RemoteGrant) => ("acquired", "remote"),
            Self::Acquired(Path::Lingering) => ("acquired", "lingering"),
            Self::Acquired(Path::Joined) => ("acquired", "joined"),
            Self::Busy => ("busy", "none"),
            Self::Timeout => ("timeout", "none"),
            Self::QueueFull => ("queue_full", "none"),
            Self::Unavailable => ("unavailable", "none"),
            Self::Refused => ("refused", "none"),
            Self::Closed => ("closed", "none"),
            Self::Cancelled => ("cancelled", "none"),
        }
    }
}

/// The metrics of one class of locks in one kind of mode.
#[derive(Debug)]
pub(crate) struct ClassMetrics {
    number: u16,
    endings: Counts<{ RequestOutcome::ALL.len() }>,
    flushed: [Flushed; RequestOutcome::ALL.len()],
    /// Samples the acquired locks for the recorder.
    thinning: Thinning,
    wait: Histogram,
    hold: Histogram,
}

impl ClassMetrics {
    fn new(class: &str, number: u16, mode: LockMode) -> Self {
        let class = || class.to_owned();
        let counter_of = |ending: RequestOutcome| {
            if !ending.is_possible_in(mode) {
                return Counter::noop();
            }
            let (outcome, path) = ending.labels();
            counter!(ACQUISITIONS, "class" => class(), "mode" => mode.as_str(), "outcome" => outcome, "path" => path)
        };
        Self {
            number,
            endings: Counts::default(),
            flushed: RequestOutcome::ALL.map(|ending| Flushed::new(counter_of(ending))),
            thinning: Thinning::default(),
            wait: histogram!(WAIT, "class" => class(), "mode" => mode.as_str()),
            hold: histogram!(HOLD, "class" => class(), "mode" => mode.as_str()),
        }
    }

    /// Stands for the class where its name would take too much space.
    pub(crate) const fn number(&self) -> u16 {
        self.number
    }

    pub(crate) fn ended(&self, ending: RequestOutcome) {
        self.endings.add(ending.index());
    }

    /// A lock was acquired. Returns whether its durations are in the sample for the recorder.
    pub(crate) fn acquired(&self, path: Path, waited: Duration) -> bool {
        let number = self.endings.add(RequestOutcome::Acquired(path).index());
        let is_in_sample = self.thinning.takes(number);
        self.wait.record_sampled(|| waited.as_secs_f64(), is_in_sample);
        is_in_sample
    }

    pub(crate) fn held(&self, time: Duration, is_in_sample: bool) {
        self.hold.record_sampled(|| time.as_secs_f64(), is_in_sample);
    }

    fn flush(&self) {
        for (flushed, count) in self.flushed.iter().zip(self.endings.all()) {
            flushed.flush(count);
        }
    }

    fn adjust(&self, elapsed: Duration) {
        let acquired = RequestOutcome::ALL.iter().zip(self.endings.all());
        let acquired = acquired.filter(|(ending, _)| matches!(ending, RequestOutcome::Acquired(_)));
        self.thinning.adjust(acquired.map(|(_, count)| count).sum(), elapsed);
    }
}

/// The classes of a manager. All classes beyond the limit share one.
#[derive(Debug)]
pub(crate) struct Classes {
    exclusive: ClassesOfMode,
    shared: OnceLock<ClassesOfMode>,
    permits: OnceLock<ClassesOfMode>,
    /// The names of the known classes, of any mode. At most `max`.
    names: Mutex<Vec<Arc<str>>>,
    max: usize,
    default_name: Arc<str>,
}

/// The classes of locks in one kind of mode.
#[derive(Debug)]
struct ClassesOfMode {
    mode: LockMode,
    default: Arc<ClassMetrics>,
    other: Arc<ClassMetrics>,
    known: DashMap<String, Arc<ClassMetrics>>,
}

impl ClassesOfMode {
    fn new(default: &str, mode: LockMode) -> Self {
        let default_class = Arc::new(ClassMetrics::new(default, DEFAULT_CLASS, mode));
        let other = if default == OTHER_CLASS {
            Arc::clone(&default_class)
        } else {
            Arc::new(ClassMetrics::new(OTHER_CLASS, OTHER_CLASS_NUMBER, mode))
        };
        Self {
            mode,
            default: default_class,
            other,
            known: DashMap::new(),
        }
    }

    fn each(&self, act: impl Fn(&ClassMetrics)) {
        act(&self.default);
        if !Arc::ptr_eq(&self.default, &self.other) {
            act(&self.other);
        }
        // Copy first: the recorder is foreign code and must not be called while part of the map is
        // locked.
        let known: Vec<Arc<ClassMetrics>> = self.known.iter().map(|class| Arc::clone(&class)).collect();
        known.iter().for_each(|class| act(class));
    }
}

impl Classes {
    pub(crate) fn new(default: &str, max: usize) -> Self {
        Self {
            exclusive: ClassesOfMode::new(default, LockMode::Exclusive),
            shared: OnceLock::new(),
            permits: OnceLock::new(),
            names: Mutex::default(),
            max,
            default_name: default.into(),
        }
    }

    /// The metrics of requests without a class.
    #[inline]
    pub(crate) fn default_class(&self, mode: LockMode) -> &ClassMetrics {
        &self.of(mode).default
    }

    #[inline]
    fn of(&self, mode: LockMode) -> &ClassesOfMode {
        let classes = match mode {
            LockMode::Exclusive => return &self.exclusive,
            LockMode::Shared => &self.shared,
            LockMode::Permits { .. } => &self.permits,
        };
        classes.get().unwrap_or_else(|| self.create(classes, mode))
    }

    #[cold]
    fn create<'a>(&self, classes: &'a OnceLock<ClassesOfMode>, mode: LockMode) -> &'a ClassesOfMode {
        // Created before the cell is locked, because this calls the recorder. If another task was
        // faster, its metrics are used.
        let made = ClassesOfMode::new(&self.default_name, mode);
        classes.get_or_init(|| made)
    }

    /// Flushes new values to the recorder.
    pub(crate) fn flush(&self) {
        self.each(ClassMetrics::flush);
    }

    /// Adjusts the sampling of durations to the rate during `elapsed`.
    pub(crate) fn adjust(&self, elapsed: Duration) {
        self.each(|class| class.adjust(elapsed));
    }

    fn each(&self, act: impl Fn(&ClassMetrics)) {
        let others = [&self.shared, &self.permits].into_iter().filter_map(OnceLock::get);
        [&self.exclusive]
            .into_iter()
            .chain(others)
            .for_each(|classes| classes.each(&act));
    }

    /// Returns `None` for the default class, whose metrics every shard has. Creates them if they do
    /// not exist yet.
    pub(crate) fn get(&self, class: Option<&str>, mode: LockMode) -> Option<Arc<ClassMetrics>> {
        let classes = self.of(mode);
        let class = class.filter(|&class| class != &*self.default_name)?;
        if let Some(known) = classes.known.get(class) {
            return Some(Arc::clone(&known));
        }
        let Some(number) = self.number(class) else {
            return Some(Arc::clone(&classes.other));
        };
        // Created before the map is locked, because this calls the recorder. If another task was
        // faster, its metrics are used.
        let made = Arc::new(ClassMetrics::new(class, number, classes.mode));
        let entry = classes.known.entry(class.to_owned()).or_insert(made);
        Some(Arc::clone(&entry))
    }

    /// The number of a class that is neither the default nor known yet, unless it must count as
    /// another one.
    fn number(&self, class: &str) -> Option<u16> {
        if class == OTHER_CLASS {
            return None;
        }
        let mut names = self.names.lock();
        let index = names.iter().position(|known| **known == *class).or_else(|| {
            let is_new = names.len() < self.max;
            is_new.then(|| {
                names.push(class.into());
                names.len() - 1
            })
        });
        u16::try_from(index? + usize::from(OTHER_CLASS_NUMBER) + 1).ok()
    }

    /// The names of all classes that have occurred. The index of each is its number.
    pub(crate) fn names(&self) -> Vec<Arc<str>> {
        let mut names = vec![Arc::clone(&self.default_name), OTHER_CLASS.into()];
        names.extend_from_slice(&self.names.lock());
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_has_its_index() {
        for (place, ending) in RequestOutcome::ALL.into_iter().enumerate() {
            assert_eq!(ending.index(), place, "{ending:?}");
        }
    }

    #[test]
    fn classes_beyond_the_limit_are_counted_together() {
        let classes = Classes::new("default", 2);
        let get = |class: &str| classes.get(Some(class), LockMode::Exclusive);
        assert!(classes.get(None, LockMode::Exclusive).is_none() && get("default").is_none());
        let first = get("a").unwrap();
        get("b").unwrap();
        let other = &classes.exclusive.other;
        for number in 0..1000 {
            let beyond = get(&format!("c{number}")).unwrap();
            assert!(Arc::ptr_eq(&beyond, other));
        }
        assert!(Arc::ptr_eq(&first, &get("a").unwrap()));
        assert_eq!(classes.exclusive.known.len(), 2);
        assert_eq!(
            classes.names().iter().map(|name| &**name).collect::<Vec<_>>(),
            ["default", "other", "a", "b"]
        );
        assert_eq!(
            [first.number(), other.number(), classes.exclusive.default.number()],
            [2, 1, 0]
        );
    }

    #[test]
    fn class_has_the_same_number_in_every_mode_and_counts_apart() {
        let classes = Classes::new("default", 1);
        let of_each = LockMode::ONE_OF_EACH.map(|mode| classes.get(Some("a"), mode).unwrap());
        assert!(of_each.iter().all(|class| class.number() == 2));
        of_each[LockMode::Shared.kind()].ended(RequestOutcome::Busy);
        let counts = of_each.map(|class| class.endings.all().iter().sum::<u64>());
        assert_eq!(counts, [0, 1, 0]);
        for mode in LockMode::ONE_OF_EACH {
            let beyond = classes.get(Some("b"), mode).unwrap();
            assert_eq!(beyond.number(), OTHER_CLASS_NUMBER, "{mode}");
        }
    }

    #[test]
    fn modes_that_nobody_uses_have_no_metrics() {
        let classes = Classes::new("default", 1);
        classes.get(Some("a"), LockMode::Exclusive).unwrap();
        assert!(classes.shared.get().is_none() && classes.permits.get().is_none());
        classes.default_class(LockMode::Shared).ended(RequestOutcome::Timeout);
        assert!(classes.shared.get().is_some() && classes.permits.get().is_none());
    }

    /// Otherwise two handles with the same labels would overwrite each other's gauges.
    #[test]
    fn class_named_other_is_the_class_of_all_others() {
        let classes = Classes::new("default", 2);
        let other = classes.get(Some("other"), LockMode::Exclusive).unwrap();
        assert!(Arc::ptr_eq(&other, &classes.exclusive.other));
        let classes = Classes::new("other", 2);
        assert!(Arc::ptr_eq(&classes.exclusive.default, &classes.exclusive.other));
    }
}
