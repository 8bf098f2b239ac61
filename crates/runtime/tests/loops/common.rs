//! A world for the loops: the in-memory cluster, a stage that counts, and ways to drive it.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::codec::{Codec, CodecError};
use throughline_model::envelope::DeviceMessage;
use throughline_model::keyed::{Keyed, KeyedState};
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Headers, TopicPartition};
use throughline_model::stage::{Decide, Effects, Input, Kind, StageSpec};
use throughline_model::time::Timestamp;
use throughline_runtime::{Clock, DecideLoop, DecidePorts, LoopConfig, Stopped};
use throughline_telemetry::{Health, Metric, counter, gauge};
use throughline_testkit::{
    FakeClock, KILLED, MemoryCluster, MemorySchemas, MemorySource, MemoryTables, MemoryTransactions,
};

pub const GROUP: &str = "count_things";
pub const INPUT: &str = "device.thing.v1";
pub const SECOND: &str = "device.other.v1";
pub const OUTPUT: &str = "data_core.count.v1";
pub const TABLE: &str = "service_platform.factor.v1";
pub const CHANGELOG: &str = "device.thing.v1.count_things-changelog";
pub const DLT: &str = "device.thing.v1.count_things-dlt";
pub const REPLAY: &str = "device.thing.v1.count_things-replay";

/// What the stage knows of a key.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Count {
    count: u64,
    sum: i64,
    due: Option<Timestamp>,
}

impl KeyedState for Count {
    fn encode(&self, _: &Codec, out: &mut Vec<u8>) -> Result<(), CodecError> {
        serde_json::to_writer(out, self).unwrap();
        Ok(())
    }

    fn decode(bytes: &[u8], _: &Codec) -> Result<Self, CodecError> {
        serde_json::from_slice(bytes).map_err(|e| CodecError::Datum { id: 0, why: e.to_string() })
    }
}

/// Counts and sums by key. Values are commands: `add:N`, `skip`, `old`, `bad`, `arm:SECONDS`, `stuck`,
/// `misfit`, or a framed device message.
pub struct CountThings {
    spec: StageSpec,
    factor: i64,
}

impl CountThings {
    pub fn new(inputs: &[&'static str], tables: &[&'static str]) -> Self {
        let spec = StageSpec {
            group: GROUP,
            kind: Kind::Decide,
            inputs: inputs.to_vec(),
            tables: tables.to_vec(),
            changelog: Some(CHANGELOG.to_owned()),
            commit_interval: Duration::from_millis(50),
        };
        Self { spec, factor: 1 }
    }
}

fn emit(effects: &mut Effects, key: &str, text: &str) {
    effects.emit_raw(OUTPUT, None, Some(key.as_bytes()), Some(text.as_bytes()), Headers::default());
}

impl Decide for CountThings {
    type State = Count;

    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    fn table(&mut self, input: &Input<'_>) -> Settled {
        let text = std::str::from_utf8(input.record.value.unwrap_or_default()).unwrap_or_default();
        match text.parse() {
            Ok(factor) => {
                self.factor = factor;
                Settled::emitted()
            }
            Err(_) => Settled::dead_lettered("not_a_number", text),
        }
    }

    fn process(&mut self, input: &Input<'_>, state: &mut Keyed<Count>, effects: &mut Effects) -> Settled {
        let key = input.record.key_str().unwrap_or("none");
        let value = input.record.value.unwrap_or_default();
        if value.first() == Some(&0) {
            return match input.decode::<DeviceMessage>() {
                Ok(message) => {
                    emit(effects, key, &format!("message {}", message.seq.unwrap()));
                    Settled::emitted()
                }
                Err(e) => Settled::dead_lettered(e.code(), e.to_string()),
            };
        }
        let text = std::str::from_utf8(value).unwrap_or_default();
        let (command, number) = text.split_once(':').unwrap_or((text, "0"));
        let number: i64 = number.parse().unwrap_or(0);
        match command {
            "add" => {
                let now = state.get_mut(key);
                now.count += 1;
                now.sum += number * self.factor;
                let text = format!("{key} {} {} @{}", now.count, now.sum, input.record.offset);
                emit(effects, key, &text);
                Settled::emitted()
            }
            "arm" => {
                let due = input.record.time.plus(Duration::from_secs(number as u64));
                state.get_mut(key).due = Some(due);
                Settled::emitted()
            }
            "stuck" => {
                state.get_mut(key).due = Some(Timestamp(1));
                state.get_mut(key).count = 666;
                Settled::emitted()
            }
            "misfit" => {
                effects.emit("device.unbound.v1", key, &DeviceMessage::default());
                Settled::emitted()
            }
            "old" => Settled::new(Outcome::Ignored, "superseded"),
            "skip" => Settled::filtered(),
            _ => Settled::dead_lettered("garbage", format!("`{key}` says something unknown")),
        }
    }

    fn due_at(&self, state: &Count) -> Option<Timestamp> {
        state.due
    }

    fn fire(&mut self, key: &str, now: Timestamp, state: &mut Keyed<Count>, effects: &mut Effects) {
        let count = state.get_mut(key);
        emit(effects, key, &format!("{key} fired {} at {}", count.sum, now.0));
        if count.count == 666 {
            return;
        }
        // Every second firing arms the timer once more, so that firings follow from firings.
        count.sum += 1;
        count.due = (count.sum % 2 == 0).then(|| now.plus(Duration::from_secs(2)));
    }
}

pub type Loop = DecideLoop<CountThings, MemorySource, MemoryTransactions, MemoryTables, MemorySchemas>;

pub struct World {
    pub clock: FakeClock,
    pub cluster: MemoryCluster,
    pub codec: Arc<Codec>,
    pub schemas: MemorySchemas,
    pub config: LoopConfig,
    pub batch_max: usize,
    pub stage: &'static str,
    pub inputs: Vec<&'static str>,
    pub tables: Vec<&'static str>,
}

impl World {
    pub fn new(inputs: &[&'static str], partitions: i32) -> Self {
        Self::named(GROUP, inputs, partitions)
    }

    /// Makes one whose stage has a name of its own, which keeps its metrics apart from those of other tests.
    pub fn named(stage: &'static str, inputs: &[&'static str], partitions: i32) -> Self {
        let clock = FakeClock::default();
        let cluster = MemoryCluster::new(clock.clone());
        for input in inputs {
            cluster.create_topic(input, partitions);
            cluster.create_topic(&format!("{input}.{stage}-replay"), partitions);
        }
        cluster.create_topic(OUTPUT, partitions);
        cluster.create_topic(CHANGELOG, partitions);
        Self {
            schemas: MemorySchemas::new(&cluster),
            codec: throughline_testkit::codec(),
            config: LoopConfig::default(),
            batch_max: 10,
            stage,
            inputs: inputs.to_vec(),
            tables: Vec::new(),
            clock,
            cluster,
        }
    }

    pub fn topics(&self) -> Vec<String> {
        let replays = self.inputs.iter().map(|input| format!("{input}.{}-replay", self.stage));
        self.inputs.iter().map(|input| (*input).to_owned()).chain(replays).collect()
    }

    /// Starts a process; `instance` names its producer. Returns its member number too.
    pub fn start(&self, instance: &str) -> (Loop, u64) {
        let topics = self.topics();
        let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
        self.start_with(instance, &topics)
    }

    pub fn start_with(&self, instance: &str, topics: &[&str]) -> (Loop, u64) {
        let source = MemorySource::join(&self.cluster, self.stage, topics, self.batch_max);
        let member = source.member();
        let ports = DecidePorts {
            transactions: MemoryTransactions::new(&self.cluster, instance, self.stage, &source),
            source,
            tables: MemoryTables::new(&self.cluster),
            schemas: self.schemas.clone(),
            incarnation: self.cluster.ask_incarnation(),
            codec: Arc::clone(&self.codec),
            clock: Arc::new(self.clock.clone()),
        };
        let mut stage = CountThings::new(&self.inputs, &self.tables);
        stage.spec.group = self.stage;
        (DecideLoop::new(stage, ports, self.config.clone(), Health::new().role(self.stage)), member)
    }

    /// Appends `value` under `key` to the input, a while after the record before.
    pub fn say(&self, key: &str, value: &str) {
        self.clock.advance(Duration::from_millis(300));
        self.cluster.append_keyed(INPUT, key, value.as_bytes());
    }

    pub fn is_done(&self) -> bool {
        self.topics().iter().all(|topic| self.cluster.lag(self.stage, topic) <= 0)
    }

    /// Turns until everything appended is committed.
    pub fn settle(&self, running: &mut Loop) {
        for _ in 0..10_000 {
            if self.is_done() {
                return;
            }
            running.turn().unwrap();
        }
        panic!("10,000 turns did not do it");
    }

    /// Turns for this long in virtual time.
    pub fn pass(&self, running: &mut Loop, time: Duration) {
        let end = self.clock.now().plus(time);
        while self.clock.now() < end {
            running.turn().unwrap();
        }
    }

    pub fn output(&self) -> Vec<String> {
        self.cluster.records(OUTPUT).iter().map(|record| record.value_text()).collect()
    }

    /// Returns the committed counts by outcome over all partitions of all inputs.
    pub fn counts(&self) -> [u64; 6] {
        let mut sum = [0; 6];
        for topic in self.topics() {
            for partition in 0..8 {
                let at = TopicPartition::new(topic.as_str(), partition);
                let Some((_, metadata)) = self.cluster.committed(self.stage, &at) else { continue };
                let books = throughline_model::books::Books::from_metadata(&metadata).unwrap();
                for (sum, n) in sum.iter_mut().zip(books.counts) {
                    *sum += n;
                }
            }
        }
        sum
    }
}

/// Returns what the metric `dependency_up` says of a role.
pub fn is_up(role: &str, dependency: &str) -> bool {
    gauge(Metric::DependencyUp, &[("role", role), ("dependency", dependency)]).value() == 1.0
}

/// Returns what the metric `partitions_paused` says of a stage.
pub fn paused(stage: &str) -> f64 {
    gauge(Metric::PartitionsPaused, &[("stage", stage)]).value()
}

/// Returns how often a stage tried a dependency again.
pub fn retries(stage: &str, dependency: &str) -> u64 {
    counter(Metric::RetriesTotal, &[("stage", stage), ("dependency", dependency)]).value()
}

/// Returns how often a stage began again at its committed positions.
pub fn recoveries(stage: &str, reason: &str) -> u64 {
    counter(Metric::RecoveriesTotal, &[("stage", stage), ("reason", reason)]).value()
}

pub fn is_kill(stopped: &Stopped) -> bool {
    stopped.code == KILLED
}

/// Turns processes, the first of which runs already, until `is_done`; what was killed by a fault, or between two
/// turns once in `kill_one_in`, is started again.
pub fn drive_until<P>(
    running: P,
    start: impl Fn() -> P,
    turn: impl Fn(&mut P) -> Result<(), Stopped>,
    is_done: impl Fn() -> bool,
    random: &mut Random,
    kill_one_in: Option<u64>,
) {
    let mut running = Some(running);
    for _ in 0..20_000 {
        if is_done() {
            return;
        }
        match turn(running.get_or_insert_with(&start)) {
            Ok(()) if kill_one_in.is_some_and(|n| random.below(n) == 0) => running = None,
            Ok(()) => {}
            Err(stopped) if is_kill(&stopped) => running = None,
            Err(stopped) => panic!("{stopped}"),
        }
    }
    panic!("20,000 turns did not do it");
}

/// A small generator whose sequence follows from its seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// Turns a loop until it stops: the look whether topics were replaced is answered on a thread of its own.
///
/// # Panics
/// When it does not stop within a minute.
pub fn stops(mut turn: impl FnMut() -> Result<(), Stopped>) -> Stopped {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Err(stopped) = turn() {
            return stopped;
        }
        assert!(std::time::Instant::now() < deadline, "it does not stop");
        std::thread::yield_now();
    }
}
