//! Topics and groups of a cluster, for operators' commands. Nothing here deletes.

use crate::bounds::list_offsets;
use crate::config::{KafkaConfig, REQUEST_TIMEOUT};
use crate::context::Logging;
use crate::failure::{by_code, dependency, failure, ffi_failure, refused_config};
use futures::executor::block_on;
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigSource, NewTopic as NewKafkaTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::time::Duration;
use throughline_kafka_ffi as ffi;
use throughline_model::record::TopicPartition;
use throughline_model::time::Timestamp;
use throughline_runtime::ports::Failure;

pub use throughline_kafka_ffi::{GroupDescription, GroupListing, Member};

/// How long the brokers may take to make a topic everywhere.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);

/// A topic to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTopic {
    /// Its name.
    pub name: String,
    /// Its number of partitions.
    pub partitions: i32,
    /// Copies of each partition.
    pub replication: i32,
    /// Its configuration.
    pub configs: BTreeMap<String, String>,
}

/// A topic as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicState {
    /// Its name.
    pub name: String,
    /// Its number of partitions.
    pub partitions: i32,
    /// The smallest number of copies of a partition.
    pub replication: i32,
    /// Partitions without a leader, and partitions with copies that are not in sync.
    pub degraded_partitions: i32,
    /// The configuration in force, whoever set it.
    pub configs: BTreeMap<String, ConfigValue>,
}

/// A configuration value in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigValue {
    /// The value.
    pub value: String,
    /// Whether it was set on the topic itself and not on the broker or by default.
    pub set_on_topic: bool,
}

/// A committed offset of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedOffset {
    /// The partition.
    pub partition: TopicPartition,
    /// The next position to read.
    pub next: i64,
    /// The metadata beside it; bytes that are not UTF-8 are replaced.
    pub metadata: String,
}

/// A group's committed offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupOffsets {
    /// The group's id.
    pub group: String,
    /// Its offsets by partition.
    pub offsets: Vec<CommittedOffset>,
}

/// A connection for administration. Blocking; each request takes at most 10 s.
pub struct Admin {
    client: AdminClient<Logging>,
    config: KafkaConfig,
    /// Asks for the offsets of groups, from the first time on.
    consumer: OnceLock<BaseConsumer<Logging>>,
    /// Asked once: librdkafka keeps it too, and rdkafka 0.39 leaks the copy that each call returns.
    cluster_id: OnceLock<String>,
}

impl Admin {
    /// Makes the client; connects with the first request.
    ///
    /// # Errors
    /// [`Failure::Stop`] when librdkafka refuses the configuration.
    pub fn new(config: &KafkaConfig) -> Result<Self, Failure> {
        let client = AdminClient::from_config_and_context(&config.client(), Logging);
        let client = client.map_err(|e| refused_config(&e))?;
        let (config, consumer) = (config.clone(), OnceLock::new());
        Ok(Self { client, config, consumer, cluster_id: OnceLock::new() })
    }

    /// Returns the cluster's id. Says nothing about whether a broker is alive once it is known.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when no broker answered yet.
    pub fn cluster_id(&self) -> Result<String, Failure> {
        if let Some(id) = self.cluster_id.get() {
            return Ok(id.clone());
        }
        let id = self.client.inner().fetch_cluster_id(REQUEST_TIMEOUT);
        let id =
            id.ok_or_else(|| dependency(format!("no Kafka broker answers at {}", self.config.bootstrap)))?;
        Ok(self.cluster_id.get_or_init(|| id).clone())
    }

    /// Returns the number of brokers that are alive.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when none answers.
    pub fn brokers(&self) -> Result<usize, Failure> {
        let metadata = self.client.inner().fetch_metadata(None, REQUEST_TIMEOUT);
        let what = format!("cannot ask the brokers at {}", self.config.bootstrap);
        Ok(metadata.map_err(|e| failure(&what, &e))?.brokers().len())
    }

    /// Returns the names and partition counts of all topics, Kafka's own ones too.
    ///
    /// # Errors
    /// [`Failure::Dependency`].
    pub fn topics(&self) -> Result<BTreeMap<String, i32>, Failure> {
        let metadata = self.client.inner().fetch_metadata(None, REQUEST_TIMEOUT);
        let metadata = metadata.map_err(|e| failure("cannot list topics", &e))?;
        let topic = |t: &rdkafka::metadata::MetadataTopic| (t.name().to_owned(), t.partitions().len() as i32);
        Ok(metadata.topics().iter().map(topic).collect())
    }

    /// Returns those of the topics that exist, with their configuration.
    ///
    /// # Errors
    /// [`Failure::Dependency`].
    pub fn describe(&self, topics: &[&str]) -> Result<Vec<TopicState>, Failure> {
        let metadata = self.client.inner().fetch_metadata(None, REQUEST_TIMEOUT);
        let metadata = metadata.map_err(|e| failure("cannot describe topics", &e))?;
        let mut states = Vec::new();
        for topic in metadata.topics().iter().filter(|t| topics.contains(&t.name()) && t.error().is_none()) {
            let parts = topic.partitions();
            let degraded = parts.iter().filter(|p| p.leader() < 0 || p.isr().len() < p.replicas().len());
            states.push(TopicState {
                name: topic.name().to_owned(),
                partitions: parts.len() as i32,
                replication: parts.iter().map(|p| p.replicas().len()).min().unwrap_or_default() as i32,
                degraded_partitions: degraded.count() as i32,
                configs: BTreeMap::new(),
            });
        }
        self.fill_configs(&mut states)?;
        Ok(states)
    }

    fn fill_configs(&self, states: &mut [TopicState]) -> Result<(), Failure> {
        if states.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = states.iter().map(|s| s.name.clone()).collect();
        let resources: Vec<_> = names.iter().map(|n| ResourceSpecifier::Topic(n)).collect();
        let options = AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT));
        let found = block_on(self.client.describe_configs(&resources, &options));
        let what = "cannot read the configuration of topics";
        for (state, resource) in states.iter_mut().zip(found.map_err(|e| failure(what, &e))?) {
            let what = format!("{what}: `{}`", state.name);
            let resource = resource.map_err(|code| by_code(&what, code, &code.to_string()))?;
            for entry in resource.entries {
                let set_on_topic = matches!(entry.source, ConfigSource::DynamicTopic);
                let value = entry.value.unwrap_or_default();
                state.configs.insert(entry.name, ConfigValue { value, set_on_topic });
            }
        }
        Ok(())
    }

    /// Makes topics and waits until the controller has made them. One that exists already is left as it is.
    ///
    /// # Errors
    /// [`Failure::Stop`] when a topic is refused, with its name; earlier ones are made.
    pub fn create_topics(&self, topics: &[NewTopic]) -> Result<(), Failure> {
        if topics.is_empty() {
            return Ok(());
        }
        let new: Vec<_> = topics.iter().map(new_topic).collect();
        let options = AdminOptions::new()
            .request_timeout(Some(OPERATION_TIMEOUT))
            .operation_timeout(Some(OPERATION_TIMEOUT));
        let made = block_on(self.client.create_topics(&new, &options));
        for result in made.map_err(|e| failure("cannot create topics", &e))? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    let what = format!("cannot create topic `{name}`");
                    return Err(match by_code(&what, code, &code.to_string()) {
                        // What the broker answered is about the topic, not about its availability.
                        Failure::Dependency { message, .. } if !is_passing(code) => {
                            Failure::Stop { code: "TL-KAFKA-004", message }
                        }
                        other => other,
                    });
                }
            }
        }
        Ok(())
    }

    /// Sets configuration keys of a topic and leaves the others as they are.
    ///
    /// # Errors
    /// [`Failure::Stop`] when a value is refused.
    pub fn set_configs(&self, topic: &str, configs: &[(&str, &str)]) -> Result<(), Failure> {
        let what = format!("cannot configure topic `{topic}`");
        let set = ffi::set_topic_configs(self.client.inner(), topic, configs, REQUEST_TIMEOUT);
        set.map_err(|e| ffi_failure(&what, &e))
    }

    /// Returns the ids of topics; one that was deleted and made again has another. Unknown ones are absent.
    ///
    /// # Errors
    /// [`Failure::Dependency`].
    pub fn topic_ids(&self, topics: &[&str]) -> Result<BTreeMap<String, String>, Failure> {
        let what = "cannot ask for topic ids";
        let mut ids = BTreeMap::new();
        let found = ffi::topic_ids(self.client.inner(), topics, REQUEST_TIMEOUT);
        for (topic, id) in found.map_err(|e| ffi_failure(what, &e))? {
            match id {
                Ok(id) => drop(ids.insert(topic, id)),
                Err(e) if is_unknown_topic(e.code) => {}
                Err(e) => return Err(ffi_failure(what, &e)),
            }
        }
        Ok(ids)
    }

    /// Returns every group, also those without members.
    ///
    /// # Errors
    /// [`Failure::Dependency`], also when one broker alone does not answer.
    pub fn groups(&self) -> Result<Vec<GroupListing>, Failure> {
        let groups = ffi::list_groups(self.client.inner(), REQUEST_TIMEOUT);
        groups.map_err(|e| ffi_failure("cannot list groups", &e))
    }

    /// Describes groups with their members.
    ///
    /// # Errors
    /// [`Failure::Dependency`]; an error of one group is in its description.
    pub fn describe_groups(&self, groups: &[&str]) -> Result<Vec<GroupDescription>, Failure> {
        let found = ffi::describe_groups(self.client.inner(), groups, REQUEST_TIMEOUT);
        found.map_err(|e| ffi_failure("cannot describe groups", &e))
    }

    /// Returns the committed offsets of groups with their metadata.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when one of them cannot be read.
    pub fn group_offsets(&self, groups: &[&str]) -> Result<Vec<GroupOffsets>, Failure> {
        let consumer = match self.consumer.get() {
            Some(consumer) => consumer,
            None => {
                // Nothing is ever joined or committed under this name.
                let client = self.config.reader(&format!("{}-reader", self.config.client_id));
                let made = BaseConsumer::from_config_and_context(&client, Logging);
                let made = made.map_err(|e| refused_config(&e))?;
                self.consumer.get_or_init(|| made)
            }
        };
        let found = ffi::group_offsets(consumer.client(), groups, REQUEST_TIMEOUT);
        let found = found.map_err(|e| ffi_failure("cannot read the offsets of groups", &e))?;
        let mut all = Vec::with_capacity(found.len());
        for (group, offsets) in found {
            let what = format!("cannot read the offsets of group `{group}`");
            let offset = |e: ffi::Entry| CommittedOffset {
                partition: TopicPartition::new(e.topic, e.partition),
                next: e.offset,
                metadata: String::from_utf8_lossy(&e.metadata).into_owned(),
            };
            let offsets = offsets.map_err(|e| ffi_failure(&what, &e))?.into_iter().map(offset).collect();
            all.push(GroupOffsets { group, offsets });
        }
        Ok(all)
    }

    /// Returns the first position that still exists of each partition; unknown partitions are absent.
    ///
    /// # Errors
    /// [`Failure::Dependency`].
    pub fn earliest(&self, partitions: &[TopicPartition]) -> Result<HashMap<TopicPartition, i64>, Failure> {
        self.offsets(partitions, ffi::OffsetSpec::Earliest)
    }

    /// Returns the end of each partition (the high watermark); unknown partitions are absent.
    ///
    /// # Errors
    /// [`Failure::Dependency`].
    pub fn latest(&self, partitions: &[TopicPartition]) -> Result<HashMap<TopicPartition, i64>, Failure> {
        self.offsets(partitions, ffi::OffsetSpec::Latest)
    }

    /// Returns for each partition the first position whose record is not older than `time`, −1 where every
    /// record is older.
    ///
    /// # Errors
    /// [`Failure::Dependency`].
    pub fn offsets_at(
        &self,
        partitions: &[TopicPartition],
        time: Timestamp,
    ) -> Result<HashMap<TopicPartition, i64>, Failure> {
        self.offsets(partitions, ffi::OffsetSpec::AtOrAfter(time.as_millis()))
    }

    fn offsets(
        &self,
        partitions: &[TopicPartition],
        spec: ffi::OffsetSpec,
    ) -> Result<HashMap<TopicPartition, i64>, Failure> {
        let what = "cannot ask for the positions of partitions";
        let asked: Vec<_> = partitions.iter().map(|p| (&*p.topic, p.partition)).collect();
        let found = list_offsets(self.client.inner(), &asked, spec, false, REQUEST_TIMEOUT);
        let mut offsets = HashMap::with_capacity(asked.len());
        for entry in found.map_err(|e| ffi_failure(what, &e))? {
            match entry.error {
                None => {
                    offsets.insert(TopicPartition::new(&*entry.topic, entry.partition), entry.offset);
                }
                Some(code) if is_unknown_topic(code) => {}
                Some(code) => return Err(by_code(what, code, &code.to_string())),
            }
        }
        Ok(offsets)
    }
}

fn new_topic(topic: &NewTopic) -> NewKafkaTopic<'_> {
    let replication = TopicReplication::Fixed(topic.replication);
    let new = NewKafkaTopic::new(&topic.name, topic.partitions, replication);
    topic.configs.iter().fold(new, |new, (key, value)| new.set(key, value))
}

fn is_unknown_topic(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownPartition
    )
}

fn is_passing(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::OperationTimedOut
            | RDKafkaErrorCode::RequestTimedOut
            | RDKafkaErrorCode::BrokerTransportFailure
            | RDKafkaErrorCode::AllBrokersDown
            | RDKafkaErrorCode::NotController
    )
}

/// Commits offsets with their books for a group that has no members, as an operator decided.
///
/// # Errors
/// [`Failure::Dependency`] when Kafka cannot be reached or refuses, as it does while the group has members.
pub fn commit_for_group(
    config: &KafkaConfig,
    group: &str,
    advances: &[throughline_runtime::ports::Advance],
) -> Result<(), Failure> {
    let client = config.reader(group);
    let consumer: BaseConsumer<Logging> =
        BaseConsumer::from_config_and_context(&client, Logging).map_err(|e| refused_config(&e))?;
    let mut offsets = TopicPartitionList::new();
    for advance in advances {
        let TopicPartition { topic, partition } = &advance.partition;
        let added = offsets.add_partition_offset(topic, *partition, Offset::Offset(advance.to));
        added.map_err(|e| failure("cannot state an offset", &e))?;
        let mut entry = offsets.find_partition(topic, *partition).expect("put in just before");
        entry.set_metadata(advance.books.to_metadata());
    }
    let what = format!("cannot commit offsets of group `{group}`");
    consumer.commit(&offsets, CommitMode::Sync).map_err(|e| failure(&what, &e))
}
