//! Metrics by class: outcomes of lock requests.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;

use super::recorder::{Histogram, counter, histogram};

use super::stripes::Counts;
use super::table::{ACQUISITIONS, HOLD, WAIT};
use super::tally::{Flushed, Thinning};
use crate::engine::Path;
use crate::error::{LockError, LockErrorKind};

/// The class that counts all classes beyond `max_classes`.
pub(super) const OTHER_CLASS: &str = "other";

/// The numbers of the default class and of the class that counts all others. Further classes are
/// numbered in the order in which they first occur.
pub(crate) const DEFAULT_CLASS: u16 = 0;
pub(super) const OTHER_CLASS_NUMBER: u16 = 1;

/// The outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Acquired(Path),
    Busy,
    Timeout,
    QueueFull,
    Unavailable,
    Refused,
    Closed,
    Cancelled,
}

impl Ending {
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

/// The metrics of one class of locks.
#[derive(Debug)]
pub(crate) struct ClassMetrics {
    number: u16,
    endings: Counts<{ Ending::ALL.len() }>,
    flushed: [Flushed; Ending::ALL.len()],
    /// Samples the acquired locks for the recorder.
    thinning: Thinning,
    wait: Histogram,
    hold: Histogram,
}

impl ClassMetrics {
    pub(crate) fn new(class: &str, number: u16) -> Self {
        let class = class.to_owned();
        Self {
            number,
            endings: Counts::default(),
            flushed: Ending::ALL.map(|ending| {
                let (outcome, path) = ending.labels();
                Flushed::new(counter!(ACQUISITIONS, "class" => class.clone(), "outcome" => outcome, "path" => path))
            }),
            thinning: Thinning::default(),
            wait: histogram!(WAIT, "class" => class.clone()),
            hold: histogram!(HOLD, "class" => class),
        }
    }

    /// Stands for the class where its name would take too much space.
    pub(crate) const fn number(&self) -> u16 {
        self.number
    }

    pub(crate) fn ended(&self, ending: Ending) {
        self.endings.add(ending.index());
    }

    /// A lock was acquired. Returns whether its durations are in the sample for the recorder.
    pub(crate) fn acquired(&self, path: Path, waited: Duration) -> bool {
        let number = self.endings.add(Ending::Acquired(path).index());
        let is_in_sample = self.thinning.takes(number);
        self.wait.record_sampled(|| waited.as_secs_f64(), is_in_sample);
        is_in_sample
    }

    pub(crate) fn held(&self, time: Duration, is_in_sample: bool) {
        self.hold.record_sampled(|| time.as_secs_f64(), is_in_sample);
    }

    fn tell(&self) {
        for (flushed, count) in self.flushed.iter().zip(self.endings.all()) {
            flushed.tell(count);
        }
    }

    fn adjust(&self, elapsed: Duration) {
        let acquired = Ending::ALL.iter().zip(self.endings.all());
        let acquired = acquired.filter(|(ending, _)| matches!(ending, Ending::Acquired(_)));
        self.thinning.adjust(acquired.map(|(_, count)| count).sum(), elapsed);
    }
}

/// The classes of a manager. All classes beyond the limit share one.
#[derive(Debug)]
pub(crate) struct Classes {
    known: DashMap<String, Arc<ClassMetrics>>,
    /// The names of the known classes. At most `max`.
    names: Mutex<Vec<Arc<str>>>,
    max: usize,
    default_name: Arc<str>,
    default: Arc<ClassMetrics>,
    other: Arc<ClassMetrics>,
}

impl Classes {
    pub(crate) fn new(default: &str, max: usize) -> Self {
        let default_class = Arc::new(ClassMetrics::new(default, DEFAULT_CLASS));
        let other = if default == OTHER_CLASS {
            Arc::clone(&default_class)
        } else {
            Arc::new(ClassMetrics::new(OTHER_CLASS, OTHER_CLASS_NUMBER))
        };
        Self {
            known: DashMap::new(),
            names: Mutex::default(),
            max,
            default_name: default.into(),
            default: default_class,
            other,
        }
    }

    /// The metrics of requests without a class.
    pub(crate) const fn default_class(&self) -> &Arc<ClassMetrics> {
        &self.default
    }

    /// Flushes new values to the recorder.
    pub(crate) fn tell(&self) {
        self.each(ClassMetrics::tell);
    }

    /// Adjusts the sampling of durations to the rate during `elapsed`.
    pub(crate) fn adjust(&self, elapsed: Duration) {
        self.each(|class| class.adjust(elapsed));
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

    /// Returns `None` for the default class, whose metrics every shard has.
    pub(crate) fn get(&self, class: Option<&str>) -> Option<Arc<ClassMetrics>> {
        let class = class.filter(|&class| class != &*self.default_name)?;
        if let Some(known) = self.known.get(class) {
            return Some(Arc::clone(&known));
        }
        let Some(number) = self.number(class) else {
            return Some(Arc::clone(&self.other));
        };
        // Created before the map is locked, because this calls the recorder. If another task was
        // faster, its metrics are used.
        let made = Arc::new(ClassMetrics::new(class, number));
        let entry = self.known.entry(class.to_owned()).or_insert(made);
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
    fn each_ending_has_its_place() {
        for (place, ending) in Ending::ALL.into_iter().enumerate() {
            assert_eq!(ending.index(), place, "{ending:?}");
        }
    }

    #[test]
    fn beyond_the_limit_all_classes_are_one() {
        let classes = Classes::new("default", 2);
        assert!(classes.get(None).is_none() && classes.get(Some("default")).is_none());
        let first = classes.get(Some("a")).unwrap();
        classes.get(Some("b")).unwrap();
        for number in 0..1000 {
            let beyond = classes.get(Some(&format!("c{number}"))).unwrap();
            assert!(Arc::ptr_eq(&beyond, &classes.other));
        }
        assert!(Arc::ptr_eq(&first, &classes.get(Some("a")).unwrap()));
        assert_eq!(classes.known.len(), 2);
        assert_eq!(
            classes.names().iter().map(|name| &**name).collect::<Vec<_>>(),
            ["default", "other", "a", "b"]
        );
        assert_eq!(
            [first.number(), classes.other.number(), classes.default.number()],
            [2, 1, 0]
        );
    }

    /// Otherwise two handles with the same labels would overwrite each other's gauges.
    #[test]
    fn class_that_is_called_other_is_that_of_all_others() {
        let classes = Classes::new("default", 2);
        assert!(Arc::ptr_eq(&classes.get(Some("other")).unwrap(), &classes.other));
        let classes = Classes::new("other", 2);
        assert!(Arc::ptr_eq(&classes.default, &classes.other));
    }
}
