//! A manager whose metrics a test can read.

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use shardlock::LockManager;
use shardlock::config::Builder;

/// A manager with its own metrics recorder, unaffected by anything else in the process.
pub struct Measured {
    /// The manager.
    pub locks: LockManager,
    page: PrometheusHandle,
}

impl Measured {
    /// Connects. Must be awaited by the test itself rather than by a spawned task, since the
    /// recorder is thread-local.
    pub async fn connect(builder: Builder) -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let page = recorder.handle();
        let _ours = metrics::set_default_local_recorder(&recorder);
        let locks = builder.connect().await.expect("connect");
        Self { locks, page }
    }

    /// The value of the only series with this name.
    #[track_caller]
    pub fn value(&self, name: &str) -> f64 {
        let page = self.page.render();
        let lines = page.lines().filter(|line| line.split('{').next() == Some(name));
        let lines: Vec<_> = lines.collect();
        let [line] = lines[..] else { panic!("{name}: {lines:?}") };
        let value = line.rsplit_once(' ').expect("a value").1;
        value.parse().expect("a number")
    }

    /// The sum of all series with this name and this label.
    pub fn sum(&self, name: &str, label: &str) -> f64 {
        let page = self.page.render();
        let series = page.lines().filter_map(|line| {
            let (found, labels_and_value) = line.split_once('{')?;
            let (labels, value) = labels_and_value.split_once("} ")?;
            (found == name && labels.split(',').any(|one| one == label))
                .then(|| value.parse::<f64>().expect("a number"))
        });
        series.sum()
    }
}
