//! What the cluster shall have: every topic with its settings, and the schema of each catalog topic.

use super::name::value_subject;
use super::spec::{Cleanup, Key, Retention};
use super::{Catalog, DerivedKind, StageFault};
use crate::stage::StageSpec;
use std::collections::BTreeMap;

/// What differs between one machine and production.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Environment {
    /// Copies of each partition, from 1.
    pub replication: i16,
    /// Copies that must have a record before it is acknowledged, at most `replication`.
    pub min_insync: i16,
}

impl Environment {
    /// One machine: one copy.
    pub const SINGLE: Self = Self { replication: 1, min_insync: 1 };
    /// Production: three copies, of which two must have a record.
    pub const PRODUCTION: Self = Self { replication: 3, min_insync: 2 };
}

/// A topic as it shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredTopic {
    /// Its name.
    pub name: String,
    /// Number of partitions.
    pub partitions: i32,
    /// Copies of each partition.
    pub replication: i16,
    /// Settings of Kafka.
    pub configs: BTreeMap<String, String>,
    /// The name that the topic has with more partitions, where it is a catalog topic.
    pub next_major: Option<String>,
}

/// A schema as it shall be registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredSchema {
    /// The topic whose values it describes.
    pub topic: String,
    /// The registry's subject.
    pub subject: String,
    /// The schema's text.
    pub text: String,
}

/// Everything that the cluster and the registry shall have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Topics: the catalog's, then the derived ones, each by name.
    pub topics: Vec<DesiredTopic>,
    /// Schemas of catalog topics, by subject.
    pub schemas: Vec<DesiredSchema>,
}

/// What a dead letter adds to the record it holds: headers with names, codes and a message. A letter must
/// fit where its record did.
const LETTER_OVERHEAD_BYTES: u64 = 131_072;

/// The largest record of a topic whose file sets no `max.message.bytes`: Kafka's default.
const MESSAGE_BYTES_DEFAULT: u64 = 1_048_588;

/// The largest record that the catalog's topics and their dead-letter topics take. Writers are allowed as
/// much: a smaller bound of the client would refuse a letter or a copy that Kafka takes, and its stage
/// would stop at a record that is legal. Whoever raises `max.message.bytes` of a topic raises
/// `message.max.bytes` of the client as well.
pub const RECORD_BYTES_MAX: u64 = MESSAGE_BYTES_DEFAULT + LETTER_OVERHEAD_BYTES;

/// 90 days, as long as dead letters are kept.
const TOMBSTONES_KEPT_MS: u64 = 7_776_000_000;

impl Catalog {
    /// Returns what the cluster and the registry shall have for `stages`.
    ///
    /// # Errors
    /// See [`Catalog::derived`].
    pub fn desired(
        &self,
        stages: &[StageSpec],
        environment: Environment,
    ) -> Result<Desired, Vec<StageFault>> {
        let derived = self.derived(stages)?;
        let mut desired = Desired::default();
        for topic in self.topics() {
            let spec = &topic.spec;
            let replication = spec.replication.unwrap_or(environment.replication);
            let mut configs = settings(spec.cleanup, spec.retention, environment, replication);
            if spec.cleanup == Cleanup::Compact {
                // Who follows a table, or loads it into a database that is restored, learns what was deleted from
                // the tombstone: it is kept as long as somebody may be away.
                configs.insert("delete.retention.ms".to_owned(), TOMBSTONES_KEPT_MS.to_string());
            }
            configs.extend(spec.config.clone());
            desired.topics.push(DesiredTopic {
                name: spec.name.to_string(),
                partitions: spec.partitions,
                replication,
                configs,
                next_major: (spec.key != Key::None).then(|| spec.name.next_major()),
            });
            desired.schemas.push(DesiredSchema {
                topic: spec.name.to_string(),
                subject: value_subject(spec.name.as_str()),
                text: topic.schema.clone(),
            });
        }
        for topic in derived {
            let origin = self.topic(&topic.origin).map(|t| &t.spec);
            let replication = origin.and_then(|o| o.replication).unwrap_or(environment.replication);
            let mut configs = settings(topic.cleanup, topic.retention, environment, replication);
            if topic.kind == DerivedKind::Changelog {
                // State is read back on every assignment, so little of it may be history.
                configs.insert("min.cleanable.dirty.ratio".to_owned(), "0.1".to_owned());
                configs.insert("segment.ms".to_owned(), "3600000".to_owned());
            } else {
                let bytes = origin.and_then(|o| o.config.get("max.message.bytes")?.parse().ok());
                let bytes = bytes.unwrap_or(MESSAGE_BYTES_DEFAULT) + LETTER_OVERHEAD_BYTES;
                configs.insert("max.message.bytes".to_owned(), bytes.to_string());
            }
            desired.topics.push(DesiredTopic {
                name: topic.name,
                partitions: topic.partitions,
                replication,
                configs,
                next_major: None,
            });
        }
        Ok(desired)
    }
}

fn settings(
    cleanup: Cleanup,
    retention: Option<Retention>,
    environment: Environment,
    replication: i16,
) -> BTreeMap<String, String> {
    let min_insync = environment.min_insync.min(replication);
    let mut settings = BTreeMap::from([
        ("cleanup.policy", cleanup.policy().to_owned()),
        ("message.timestamp.type", "LogAppendTime".to_owned()),
        ("min.insync.replicas", min_insync.to_string()),
        ("unclean.leader.election.enable", "false".to_owned()),
    ]);
    if let Some(retention) = retention {
        settings.insert("retention.ms", retention.as_ms().to_string());
    }
    settings.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
