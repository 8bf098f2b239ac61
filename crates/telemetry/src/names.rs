//! The one list of metric names.
//!
//! A metric is one entry of the table below: variant, kind, Prometheus name, OTLP name, unit, labels, help.
//! Prometheus names are exact, no suffix is added by any exporter. Labels are from bounded sets; a device id
//! is never a label. `docs/metrics.md` is compared with this table by a test.

/// What a metric measures and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution; holds the upper bounds of its buckets, ascending, without infinity.
    Histogram(&'static [f64]),
}

impl Kind {
    /// Returns the word that Prometheus uses.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// Everything there is to know about a metric.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// The exact Prometheus name.
    pub name: &'static str,
    /// The name in OTLP where a convention wants another, else the same.
    pub otlp_name: &'static str,
    /// What kind of number it is.
    pub kind: Kind,
    /// The unit in UCUM, as OTLP wants it: `s`, `By`, `1`, or a noun in braces.
    pub unit: &'static str,
    /// The labels, in the order in which they are shown.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

/// Bounds for the time that work takes: 100 µs to 60 s.
const WORK: &[f64] =
    &[0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Bounds for ages: 5 ms, which is a good day, to a week in an agent's spool.
const AGE: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 86_400.0,
    604_800.0,
];

/// Makes the enum, the list of all and the definitions from one table, so that they cannot differ.
macro_rules! metrics {
    ($($variant:ident $kind:expr, $name:literal as $otlp:literal, $unit:literal, [$($label:literal),*], $help:literal;)*) => {
        /// A metric; the only way to name one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Metric {
            $(#[doc = $help] $variant,)*
        }

        impl Metric {
            /// Every metric, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Returns name, kind, unit, labels and help.
            pub const fn definition(self) -> Definition {
                match self {
                    $(Self::$variant => Definition {
                        name: $name,
                        otlp_name: $otlp,
                        kind: $kind,
                        unit: $unit,
                        labels: &[$($label),*],
                        help: $help,
                    },)*
                }
            }
        }
    };
}

use Kind::{Counter, Gauge, Histogram};

metrics! {
    // Stages.
    MessagesTotal Counter, "messages_total" as "messages_total", "{message}", ["stage", "topic", "outcome", "reason"],
        "Records that a stage has settled, by outcome.";
    ActionDurationTimeSeconds Histogram(WORK), "action_duration_time_seconds" as "action_duration_time_seconds", "s",
        ["stage", "topic", "outcome", "phase"], "Time that a record spent in a phase of a stage: wait, work or effect.";
    MessageAgeSeconds Histogram(AGE), "message_age_seconds" as "message_age_seconds", "s", ["stage", "topic"],
        "Age of a message when the stage settled it, corrected for the sender's clock offset.";
    RequestsTotal Counter, "requests_total" as "requests_total", "{request}",
        ["request_code", "response_code", "reason"], "Requests answered, by result.";
    DeadLettersTotal Counter, "dead_letters_total" as "dead_letters_total", "{message}", ["stage", "topic", "reason"],
        "Records put into a dead-letter topic.";
    RetriesTotal Counter, "retries_total" as "retries_total", "{retry}", ["stage", "dependency"],
        "Attempts repeated because a dependency failed.";
    RecoveriesTotal Counter, "recoveries_total" as "recoveries_total", "{recovery}", ["stage", "reason"],
        "Times that a stage dropped its producer and state and restored them.";
    CommitsTotal Counter, "commits_total" as "commits_total", "{commit}", ["stage"],
        "Transactions committed by a stage.";
    OvertakenTotal Counter, "overtaken_total" as "overtaken_total", "{record}", ["group", "topic", "partition"],
        "Positions that retention deleted before the group read them.";
    StateKeys Gauge, "state_keys" as "state_keys", "{key}", ["stage"], "Keys of state that a stage holds in memory.";
    PartitionsOwned Gauge, "partitions_owned" as "partitions_owned", "{partition}", ["stage"],
        "Partitions that the stage owns in this process.";
    PartitionsPaused Gauge, "partitions_paused" as "partitions_paused", "{partition}", ["stage"],
        "Partitions that the stage does not read at the moment, by its own decision.";

    // Buffers and dependencies.
    BufferMessages Gauge, "buffer_messages" as "buffer_messages", "{message}", ["role", "buffer"],
        "Messages in a bounded buffer.";
    BufferBytes Gauge, "buffer_bytes" as "buffer_bytes", "By", ["role", "buffer"], "Bytes in a bounded buffer.";
    BufferAgeSeconds Gauge, "buffer_age_seconds" as "buffer_age_seconds", "s", ["role", "buffer"],
        "Age of the oldest message in a bounded buffer.";
    DependencyUp Gauge, "dependency_up" as "dependency_up", "1", ["role", "dependency"],
        "1 where the role's last use of the dependency succeeded, else 0.";
    RoleReady Gauge, "role_ready" as "role_ready", "1", ["role"], "1 where the role can do its job, else 0.";

    // Lag of every group, named as kafka-lag-exporter names it.
    ConsumerGroupLag Gauge, "kafka_consumergroup_group_lag" as "kafka_consumergroup_group_lag", "{record}",
        ["cluster_name", "group", "topic", "partition"], "Records of the partition that the group has not committed.";
    ConsumerGroupLagSeconds Gauge, "kafka_consumergroup_group_lag_seconds" as "kafka_consumergroup_group_lag_seconds",
        "s", ["cluster_name", "group", "topic", "partition"], "Age of the first record that the group has not committed.";
    ConsumerGroupOffset Gauge, "kafka_consumergroup_group_offset" as "kafka_consumergroup_group_offset", "{offset}",
        ["cluster_name", "group", "topic", "partition"], "Offset that the group has committed.";
    ConsumerGroupMaxLag Gauge, "kafka_consumergroup_group_max_lag" as "kafka_consumergroup_group_max_lag", "{record}",
        ["cluster_name", "group"], "Largest lag of a partition of the group.";
    ConsumerGroupMaxLagSeconds Gauge,
        "kafka_consumergroup_group_max_lag_seconds" as "kafka_consumergroup_group_max_lag_seconds", "s",
        ["cluster_name", "group"], "Largest lag in seconds of a partition of the group.";
    ConsumerGroupSumLag Gauge, "kafka_consumergroup_group_sum_lag" as "kafka_consumergroup_group_sum_lag", "{record}",
        ["cluster_name", "group"], "Sum of the group's lag over all its partitions.";
    ConsumerGroupTopicSumLag Gauge,
        "kafka_consumergroup_group_topic_sum_lag" as "kafka_consumergroup_group_topic_sum_lag", "{record}",
        ["cluster_name", "group", "topic"], "Sum of the group's lag over the partitions of one topic.";
    PartitionLatestOffset Gauge, "kafka_partition_latest_offset" as "kafka_partition_latest_offset", "{offset}",
        ["cluster_name", "topic", "partition"], "Offset that the next record of the partition will get.";
    PartitionEarliestOffset Gauge, "kafka_partition_earliest_offset" as "kafka_partition_earliest_offset", "{offset}",
        ["cluster_name", "topic", "partition"], "First offset of the partition that retention has left.";
    RetentionHeadroomSeconds Gauge, "retention_headroom_seconds" as "retention_headroom_seconds", "s",
        ["group", "topic", "partition"], "Time until retention reaches the first record that the group has not committed.";
    HeartbeatAgeSeconds Gauge, "heartbeat_age_seconds" as "heartbeat_age_seconds", "s", ["kind", "site"],
        "Age of the newest heartbeat of a kind of sender at a site.";

    // The bridge.
    MqttConnections Gauge, "mqtt_connections" as "mqtt_connections", "{connection}", ["listener"],
        "MQTT connections that are open.";
    MqttConnectsTotal Counter, "mqtt_connects_total" as "mqtt_connects_total", "{connection}", ["listener", "result"],
        "Attempts to connect, by result.";
    MqttDisconnectsTotal Counter, "mqtt_disconnects_total" as "mqtt_disconnects_total", "{connection}",
        ["listener", "reason"], "Connections that ended, by reason.";
    MqttPublishesTotal Counter, "mqtt_publishes_total" as "mqtt_publishes_total", "{message}", ["listener", "qos"],
        "PUBLISH packets received.";
    MqttPubacksTotal Counter, "mqtt_pubacks_total" as "mqtt_pubacks_total", "{message}", ["listener"],
        "PUBACK packets sent, each after Kafka's acknowledgement.";
    MqttRefusedTotal Counter, "mqtt_refused_total" as "mqtt_refused_total", "{message}", ["listener", "reason"],
        "Packets that the listener refused and did not store.";
    MqttOpenPublishes Gauge, "mqtt_open_publishes" as "mqtt_open_publishes", "{message}", ["listener"],
        "Publishes that wait for Kafka's acknowledgement.";
    MqttConnectionsPaused Gauge, "mqtt_connections_paused" as "mqtt_connections_paused", "{connection}", ["listener"],
        "Connections that are not read because a bound was reached.";

    MqttResentTotal Counter, "mqtt_resent_total" as "mqtt_resent_total", "{message}", ["listener"],
        "Publishes that a client sent again after it reconnected to its session.";
    MqttSessionEventsLostTotal Counter, "mqtt_session_events_lost_total" as "mqtt_session_events_lost_total",
        "{event}", [], "Session events and wills that could not be written within their bound.";

    // OpenTelemetry's messaging conventions.
    MessagingProcessDuration Histogram(WORK), "messaging_process_duration_seconds" as "messaging.process.duration", "s",
        ["messaging_operation_name", "messaging_destination_name", "messaging_consumer_group_name"],
        "Duration of processing one batch.";
    MessagingClientSentMessages Counter, "messaging_client_sent_messages" as "messaging.client.sent.messages",
        "{message}", ["messaging_destination_name"], "Records that Kafka acknowledged, also those of transactions that were given up.";
    MessagingClientConsumedMessages Counter,
        "messaging_client_consumed_messages" as "messaging.client.consumed.messages", "{message}",
        ["messaging_destination_name", "messaging_consumer_group_name"], "Records received from Kafka.";

    // The process itself.
    BuildInfo Gauge, "throughline_build_info" as "throughline_build_info", "1", ["version"],
        "Always 1; the label holds the version that runs.";
    ProcessStartTimeSeconds Gauge, "process_start_time_seconds" as "process_start_time_seconds", "s", [],
        "Unix time at which the process began to measure.";
    MetricSeriesRefusedTotal Counter, "metric_series_refused_total" as "metric_series_refused_total", "{series}",
        ["metric"], "Label sets that were counted as `_other` because their metric is at its bound.";
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_in_the_grammar_of_prometheus() {
        let mut seen = BTreeSet::new();
        for metric in Metric::ALL {
            let definition = metric.definition();
            assert!(seen.insert(definition.name), "{} is there twice", definition.name);
            let words = std::iter::once(definition.name).chain(definition.labels.iter().copied());
            for word in words {
                let good = word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
                assert!(good && !word.starts_with(|c: char| c.is_ascii_digit()), "{word}");
            }
            assert!(!definition.labels.contains(&"device"), "{}: a device is never a label", definition.name);
            assert!(definition.help.ends_with('.'), "{}: {}", definition.name, definition.help);
        }
    }

    #[test]
    fn bounds_of_histograms_ascend() {
        for metric in Metric::ALL {
            if let Kind::Histogram(bounds) = metric.definition().kind {
                assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]), "{metric:?}");
            }
        }
    }

    /// The table of the documentation is generated from this list: `UPDATE_DOCS=1 cargo test -p
    /// throughline-telemetry` writes it.
    #[test]
    fn the_documented_table_is_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
        let page = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- table: generated -->\n", "<!-- end of table -->");
        let (before, rest) = page.split_once(begin).expect("the page has the mark where the table begins");
        let (table, after) = rest.split_once(end).expect("the page has the mark where the table ends");
        let expected = table_of_metrics();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, format!("{before}{begin}{expected}{end}{after}")).unwrap();
            return;
        }
        assert!(
            table == expected,
            "docs/metrics.md differs from the list of metrics; write it with `UPDATE_DOCS=1 cargo test -p \
             throughline-telemetry`; it shall be:\n{expected}"
        );
    }

    fn table_of_metrics() -> String {
        let mut rows = String::from("| metric | kind | unit | labels | meaning |\n|---|---|---|---|---|\n");
        for metric in Metric::ALL {
            let Definition { name, otlp_name, kind, unit, labels, help } = metric.definition();
            let otlp = if otlp_name == name { String::new() } else { format!(" (OTLP: `{otlp_name}`)") };
            let labels = labels.join(", ");
            let kind = kind.word();
            rows.push_str(&format!("| `{name}`{otlp} | {kind} | {unit} | {labels} | {help} |\n"));
        }
        rows
    }
}
