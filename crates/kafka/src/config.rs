//! How to reach the cluster, and the client settings with the reason for each.

use crate::failure::refused_config;
use rdkafka::config::ClientConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use throughline_model::catalog::RECORD_BYTES_MAX;
use throughline_runtime::ports::Failure;

/// How long an open transaction of a killed process may hold back committed readers. librdkafka caps
/// `message.timeout.ms` to it.
pub(crate) const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(10);
/// A single request to the cluster: long enough for a leader election, short enough to say so in time.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long committed offsets may stay unstable: an abandoned transaction ends within its time-out.
pub(crate) const STABLE_TIMEOUT: Duration = Duration::from_secs(15);

/// Records that are fetched ahead for each KiB: the records of a full queue are at least this small on average
/// before their number bounds it.
const RECORDS_PER_KIB: u32 = 6;

/// Which group protocol members speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupProtocol {
    /// KIP-848, Kafka 4.0 or newer: rebalances do not stop members that keep their partitions.
    #[default]
    Consumer,
    /// The protocol of older clusters, with static membership by instance name.
    Classic,
}

/// Where the cluster is and who this process is to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KafkaConfig {
    /// `host:port` of one or several brokers, separated by commas.
    pub bootstrap: String,
    /// The client id in the brokers' logs and quotas.
    pub client_id: String,
    /// This process among its siblings; two live processes never share one. Part of `transactional.id`,
    /// so that a successor fences its predecessor.
    pub instance: String,
    /// The group protocol.
    pub group_protocol: GroupProtocol,
    /// Further librdkafka properties (`security.protocol`, `sasl.*`, `ssl.*` …); they win over ours.
    pub properties: BTreeMap<String, String>,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            bootstrap: "127.0.0.1:9092".to_owned(),
            client_id: "throughline".to_owned(),
            instance: "0".to_owned(),
            group_protocol: GroupProtocol::Consumer,
            properties: BTreeMap::new(),
        }
    }
}

impl KafkaConfig {
    /// Makes a configuration for a cluster without authentication.
    pub fn new(bootstrap: impl Into<String>) -> Self {
        Self { bootstrap: bootstrap.into(), ..Self::default() }
    }

    /// Settings of every client.
    pub(crate) fn client(&self) -> ClientConfig {
        throughline_kafka_ffi::guard::require();
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", &self.bootstrap)
            .set("client.id", &self.client_id)
            // Topics are made by `topics apply` alone, never by a misspelt name.
            .set("allow.auto.create.topics", "false")
            .set("socket.keepalive.enable", "true")
            .set("socket.nagle.disable", "true")
            // A broker that comes back is used within 2 s; librdkafka's own maximum is 10 s.
            .set("reconnect.backoff.ms", "100")
            .set("reconnect.backoff.max.ms", "2000")
            // Idle connections that a broker closes are no news.
            .set("log.connection.close", "false");
        self.finish(client)
    }

    /// Settings of every reader.
    pub(crate) fn reader(&self, group: &str) -> ClientConfig {
        let mut client = self.client();
        client
            .set("group.id", group)
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            // Measured: the default of 1,000 ms cuts consumption from 1.69 to 0.40 million records a second.
            .set("fetch.queue.backoff.ms", "20")
            .set("fetch.error.backoff.ms", "100")
            // A seek is answered after the fetch in progress: with the default of 500 ms every start and
            // rebalance of an idle partition takes that long. The price is ten empty fetches a second of an idle consumer.
            .set("fetch.wait.max.ms", "100")
            // The bound on memory of what one reader has fetched.
            .set("queued.min.messages", "50000")
            .set("queued.max.messages.kbytes", "8192");
        self.finish(client)
    }

    /// Settings of a member of `group` that reads `topics` topics and fetches `fetched_kib` of each partition
    /// ahead.
    pub(crate) fn member(&self, group: &str, topics: usize, fetched_kib: u32) -> ClientConfig {
        let mut client = self.reader(group);
        client
            // A member's partitions have a queue each, so these are per partition.
            .set("queued.max.messages.kbytes", fetched_kib.to_string())
            // Each record costs librdkafka 250 bytes or so, which its count of bytes leaves out.
            .set("queued.min.messages", fetched_kib.saturating_mul(RECORDS_PER_KIB).to_string());
        // What retention overtook, or a topic that was made anew, is to be seen, not skipped.
        client.set("auto.offset.reset", "error");
        match self.group_protocol {
            GroupProtocol::Consumer => {
                // `range` gives partition p of all topics to one member; `uniform` balances one topic.
                let assignor = if topics > 1 { "range" } else { "uniform" };
                client.set("group.protocol", "consumer").set("group.remote.assignor", assignor);
            }
            GroupProtocol::Classic => {
                let assignor = if topics > 1 { "range" } else { "cooperative-sticky" };
                client
                    .set("group.protocol", "classic")
                    .set("partition.assignment.strategy", assignor)
                    .set("group.instance.id", format!("{group}-{}", self.instance))
                    // Six missed heartbeats: a crashed member's partitions move within 6 s.
                    .set("session.timeout.ms", "6000")
                    .set("heartbeat.interval.ms", "1000");
            }
        }
        self.finish(client)
    }

    /// Settings of every writer.
    pub(crate) fn writer(&self) -> ClientConfig {
        let mut client = self.client();
        client
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("partitioner", "murmur2_random")
            .set("compression.type", "lz4")
            // The client checks this before it compresses, headers included; its default, 1,000,000, is
            // below what topics take.
            .set("message.max.bytes", RECORD_BYTES_MAX.to_string())
            // A queue of a million messages costs 39 % more CPU (measured); bytes bound the memory.
            .set("queue.buffering.max.messages", "100000")
            .set("queue.buffering.max.kbytes", "131072");
        self.finish(client)
    }

    /// Lets the operator's own properties win.
    pub(crate) fn finish(&self, mut client: ClientConfig) -> ClientConfig {
        for (key, value) in &self.properties {
            client.set(key, value);
        }
        client
    }

    /// Says whether the configuration is one that librdkafka takes, without connecting.
    ///
    /// # Errors
    /// [`Failure::Stop`] with the property that is refused.
    pub fn check(&self) -> Result<(), Failure> {
        for client in [self.member("check", 1, 8_192), self.writer()] {
            client.create_native_config().map_err(|e| refused_config(&e))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_properties_win_and_a_misspelt_one_is_refused() {
        let mut config = KafkaConfig::new("localhost:1");
        config.properties.insert("compression.type".to_owned(), "zstd".to_owned());
        assert_eq!(config.writer().get("compression.type"), Some("zstd"));
        config.check().expect("librdkafka takes it");
        config.properties.insert("securty.protocol".to_owned(), "ssl".to_owned());
        let refused = config.check().expect_err("no such property").to_string();
        assert!(refused.contains("securty.protocol") && refused.contains("TL-KAFKA-001"), "{refused}");
    }

    #[test]
    fn a_writer_takes_the_largest_record_of_the_catalog_and_its_letter() {
        let config = KafkaConfig::new("localhost:1");
        assert_eq!(config.writer().get("message.max.bytes"), Some(&*RECORD_BYTES_MAX.to_string()));
        config.check().expect("librdkafka takes it");
    }

    #[test]
    fn co_partitioned_topics_are_assigned_by_range_on_both_protocols() {
        let mut config = KafkaConfig::new("localhost:1");
        assert_eq!(config.member("g", 2, 1).get("group.remote.assignor"), Some("range"));
        config.group_protocol = GroupProtocol::Classic;
        let classic = config.member("g", 2, 1);
        assert_eq!(classic.get("partition.assignment.strategy"), Some("range"));
        assert_eq!(classic.get("group.instance.id"), Some("g-0"));
        config.check().expect("librdkafka takes it");
    }
}
