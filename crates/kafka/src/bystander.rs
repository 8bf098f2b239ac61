//! Asks the cluster with a client made for the question.
//!
//! librdkafka since 2.10 takes a broker list without brokers at its word (confluentinc/librdkafka issue 5301,
//! open): it gives up every broker and the bootstrap addresses, and connects to nothing any more. A cluster of
//! one node answers so when it comes out of a pause, because it takes itself for dead. Such a client cannot
//! tell whether Kafka is away; another one can.

use crate::config::KafkaConfig;
use crate::context::Logging;
use rdkafka::admin::AdminClient;
use rdkafka::config::FromClientConfigAndContext;
use std::time::Duration;

/// How long the answer may take, with the connection.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Says whether a broker answers and knows of brokers.
pub(crate) fn kafka_answers(config: &KafkaConfig) -> bool {
    look(config).is_some()
}

/// Says whether a broker answers and every partition has a leader.
pub(crate) fn every_partition_has_a_leader(config: &KafkaConfig) -> bool {
    look(config).is_some_and(|leaders| leaders)
}

fn look(config: &KafkaConfig) -> Option<bool> {
    let client = AdminClient::from_config_and_context(&config.client(), Logging).ok()?;
    let metadata = client.inner().fetch_metadata(None, ANSWER_WITHIN).ok()?;
    let mut partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
    (!metadata.brokers().is_empty()).then(|| partitions.all(|partition| partition.leader() >= 0))
}
