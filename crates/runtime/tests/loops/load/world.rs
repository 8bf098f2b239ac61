//! A load stage of the simplest kind over the in-memory ports.

use super::*;

pub(super) const GROUP: &str = "load_things";
pub(super) const INPUT: &str = "device.thing.v1";
pub(super) const DLT: &str = "device.thing.v1.load_things-dlt";
pub(super) const PARTITIONS: i32 = 2;

/// Makes a row of every number, two of an even one; the row names its position, so a repeat shows.
pub(super) struct LoadThings(StageSpec);

impl LoadThings {
    pub(super) fn new() -> Self {
        Self(StageSpec {
            group: GROUP,
            kind: Kind::Load,
            inputs: vec![INPUT],
            tables: Vec::new(),
            changelog: None,
            commit_interval: Duration::from_millis(100),
        })
    }
}

impl Load for LoadThings {
    fn spec(&self) -> &StageSpec {
        &self.0
    }

    fn rows(&mut self, input: &Input<'_>, rows: &mut Rows) -> Settled {
        let text = std::str::from_utf8(input.record.value.unwrap_or_default()).unwrap_or_default();
        if text == "skip" {
            return Settled::filtered();
        }
        let Ok(number) = text.parse::<f64>() else {
            return Settled::dead_lettered("not_a_number", format!("`{text}` is not a number"));
        };
        let copies = if number % 2.0 == 0.0 { 2 } else { 1 };
        for copy in 0..copies {
            let way = if input.replayed { "replayed " } else { "" };
            let name = format!("{way}{}/{}@{}#{copy}", input.topic, input.partition, input.record.offset);
            rows.readings.push(ReadingRow { name, number: Some(number), ..ReadingRow::default() });
        }
        Settled::emitted()
    }
}

pub(super) fn replay(stage: &str) -> String {
    format!("{INPUT}.{stage}-replay")
}

pub(super) type Loop = LoadLoop<LoadThings, MemorySource, MemoryStore, MemoryOutlet, MemorySchemas>;

pub(super) struct World {
    pub(super) clock: FakeClock,
    pub(super) cluster: MemoryCluster,
    pub(super) store: MemoryStore,
    pub(super) config: LoopConfig,
    pub(super) batch_max: usize,
    pub(super) stage: &'static str,
}

impl World {
    pub(super) fn new() -> Self {
        Self::named(GROUP)
    }

    /// Makes one whose stage has a name of its own, which keeps its metrics apart from those of other tests.
    pub(super) fn named(stage: &'static str) -> Self {
        let clock = FakeClock::default();
        let cluster = MemoryCluster::new(clock.clone());
        cluster.create_topic(INPUT, PARTITIONS);
        cluster.create_topic(&replay(stage), PARTITIONS);
        let store = MemoryStore::new(cluster.faults());
        Self { clock, cluster, store, config: LoopConfig::default(), batch_max: 10, stage }
    }

    pub(super) fn say(&self, partition: i32, value: &str) {
        self.cluster.append(INPUT, partition, Some(b"k"), Some(value.as_bytes()), []);
    }

    pub(super) fn start(&self) -> (Loop, u64) {
        let (ports, member) = self.ports();
        let mut stage = LoadThings::new();
        stage.0.group = self.stage;
        (LoadLoop::new(stage, ports, self.config.clone(), Health::new().role(self.stage)), member)
    }

    pub(super) fn ports(&self) -> (LoadPorts<MemorySource, MemoryStore, MemoryOutlet, MemorySchemas>, u64) {
        let topics = [INPUT, &replay(self.stage)];
        let source = MemorySource::join(&self.cluster, self.stage, &topics, self.batch_max);
        let member = source.member();
        let ports = LoadPorts {
            source,
            store: self.store.clone(),
            outlet: MemoryOutlet::new(&self.cluster),
            schemas: MemorySchemas::new(&self.cluster),
            incarnation: self.cluster.ask_incarnation(),
            codec: throughline_testkit::codec(),
            clock: Arc::new(self.clock.clone()),
        };
        (ports, member)
    }

    pub(super) fn position(&self, partition: i32) -> i64 {
        self.store.position(self.stage, &TopicPartition::new(INPUT, partition)).map_or(0, |(next, _)| next)
    }

    pub(super) fn is_done(&self) -> bool {
        let is_read = |topic: &str| {
            let records = self.cluster.records(topic);
            let end = |p| records.iter().filter(|r| r.partition == p).map(|r| r.offset + 1).max();
            let position = |p| self.store.position(self.stage, &TopicPartition::new(topic, p));
            (0..PARTITIONS).all(|p| end(p).is_none_or(|end| position(p).is_some_and(|(next, _)| next >= end)))
        };
        is_read(INPUT) && is_read(&replay(self.stage))
    }

    pub(super) fn settle(&self, running: &mut Loop) {
        for _ in 0..10_000 {
            if self.is_done() {
                return;
            }
            running.turn().unwrap();
        }
        panic!("10,000 turns did not do it");
    }

    pub(super) fn pass(&self, running: &mut Loop, time: Duration) {
        let end = self.clock.now().plus(time);
        while self.clock.now() < end {
            running.turn().unwrap();
        }
    }

    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.store.rows().readings.into_iter().map(|row| row.name).collect();
        names.sort();
        names
    }

    pub(super) fn counts(&self) -> [u64; 6] {
        let mut sum = [0; 6];
        for topic in [INPUT, &replay(self.stage)] {
            for partition in 0..PARTITIONS {
                let Some((_, books)) =
                    self.store.position(self.stage, &TopicPartition::new(topic, partition))
                else {
                    continue;
                };
                for (sum, n) in sum.iter_mut().zip(books.counts) {
                    *sum += n;
                }
            }
        }
        sum
    }

    pub(super) fn workload(&self, seed: u64, records: u64) {
        let mut random = Random(seed);
        for number in 0..records {
            let value = match random.below(20) {
                0 => "skip".to_owned(),
                1 => "bad".to_owned(),
                2 => format!("{}", 1_000_000 + number),
                _ => number.to_string(),
            };
            self.say(random.below(2) as i32, &value);
            if number % 7 == 0 {
                // A letter that comes once more, for better or worse.
                let headers: [(&str, &[u8]); 2] = [("tl-replay-id", b"r"), ("tl-replay-count", b"1")];
                let topic = replay(self.stage);
                self.cluster.append(&topic, 0, Some(b"k"), Some(value.as_bytes()), headers);
            }
        }
        self.store.refuse(|row| row.number.is_some_and(|n| n >= 1_000_000.0));
    }

    pub(super) fn letters(&self) -> Vec<String> {
        let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
        let name = |r: &throughline_testkit::Committed| {
            let of = |header: &str| text(r.header(&format!("__connect.errors.{header}")));
            format!("{}@{} {} {}", of("partition"), of("offset"), of("stage"), of("exception.class.name"))
        };
        self.cluster.records(DLT).iter().map(name).collect()
    }
}

pub(super) fn drive(world: &World, random: &mut Random, kill_one_in: Option<u64>) {
    let start = || {
        world.cluster.faults().revive();
        world.start().0
    };
    drive_until(world.start().0, start, |p| p.turn(), || world.is_done(), random, kill_one_in);
}

/// Rows, outcomes and (once each) dead letters.
pub(super) fn result(world: &World) -> (Vec<String>, [u64; 6], Vec<String>) {
    let mut letters = world.letters();
    letters.sort();
    // A dead letter of a load stage is written before the offset moves: a kill in between repeats it.
    letters.dedup();
    (world.names(), world.counts(), letters)
}
