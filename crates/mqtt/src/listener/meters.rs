//! What a worker counts, and how often it logs.

use std::cell::Cell;
use std::time::{Duration, Instant};
use throughline_telemetry::{Counter, Metric, counter};

/// Value of the label `listener` of the own listener.
pub(crate) const LISTENER: &str = "mqtt";

/// Counters that are used for every message.
pub(crate) struct Meters {
    pub(crate) publishes: [Counter; 2],
    pub(crate) pubacks: Counter,
    pub(crate) resent: Counter,
    listener: &'static str,
    last_log: Cell<Option<Instant>>,
    suppressed: Cell<u64>,
}

impl Meters {
    pub(crate) fn new(listener: &'static str) -> Self {
        let publishes = |qos| counter(Metric::MqttPublishesTotal, &[("listener", listener), ("qos", qos)]);
        Self {
            publishes: [publishes("0"), publishes("1")],
            pubacks: counter(Metric::MqttPubacksTotal, &[("listener", listener)]),
            resent: counter(Metric::MqttResentTotal, &[("listener", listener)]),
            listener,
            last_log: Cell::new(None),
            suppressed: Cell::new(0),
        }
    }

    /// Counts an attempt to connect.
    pub(crate) fn connect(&self, result: &str) {
        counter(Metric::MqttConnectsTotal, &[("listener", self.listener), ("result", result)]).add(1);
    }

    /// Counts the end of a connection.
    pub(crate) fn disconnect(&self, reason: &str) {
        counter(Metric::MqttDisconnectsTotal, &[("listener", self.listener), ("reason", reason)]).add(1);
    }

    /// Counts a packet that was refused and not stored.
    pub(crate) fn refused(&self, reason: &str) {
        counter(Metric::MqttRefusedTotal, &[("listener", self.listener), ("reason", reason)]).add(1);
    }

    /// Counts locators that Kafka does not take: what they point to is written all the same.
    pub(crate) fn dropped_locators(&self, count: u32) {
        (0..count).for_each(|_| self.refused("locator"));
    }

    /// Counts a dead letter.
    pub(crate) fn dead_letter(&self, topic: &str, reason: &str) {
        let labels = [("stage", "bridge"), ("topic", topic), ("reason", reason)];
        counter(Metric::DeadLettersTotal, &labels).add(1);
    }

    /// Logs at most once a second; `what` gets the number of those left out since.
    pub(crate) fn log(&self, what: impl FnOnce(u64)) {
        let now = Instant::now();
        if self.last_log.get().is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.suppressed.set(self.suppressed.get() + 1);
            return;
        }
        self.last_log.set(Some(now));
        what(self.suppressed.take());
    }
}
