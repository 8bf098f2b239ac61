//! Series and the handles to them.
//!
//! The registry is ours and not a library's for two reasons: a batch observes its duration for n records at
//! once ([`Histogram::observe_n`]), which the common libraries only offer as n calls, and both exporters read
//! one table, which makes "the same through OTLP" true by construction.

use crate::names::{Definition, Kind, Metric};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// Most label sets a metric may have. Lag by group, topic and partition is the largest honest user:
/// 40 groups × 100 partitions. What comes beyond is counted under the label value `_other`.
const SERIES_MAX: usize = 4_096;

/// The label value of the series that stands for all those beyond the bound.
const OTHER: &str = "_other";

/// A number that only grows.
#[derive(Clone, Debug)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Returns the count so far.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Clone, Debug)]
pub struct Gauge(Arc<AtomicU64>);

impl Gauge {
    /// Sets the value.
    pub fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }

    /// Adds `delta`, which may be negative.
    pub fn add(&self, delta: f64) {
        add_float(&self.0, delta);
    }

    /// Returns the value.
    pub fn value(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }
}

/// A distribution over fixed buckets.
#[derive(Clone, Debug)]
pub struct Histogram(Arc<Buckets>);

impl Histogram {
    /// Counts one observation.
    pub fn observe(&self, value: f64) {
        self.observe_n(value, 1);
    }

    /// Counts `n` observations of the same value, for instance the records of one batch.
    pub fn observe_n(&self, value: f64, n: u64) {
        let buckets = &*self.0;
        // A value equal to a bound belongs below it: Prometheus' `le` is inclusive.
        let bucket = buckets.bounds.partition_point(|bound| *bound < value);
        buckets.counts[bucket].fetch_add(n, Ordering::Relaxed);
        add_float(&buckets.sum, value * n as f64);
    }

    /// Returns how many observations there were.
    pub fn count(&self) -> u64 {
        self.0.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

/// Counts of a histogram; the last bucket has no upper bound.
#[derive(Debug)]
struct Buckets {
    bounds: &'static [f64],
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

fn add_float(cell: &AtomicU64, delta: f64) {
    let mut seen = cell.load(Ordering::Relaxed);
    loop {
        let next = (f64::from_bits(seen) + delta).to_bits();
        match cell.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

/// Returns the counter of these labels; a label that is not given is empty.
///
/// # Panics
/// In debug builds, when the metric is no counter or does not know a label; in release builds the unknown
/// label is left out.
pub fn counter(metric: Metric, labels: &[(&'static str, &str)]) -> Counter {
    debug_assert_eq!(metric.definition().kind, Kind::Counter, "{metric:?} is no counter");
    match series(metric, labels) {
        Cell::Number(cell) => Counter(cell),
        Cell::Buckets(_) => Counter(Arc::default()),
    }
}

/// Returns the gauge of these labels; a label that is not given is empty.
///
/// # Panics
/// As [`counter`].
pub fn gauge(metric: Metric, labels: &[(&'static str, &str)]) -> Gauge {
    debug_assert_eq!(metric.definition().kind, Kind::Gauge, "{metric:?} is no gauge");
    match series(metric, labels) {
        Cell::Number(cell) => Gauge(cell),
        Cell::Buckets(_) => Gauge(Arc::default()),
    }
}

/// Returns the histogram of these labels; a label that is not given is empty.
///
/// # Panics
/// As [`counter`].
pub fn histogram(metric: Metric, labels: &[(&'static str, &str)]) -> Histogram {
    match series(metric, labels) {
        Cell::Buckets(buckets) => Histogram(buckets),
        Cell::Number(_) => {
            debug_assert!(false, "{metric:?} is no histogram");
            Histogram(Arc::new(new_buckets(&[])))
        }
    }
}

/// Removes a series, for instance the lag of a group that is gone. Handles to it go on working but are no
/// longer shown.
pub fn forget(metric: Metric, labels: &[(&'static str, &str)]) {
    let values = label_values(&metric.definition(), labels);
    if let Some(family) = REGISTRY.lock().get_mut(&metric) {
        family.remove(&values);
    }
}

type LabelValues = Box<[Box<str>]>;
type Family = BTreeMap<LabelValues, Cell>;

static REGISTRY: LazyLock<Mutex<BTreeMap<Metric, Family>>> = LazyLock::new(Mutex::default);

#[derive(Clone, Debug)]
enum Cell {
    Number(Arc<AtomicU64>),
    Buckets(Arc<Buckets>),
}

fn series(metric: Metric, labels: &[(&'static str, &str)]) -> Cell {
    let definition = metric.definition();
    let mut values = label_values(&definition, labels);
    let mut registry = REGISTRY.lock();
    let family = registry.entry(metric).or_default();
    let beyond_bound = family.len() >= SERIES_MAX && !family.contains_key(&values);
    if beyond_bound {
        values = definition.labels.iter().map(|_| OTHER.into()).collect();
    }
    let cell = family.entry(values).or_insert_with(|| new_cell(definition.kind)).clone();
    if beyond_bound {
        let refused = registry.entry(Metric::MetricSeriesRefusedTotal).or_default();
        let cell = refused.entry([definition.name.into()].into()).or_insert_with(|| new_cell(Kind::Counter));
        if let Cell::Number(count) = cell {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    cell
}

fn label_values(definition: &Definition, labels: &[(&'static str, &str)]) -> LabelValues {
    for (name, _) in labels {
        debug_assert!(
            definition.labels.contains(name),
            "metric {} has no label {name}; it has {:?}",
            definition.name,
            definition.labels
        );
    }
    let value_of =
        |label: &&str| labels.iter().find(|(name, _)| name == label).map_or("", |(_, value)| *value);
    definition.labels.iter().map(|label| value_of(label).into()).collect()
}

fn new_cell(kind: Kind) -> Cell {
    match kind {
        Kind::Counter | Kind::Gauge => Cell::Number(Arc::default()),
        Kind::Histogram(bounds) => Cell::Buckets(Arc::new(new_buckets(bounds))),
    }
}

fn new_buckets(bounds: &'static [f64]) -> Buckets {
    let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
    Buckets { bounds, counts, sum: AtomicU64::new(0) }
}

/// The series of one metric at one instant.
#[derive(Debug)]
pub(crate) struct FamilySnapshot {
    pub(crate) definition: Definition,
    pub(crate) series: Vec<(LabelValues, Value)>,
}

/// The value of one series at one instant.
#[derive(Debug, PartialEq)]
pub(crate) enum Value {
    Counter(u64),
    Gauge(f64),
    /// `counts` has one entry more than `bounds`; they are not cumulative.
    Histogram {
        bounds: &'static [f64],
        counts: Vec<u64>,
        sum: f64,
    },
}

/// Reads every series. Values of one instant as far as relaxed reads go: a scrape may see a count of which
/// the sum is not yet there.
pub(crate) fn snapshot() -> Vec<FamilySnapshot> {
    let registry = REGISTRY.lock();
    let families = registry.iter().map(|(metric, family)| {
        let definition = metric.definition();
        let series =
            family.iter().map(|(labels, cell)| (labels.clone(), read(definition.kind, cell))).collect();
        FamilySnapshot { definition, series }
    });
    families.collect()
}

fn read(kind: Kind, cell: &Cell) -> Value {
    match cell {
        Cell::Number(number) if kind == Kind::Counter => Value::Counter(number.load(Ordering::Relaxed)),
        Cell::Number(number) => Value::Gauge(f64::from_bits(number.load(Ordering::Relaxed))),
        Cell::Buckets(buckets) => Value::Histogram {
            bounds: buckets.bounds,
            counts: buckets.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: f64::from_bits(buckets.sum.load(Ordering::Relaxed)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_with_equal_labels_share_a_series() {
        let one = counter(Metric::RetriesTotal, &[("stage", "s1"), ("dependency", "kafka")]);
        let two = counter(Metric::RetriesTotal, &[("dependency", "kafka"), ("stage", "s1")]);
        one.add(2);
        two.add(3);
        assert_eq!(one.value(), 5);
    }

    #[test]
    fn a_gauge_counts_changes_of_many_threads() {
        let gauge = gauge(Metric::MqttConnections, &[("listener", "threads")]);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let gauge = gauge.clone();
                scope.spawn(move || (0..1_000).for_each(|_| gauge.add(1.0)));
            }
        });
        assert_eq!(gauge.value(), 4_000.0);
    }

    #[test]
    fn a_value_on_a_bound_is_in_the_bucket_below() {
        let histogram = histogram(Metric::MessageAgeSeconds, &[("stage", "bounds")]);
        histogram.observe_n(0.005, 7);
        histogram.observe(0.0051);
        histogram.observe(1e9);
        let counts: Vec<u64> = histogram.0.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        assert_eq!((counts[0], counts[1], *counts.last().unwrap()), (7, 1, 1));
        assert_eq!(histogram.count(), 9);
    }

    #[test]
    fn label_sets_beyond_the_bound_become_other() {
        for partition in 0..SERIES_MAX + 10 {
            counter(Metric::OvertakenTotal, &[("partition", &partition.to_string())]).add(1);
        }
        let refused = counter(Metric::MetricSeriesRefusedTotal, &[("metric", "overtaken_total")]);
        assert_eq!(refused.value(), 10);
        let other = [("group", OTHER), ("topic", OTHER), ("partition", OTHER)];
        assert_eq!(counter(Metric::OvertakenTotal, &other).value(), 10);
    }

    #[test]
    fn a_forgotten_series_is_not_shown() {
        let labels = [("cluster_name", "c"), ("group", "gone"), ("topic", "t"), ("partition", "0")];
        gauge(Metric::ConsumerGroupLag, &labels).set(3.0);
        assert!(crate::render().contains("group=\"gone\""));
        forget(Metric::ConsumerGroupLag, &labels);
        assert!(!crate::render().contains("group=\"gone\""));
    }
}
