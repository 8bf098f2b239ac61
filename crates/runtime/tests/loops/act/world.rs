//! An act stage among memory ports.

use std::sync::Arc;
use std::time::Duration;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::TopicPartition;
use throughline_model::stage::{Act, Delivery, Input, Kind, StageSpec};
use throughline_runtime::ports::Answer;
use throughline_runtime::{ActLoop, ActPorts, Clock, LoopConfig};
use throughline_telemetry::Health;
use throughline_testkit::{
    Committed, FakeClock, MemoryCluster, MemoryEffector, MemoryReceiver, MemorySchemas, MemorySource,
    MemoryTransactions,
};

pub(super) const GROUP: &str = "send_things";
pub(super) const INPUT: &str = "device.thing.v1";
pub(super) const REPLAY: &str = "device.thing.v1.send_things-replay";
pub(super) const RETRY: &str = "device.thing.v1.send_things-retry";
pub(super) const DLT: &str = "device.thing.v1.send_things-dlt";
pub(super) const TOPICS: [&str; 3] = [INPUT, REPLAY, RETRY];
pub(super) const PARTITIONS: i32 = 2;

/// Sends every text under itself as id; `skip` is not sent, `bad` is refused here, `brief …` expires after a
/// minute.
pub(super) struct SendThings(StageSpec);

impl SendThings {
    pub(super) fn new() -> Self {
        Self(StageSpec {
            group: GROUP,
            kind: Kind::Act,
            inputs: vec![INPUT],
            tables: Vec::new(),
            changelog: None,
            commit_interval: Duration::from_millis(100),
        })
    }
}

impl Act for SendThings {
    fn spec(&self) -> &StageSpec {
        &self.0
    }

    fn request(&mut self, input: &Input<'_>) -> Result<Delivery, Settled> {
        let text = std::str::from_utf8(input.record.value.unwrap_or_default()).unwrap_or_default();
        if text == "skip" {
            return Err(Settled::filtered());
        }
        if text.starts_with("bad") {
            return Err(Settled::dead_lettered("garbage", format!("`{text}` is nothing to send")));
        }
        let minute = input.record.time.plus(Duration::from_secs(60));
        let expires_at = text.starts_with("brief").then_some(minute);
        Ok(Delivery { id: text.to_owned(), body: text.into(), expires_at, ..Delivery::default() })
    }
}

pub(super) type Loop = ActLoop<SendThings, MemoryEffector, MemorySource, MemoryTransactions, MemorySchemas>;
pub(super) type Ports = ActPorts<MemoryEffector, MemorySource, MemoryTransactions, MemorySchemas>;

pub(super) struct World {
    pub(super) clock: FakeClock,
    pub(super) cluster: MemoryCluster,
    pub(super) receiver: MemoryReceiver,
    pub(super) config: LoopConfig,
    pub(super) health: Health,
    pub(super) batch_max: usize,
}

impl World {
    pub(super) fn new() -> Self {
        Self::of_partitions(PARTITIONS)
    }

    pub(super) fn of_partitions(partitions: i32) -> Self {
        let clock = FakeClock::default();
        let cluster = MemoryCluster::new(clock.clone());
        for topic in TOPICS {
            cluster.create_topic(topic, partitions);
        }
        Self {
            receiver: MemoryReceiver::new(&clock),
            config: LoopConfig::default(),
            health: Health::new(),
            batch_max: 10,
            clock,
            cluster,
        }
    }

    pub(super) fn say(&self, partition: i32, text: &str) {
        self.cluster.append(INPUT, partition, Some(b"k"), Some(text.as_bytes()), [("h", b"1".as_slice())]);
    }

    pub(super) fn start(&self, instance: &str) -> (Loop, u64) {
        let (ports, member) = self.ports(instance);
        (ActLoop::new(SendThings::new(), ports, self.config.clone(), self.health.role(GROUP)), member)
    }

    pub(super) fn ports(&self, instance: &str) -> (Ports, u64) {
        let source = MemorySource::join(&self.cluster, GROUP, &TOPICS, self.batch_max);
        let member = source.member();
        let ports = ActPorts {
            effector: self.receiver.port(),
            incarnation: self.cluster.ask_incarnation(),
            transactions: MemoryTransactions::new(&self.cluster, instance, GROUP, &source),
            source,
            schemas: MemorySchemas::new(&self.cluster),
            codec: throughline_testkit::codec(),
            clock: Arc::new(self.clock.clone()),
        };
        (ports, member)
    }

    pub(super) fn is_done(&self) -> bool {
        TOPICS.iter().all(|topic| self.cluster.lag(GROUP, topic) <= 0)
    }

    pub(super) fn settle(&self, running: &mut Loop) {
        for _ in 0..20_000 {
            if self.is_done() {
                return;
            }
            running.turn().unwrap();
        }
        panic!("20,000 turns did not do it");
    }

    /// Turns for so long; returns how often.
    pub(super) fn pass(&self, running: &mut Loop, time: Duration) -> usize {
        let end = self.clock.now().plus(time);
        let mut turns = 0;
        while self.clock.now() < end {
            running.turn().unwrap();
            turns += 1;
        }
        turns
    }

    /// Returns the committed counts by outcome over all partitions of the topics that the group reads.
    pub(super) fn counts(&self) -> [u64; 6] {
        let mut sum = [0; 6];
        for topic in TOPICS {
            for partition in 0..PARTITIONS {
                let at = TopicPartition::new(topic, partition);
                let Some((_, metadata)) = self.cluster.committed(GROUP, &at) else { continue };
                let books = throughline_model::books::Books::from_metadata(&metadata).unwrap();
                for (sum, n) in sum.iter_mut().zip(books.counts) {
                    *sum += n;
                }
            }
        }
        sum
    }

    pub(super) fn of(&self, outcome: Outcome) -> u64 {
        self.counts()[outcome.index()]
    }

    /// Returns code and value of every dead letter.
    pub(super) fn letters(&self) -> Vec<String> {
        let code = |r: &Committed| header(r, "__connect.errors.exception.class.name");
        self.cluster.records(DLT).iter().map(|r| format!("{} {}", code(r), r.value_text())).collect()
    }

    pub(super) fn dependency_is_up(&self) -> bool {
        self.health.status()["roles"][GROUP]["dependencies"]["receiver"]["up"] != false
    }

    /// Lets the receiver fail what begins with `text` while `failing` says so.
    pub(super) fn fail(&self, text: &'static str, mut failing: impl FnMut() -> bool + Send + 'static) {
        self.receiver.answer_with(move |delivery| {
            if delivery.id.starts_with(text) && failing() { failed() } else { Answer::Delivered }
        });
    }
}

pub(super) fn header(record: &Committed, name: &str) -> String {
    String::from_utf8_lossy(record.header(name).unwrap_or_default()).into_owned()
}

pub(super) fn failed() -> Answer {
    Answer::Failed { message: "503".to_owned(), wait: None }
}

pub(super) fn unavailable() -> Answer {
    Answer::Unavailable { message: "connection refused".to_owned() }
}
