//! Scenarios on a real Kafka with a schema registry, as a stage runs in production.

use super::world::{Found, REASON_HEADER, World};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_kafka::{
    AckedProducer, BatchBounds, GroupSource, KafkaConfig, RegistryClient, RegistryConfig, TopicReader,
    TransactionalProducer, ask_incarnation,
};
use throughline_local::kafka::{KafkaOptions, ManagedKafka};
use throughline_local::registry::EmbeddedRegistry;
use throughline_model::catalog::{Catalog, Desired, Environment};
use throughline_model::codec::Codec;
use throughline_model::record::{Outbox, TopicPartition};
use throughline_model::stage::Decide;
use throughline_runtime::ports::{Failure, Outlet};
use throughline_runtime::{AskIncarnation, Clock, WallClock};
use throughline_stages::bridge_data::BridgeData;
use throughline_stages::evaluate_rules::EvaluateRules;
use throughline_stages::update_twin::UpdateTwin;

/// How long a topic may take to be read to its end on a busy machine.
const READ_WITHIN: Duration = Duration::from_secs(30);
/// A successor hears of its partitions with a heartbeat, and a scenario has many successors.
const HEARTBEATS: [(&str, &str); 2] =
    [("group.consumer.min.heartbeat.interval.ms", "100"), ("group.consumer.heartbeat.interval.ms", "100")];
/// A seek waits for the fetch that is under way, which the broker holds for 500 ms where nothing comes.
const FETCH_WAIT_MS: &str = "20";

/// A broker and a registry with the topics of the catalog.
pub struct KafkaWorld {
    config: KafkaConfig,
    registry: RegistryClient,
    codec: Arc<Codec>,
    topics: Desired,
    admin: Admin,
    writer: AckedProducer,
    // Dropped in this order: the registry's writer before its broker, the broker before its directory.
    _registry: EmbeddedRegistry,
    _kafka: ManagedKafka,
    _directory: tempfile::TempDir,
}

/// Returns what `topics apply` makes for the decide stages.
pub(super) fn desired(catalog: &Catalog) -> Desired {
    let specs = [
        EvaluateRules::new().spec().clone(),
        UpdateTwin::default().spec().clone(),
        BridgeData::default().spec().clone(),
    ];
    catalog.desired(&specs, Environment::SINGLE).expect("the stages of this build fit its catalog")
}

pub(super) fn is_compacted(topics: &Desired, topic: &str) -> bool {
    let found = topics.topics.iter().find(|t| t.name == topic);
    found.and_then(|t| t.configs.get("cleanup.policy")).is_some_and(|policy| policy.contains("compact"))
}

impl KafkaWorld {
    /// Starts broker and registry and makes topics and schemas.
    ///
    /// # Panics
    /// When something does not start.
    pub fn start() -> Self {
        let directory = throughline_local::scratch_dir().expect("a scratch directory");
        let mut options = KafkaOptions::new(directory.path().join("kafka"));
        options.settings = HEARTBEATS.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
        let kafka = ManagedKafka::start(options, &mut |_| {}).expect("Kafka starts");
        let mut config = KafkaConfig::new(kafka.bootstrap());
        config.properties.insert("fetch.wait.max.ms".to_owned(), FETCH_WAIT_MS.to_owned());
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let served = EmbeddedRegistry::start(listen, &config).expect("the registry starts");
        let registry = RegistryClient::new(&RegistryConfig { url: served.url(), authorization: None });
        let topics = desired(&Catalog::embedded());
        let codec = Codec::default();
        for schema in &topics.schemas {
            let id = registry.register(&schema.subject, &schema.text).expect("the registry takes the schema");
            codec.bind(&schema.topic, id, &schema.text).expect("the schema is valid");
        }
        let new = topics.topics.iter().map(|topic| NewTopic {
            name: topic.name.clone(),
            partitions: topic.partitions,
            replication: i32::from(topic.replication),
            configs: topic.configs.clone(),
        });
        let admin = Admin::new(&config).expect("an admin client");
        admin.create_topics(&new.collect::<Vec<_>>()).expect("the topics are made");
        let world = Self {
            writer: AckedProducer::new(&config),
            admin,
            config,
            registry,
            codec: Arc::new(codec),
            topics,
            _registry: served,
            _kafka: kafka,
            _directory: directory,
        };
        // The controller has made them; a moment later they have leaders.
        for topic in &world.topics.topics {
            crate::wait_for(&topic.name, READ_WITHIN, || world.ends(&topic.name).ok());
        }
        world
    }
}

impl World for KafkaWorld {
    type Source = GroupSource;
    type Transactions = TransactionalProducer;
    type Tables = TopicReader;
    type Schemas = RegistryClient;

    fn name(&self) -> &'static str {
        "on Kafka"
    }

    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(WallClock)
    }

    fn codec(&self) -> Arc<Codec> {
        Arc::clone(&self.codec)
    }

    fn join(&self, group: &str, topics: &[&str]) -> Result<(GroupSource, TransactionalProducer), Failure> {
        let source = GroupSource::join(&self.config, group, topics, BatchBounds::default())?;
        let transactions = TransactionalProducer::new(&self.config, group, source.membership());
        Ok((source, transactions))
    }

    fn ask_incarnation(&self, topics: &[&str], changelog: Option<&str>) -> AskIncarnation {
        ask_incarnation(&self.config, topics, changelog)
    }

    fn tables(&self) -> TopicReader {
        TopicReader::new(&self.config)
    }

    fn schemas(&self) -> RegistryClient {
        self.registry.clone()
    }

    fn append(&mut self, records: &Outbox) -> Result<(), Failure> {
        self.writer.send_all(records)
    }

    fn ends(&self, topic: &str) -> Result<Vec<(TopicPartition, i64)>, Failure> {
        let desired = self.topics.topics.iter().find(|t| t.name == topic);
        let count = desired.map_or(0, |t| t.partitions);
        let partitions: Vec<_> = (0..count).map(|number| TopicPartition::new(topic, number)).collect();
        Ok(self.admin.latest(&partitions)?.into_iter().collect())
    }

    fn committed(&self, group: &str) -> Result<BTreeMap<TopicPartition, (i64, String)>, Failure> {
        let groups = self.admin.group_offsets(&[group])?;
        let offsets = groups.into_iter().flat_map(|g| g.offsets).filter(|o| o.next >= 0);
        Ok(offsets.map(|o| (o.partition, (o.next, o.metadata))).collect())
    }

    fn records(&self, topic: &str) -> Result<Vec<Found>, Failure> {
        let mut found = Vec::new();
        // A client of its own for each of many empty dead-letter topics would cost more than all the rest.
        if self.ends(topic)?.iter().all(|(_, end)| *end == 0) {
            return Ok(found);
        }
        let stop = Stop::AtEnd { within: READ_WITHIN };
        let is_whole = browse(&self.config, topic, &[], Begin::Earliest, stop, &mut |batch| {
            found.extend(batch.iter().map(|record| Found {
                key: record.key_str().unwrap_or_default().to_owned(),
                value: record.value.map(<[u8]>::to_vec),
                reason: record.headers.last(REASON_HEADER).map(|v| String::from_utf8_lossy(v).into_owned()),
            }));
            ControlFlow::Continue(())
        })?;
        if is_whole {
            return Ok(found);
        }
        let message = format!("the end of {topic} was not reached within {READ_WITHIN:?}");
        Err(Failure::Dependency { dependency: "kafka", message })
    }

    fn is_compacted(&self, topic: &str) -> bool {
        is_compacted(&self.topics, topic)
    }
}
