//! Counts the records that Kafka acknowledged, by topic.

use parking_lot::Mutex;
use throughline_telemetry::{Counter, Metric, counter};

/// The counters of one producer. Delivery reports come one by one, hence by the thousand, and looking a counter
/// up in the registry of metrics would cost more than the rest of a report: each topic's is kept here, the one
/// used last in front. They are as many as the process writes topics.
#[derive(Default)]
pub(crate) struct Sent(Mutex<Vec<(Box<str>, Counter)>>);

impl Sent {
    pub(crate) fn count(&self, topic: &str) {
        let mut known = self.0.lock();
        let at = known.iter().position(|(name, _)| **name == *topic).unwrap_or_else(|| {
            let labels = [("messaging_destination_name", topic)];
            known.push((topic.into(), counter(Metric::MessagingClientSentMessages, &labels)));
            known.len() - 1
        });
        known[at].1.add(1);
        known.swap(0, at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_counted_under_their_topic() {
        let sent = Sent::default();
        for topic in ["sent.a", "sent.b", "sent.a", "sent.a"] {
            sent.count(topic);
        }
        let counted = |topic| {
            counter(Metric::MessagingClientSentMessages, &[("messaging_destination_name", topic)]).value()
        };
        assert_eq!((counted("sent.a"), counted("sent.b")), (3, 1));
    }
}
