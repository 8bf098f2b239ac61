//! How far every group is behind, dead and foreign ones too: in records, and in seconds as the age of the
//! first record that was not processed.

use crate::admin::Admin;
use crate::config::KafkaConfig;
use crate::context::Logging;
use crate::failure::{failure, refused_config};
use crate::message::{list, time_of};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_model::record::TopicPartition;
use throughline_model::time::Timestamp;
use throughline_runtime::ports::Failure;

/// How long one snapshot may spend reading the times of records; what is not known then is known next time.
const READING_TIME: Duration = Duration::from_secs(2);
/// The pause between two looks at what came.
const LOOK: Duration = Duration::from_millis(10);
/// Positions whose time is read in one snapshot, at one fetch each.
const READS_MAX: usize = 256;

/// The bounds of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionEnds {
    /// The partition.
    pub partition: TopicPartition,
    /// The first position that still exists.
    pub earliest: i64,
    /// The end (the high watermark).
    pub latest: i64,
}

/// How far a group is behind in one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupLag {
    /// The group's id.
    pub group: String,
    /// `Stable`, `Empty` …, as Kafka spells it.
    pub state: String,
    /// The partition.
    pub partition: TopicPartition,
    /// The committed offset: the next position to read.
    pub next: i64,
    /// Positions between the committed offset and the end, control records included, as Kafka's own tools
    /// count.
    pub lag: i64,
    /// Whether no committed record lies ahead: what is left are control records at most.
    pub caught_up: bool,
    /// The time of the first record that was not processed; `None` where there is none or it is not known
    /// yet.
    pub first_unprocessed: Option<Timestamp>,
}

impl GroupLag {
    /// Returns the age of the first unprocessed record in seconds, 0 where there is none; `None` where it is
    /// not known yet.
    pub fn seconds(&self, now: Timestamp) -> Option<f64> {
        match self.first_unprocessed {
            Some(time) => Some(((now.0 - time.0).max(0) as f64) / 1e6),
            None if self.caught_up => Some(0.0),
            None => None,
        }
    }
}

/// All groups at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LagSnapshot {
    /// The bounds of every partition that a group has committed in.
    pub partitions: Vec<PartitionEnds>,
    /// A row for each group and partition.
    pub groups: Vec<GroupLag>,
}

/// What is known about a position whose record was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// The time of the first record at or after it.
    Time(Timestamp),
    /// There was none up to this end: control records only.
    NothingBefore(i64),
}

/// Takes snapshots; keeps the times of positions, so that a group that stands still costs nothing.
pub struct LagProbe {
    config: KafkaConfig,
    clients: Option<(Admin, Arc<BaseConsumer<Logging>>)>,
    known: HashMap<(TopicPartition, i64), Known>,
}

impl LagProbe {
    /// Makes the clients; connects with the first snapshot.
    ///
    /// # Errors
    /// [`Failure::Stop`] when librdkafka refuses the configuration.
    pub fn new(config: &KafkaConfig) -> Result<Self, Failure> {
        let clients = Some(Self::connect(config)?);
        Ok(Self { config: config.clone(), clients, known: HashMap::new() })
    }

    fn connect(config: &KafkaConfig) -> Result<(Admin, Arc<BaseConsumer<Logging>>), Failure> {
        let mut client = config.reader(&format!("{}-lag", config.client_id));
        client
            .set("auto.offset.reset", "earliest")
            // One record a partition is wanted: fetch little.
            .set("max.partition.fetch.bytes", "16384")
            .set("queued.min.messages", "1")
            .set("queued.max.messages.kbytes", "64");
        let reader: BaseConsumer<Logging> =
            BaseConsumer::from_config_and_context(&client, Logging).map_err(|e| refused_config(&e))?;
        Ok((Admin::new(config)?, Arc::new(reader)))
    }

    /// Returns where all groups are. Takes at most about 2 s beyond the requests themselves. After a failure
    /// the next snapshot is taken with new clients: the old ones may never find the cluster again (see
    /// `bystander`).
    ///
    /// # Errors
    /// [`Failure::Dependency`].
    pub fn snapshot(&mut self) -> Result<LagSnapshot, Failure> {
        let (admin, reader) = match self.clients.take() {
            Some(clients) => clients,
            None => Self::connect(&self.config)?,
        };
        let snapshot = self.take(&admin, &reader)?;
        self.clients = Some((admin, reader));
        Ok(snapshot)
    }

    fn take(&mut self, admin: &Admin, reader: &Arc<BaseConsumer<Logging>>) -> Result<LagSnapshot, Failure> {
        // While no broker can be reached, librdkafka spins over questions about groups: do not ask.
        admin.brokers()?;
        let listed = admin.groups()?;
        let states: HashMap<_, _> = listed.iter().map(|g| (g.group.as_str(), g.state.as_str())).collect();
        let names: Vec<&str> = listed.iter().map(|g| g.group.as_str()).collect();
        let committed = admin.group_offsets(&names)?;
        let mut partitions: Vec<_> =
            committed.iter().flat_map(|g| &g.offsets).map(|o| o.partition.clone()).collect();
        partitions.sort();
        partitions.dedup();
        // The ends after the offsets: a lag is never negative that way.
        let earliest = admin.earliest(&partitions)?;
        let latest = admin.latest(&partitions)?;
        let mut groups = Vec::new();
        for group in &committed {
            for offset in &group.offsets {
                // A deleted topic leaves offsets behind for a while.
                let Some(end) = latest.get(&offset.partition) else { continue };
                groups.push(GroupLag {
                    group: group.group.clone(),
                    state: states.get(group.group.as_str()).copied().unwrap_or_default().to_owned(),
                    partition: offset.partition.clone(),
                    next: offset.next,
                    lag: (end - offset.next).max(0),
                    caught_up: *end <= offset.next,
                    first_unprocessed: None,
                });
            }
        }
        self.find_times(reader, &groups, &latest)?;
        for row in groups.iter_mut().filter(|row| !row.caught_up) {
            match self.known.get(&(row.partition.clone(), row.next)) {
                Some(Known::Time(time)) => row.first_unprocessed = Some(*time),
                Some(Known::NothingBefore(end)) => row.caught_up = latest.get(&row.partition) <= Some(end),
                None => {}
            }
        }
        let ends = |p: TopicPartition| {
            let (earliest, latest) = (*earliest.get(&p)?, *latest.get(&p)?);
            Some(PartitionEnds { partition: p, earliest, latest })
        };
        Ok(LagSnapshot { partitions: partitions.into_iter().filter_map(ends).collect(), groups })
    }

    /// Reads the records at the positions whose time is not known, a partition once a round.
    fn find_times(
        &mut self,
        reader: &Arc<BaseConsumer<Logging>>,
        groups: &[GroupLag],
        latest: &HashMap<TopicPartition, i64>,
    ) -> Result<(), Failure> {
        let current: HashSet<_> = groups.iter().map(|g| (g.partition.clone(), g.next)).collect();
        self.known.retain(|position, _| current.contains(position));
        let unknown =
            |(partition, next): &(TopicPartition, i64)| match self.known.get(&(partition.clone(), *next)) {
                Some(Known::Time(_)) => false,
                Some(Known::NothingBefore(end)) => latest.get(partition) > Some(end),
                None => latest.get(partition) > Some(next),
            };
        let mut wanted: Vec<_> = current.iter().filter(|p| unknown(p)).cloned().collect();
        wanted.sort();
        wanted.truncate(READS_MAX);
        let deadline = Instant::now() + READING_TIME;
        while !wanted.is_empty() && Instant::now() < deadline {
            // Groups may stand at different positions of one partition: each has its round.
            let mut round: HashMap<TopicPartition, i64> = HashMap::new();
            wanted.retain(|(partition, next)| match round.contains_key(partition) {
                true => true,
                false => {
                    round.insert(partition.clone(), *next);
                    false
                }
            });
            self.read_round(reader, round, latest, deadline)?;
        }
        Ok(())
    }

    fn read_round(
        &mut self,
        reader: &Arc<BaseConsumer<Logging>>,
        round: HashMap<TopicPartition, i64>,
        latest: &HashMap<TopicPartition, i64>,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let what = "cannot read the first unprocessed records";
        // A queue each: the event of a partition's end names no topic. Split off before they are assigned.
        let queue = |p: &TopicPartition| reader.split_partition_queue(&p.topic, p.partition);
        let mut waiting: Vec<_> =
            round.iter().filter_map(|(p, next)| Some((p.clone(), *next, queue(p)?))).collect();
        let assigned = reader.assign(&list(round.iter().map(|(p, next)| (p, *next))));
        assigned.map_err(|e| failure(what, &e))?;
        let known = &mut self.known;
        while !waiting.is_empty() && Instant::now() < deadline {
            // Serves errors and log lines, and is the pause between two looks.
            if let Some(Err(error)) = reader.poll(LOOK) {
                tracing::debug!("{what}: {error}");
            }
            waiting.retain(|(partition, next, queue)| match queue.poll(Duration::ZERO) {
                None => true,
                Some(Ok(message)) => {
                    known.insert((partition.clone(), *next), Known::Time(time_of(&message)));
                    false
                }
                Some(Err(KafkaError::PartitionEOF(_))) => {
                    let end = latest.get(partition).copied().unwrap_or(*next);
                    known.insert((partition.clone(), *next), Known::NothingBefore(end));
                    false
                }
                // librdkafka goes on trying; the deadline bounds it.
                Some(Err(error)) => {
                    tracing::debug!(%partition, "{what}: {error}");
                    true
                }
            });
        }
        drop(waiting);
        let none = rdkafka::topic_partition_list::TopicPartitionList::new();
        reader.assign(&none).map_err(|e| failure(what, &e))
    }
}
