//! Asks the cluster with a client made for the question.
//!
//! librdkafka since 2.10 takes a broker list without brokers at its word (confluentinc/librdkafka issue 5301,
//! open): it gives up every broker and the bootstrap addresses, and connects to nothing any more. A cluster of
//! one node answers so when it comes out of a pause, because it takes itself for dead. Such a client cannot
//! tell whether Kafka is away; another one can, if it is asked the same: where only a part of the cluster is
//! away, other brokers answer, and a new client would not help.

use crate::admin::Admin;
use crate::bounds::list_offsets;
use crate::config::KafkaConfig;
use crate::context::Logging;
use rdkafka::admin::AdminClient;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::KafkaResult;
use std::time::Duration;
use throughline_kafka_ffi::OffsetSpec;

/// How long the answer may take, with the connection.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Says whether the leaders of all these partitions answer; without any, whether a broker does that knows of
/// brokers.
pub(crate) fn partitions_answer(config: &KafkaConfig, partitions: &[(&str, i32)]) -> bool {
    if partitions.is_empty() {
        return look(config).is_some();
    }
    let Ok(client) = client(config) else { return false };
    let found = list_offsets(client.inner(), partitions, OffsetSpec::Latest, false, ANSWER_WITHIN);
    found.is_ok_and(|found| found.iter().all(|entry| entry.error.is_none()))
}

/// Says whether the coordinator of a group answers.
pub(crate) fn coordinator_answers(config: &KafkaConfig, group: &str) -> bool {
    // While no broker can be reached, librdkafka spins over questions about groups: do not ask.
    look(config).is_some() && Admin::new(config).is_ok_and(|admin| admin.group_offsets(&[group]).is_ok())
}

/// Says whether a broker answers and every partition has a leader.
pub(crate) fn every_partition_has_a_leader(config: &KafkaConfig) -> bool {
    look(config).is_some_and(|leaders| leaders)
}

fn look(config: &KafkaConfig) -> Option<bool> {
    let metadata = client(config).ok()?.inner().fetch_metadata(None, ANSWER_WITHIN).ok()?;
    let mut partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
    (!metadata.brokers().is_empty()).then(|| partitions.all(|partition| partition.leader() >= 0))
}

fn client(config: &KafkaConfig) -> KafkaResult<AdminClient<Logging>> {
    AdminClient::from_config_and_context(&config.client(), Logging)
}
