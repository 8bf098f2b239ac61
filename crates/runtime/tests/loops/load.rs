//! What the loop of load stages does, one behaviour a test, in virtual time.

use crate::common::{Random, drive_until, is_up, paused, retries, stops};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::rows::{ReadingRow, Rows};
use throughline_model::stage::{Input, Kind, Load, StageSpec};
use throughline_model::time::Timestamp;
use throughline_runtime::{Clock, LoadLoop, LoadPorts, LoopConfig, Shutdown, codes, run_load};
use throughline_telemetry::Health;
use throughline_testkit::{
    FakeClock, Fault, MemoryCluster, MemoryOutlet, MemorySchemas, MemorySource, MemoryStore, Point,
};

const GROUP: &str = "load_things";
const INPUT: &str = "device.thing.v1";
const DLT: &str = "device.thing.v1.load_things-dlt";
const PARTITIONS: i32 = 2;

/// Makes a row of every number, two of an even one; the row names its position, so a repeat shows.
struct LoadThings(StageSpec);

impl LoadThings {
    fn new() -> Self {
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

fn replay(stage: &str) -> String {
    format!("{INPUT}.{stage}-replay")
}

type Loop = LoadLoop<LoadThings, MemorySource, MemoryStore, MemoryOutlet, MemorySchemas>;

struct World {
    clock: FakeClock,
    cluster: MemoryCluster,
    store: MemoryStore,
    config: LoopConfig,
    batch_max: usize,
    stage: &'static str,
}

impl World {
    fn new() -> Self {
        Self::named(GROUP)
    }

    /// Makes one whose stage has a name of its own, which keeps its metrics apart from those of other tests.
    fn named(stage: &'static str) -> Self {
        let clock = FakeClock::default();
        let cluster = MemoryCluster::new(clock.clone());
        cluster.create_topic(INPUT, PARTITIONS);
        cluster.create_topic(&replay(stage), PARTITIONS);
        let store = MemoryStore::new(cluster.faults());
        Self { clock, cluster, store, config: LoopConfig::default(), batch_max: 10, stage }
    }

    fn say(&self, partition: i32, value: &str) {
        self.cluster.append(INPUT, partition, Some(b"k"), Some(value.as_bytes()), []);
    }

    fn start(&self) -> (Loop, u64) {
        let (ports, member) = self.ports();
        let mut stage = LoadThings::new();
        stage.0.group = self.stage;
        (LoadLoop::new(stage, ports, self.config.clone(), Health::new().role(self.stage)), member)
    }

    fn ports(&self) -> (LoadPorts<MemorySource, MemoryStore, MemoryOutlet, MemorySchemas>, u64) {
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

    fn position(&self, partition: i32) -> i64 {
        self.store.position(self.stage, &TopicPartition::new(INPUT, partition)).map_or(0, |(next, _)| next)
    }

    fn is_done(&self) -> bool {
        let is_read = |topic: &str| {
            let records = self.cluster.records(topic);
            let end = |p| records.iter().filter(|r| r.partition == p).map(|r| r.offset + 1).max();
            let position = |p| self.store.position(self.stage, &TopicPartition::new(topic, p));
            (0..PARTITIONS).all(|p| end(p).is_none_or(|end| position(p).is_some_and(|(next, _)| next >= end)))
        };
        is_read(INPUT) && is_read(&replay(self.stage))
    }

    fn settle(&self, running: &mut Loop) {
        for _ in 0..10_000 {
            if self.is_done() {
                return;
            }
            running.turn().unwrap();
        }
        panic!("10,000 turns did not do it");
    }

    fn pass(&self, running: &mut Loop, time: Duration) {
        let end = self.clock.now().plus(time);
        while self.clock.now() < end {
            running.turn().unwrap();
        }
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.store.rows().readings.into_iter().map(|row| row.name).collect();
        names.sort();
        names
    }

    fn counts(&self) -> [u64; 6] {
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

    fn workload(&self, seed: u64, records: u64) {
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

    fn letters(&self) -> Vec<String> {
        let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
        let name = |r: &throughline_testkit::Committed| {
            let of = |header: &str| text(r.header(&format!("__connect.errors.{header}")));
            format!("{}@{} {} {}", of("partition"), of("offset"), of("stage"), of("exception.class.name"))
        };
        self.cluster.records(DLT).iter().map(name).collect()
    }
}

fn drive(world: &World, random: &mut Random, kill_one_in: Option<u64>) {
    let start = || {
        world.cluster.faults().revive();
        world.start().0
    };
    drive_until(world.start().0, start, |p| p.turn(), || world.is_done(), random, kill_one_in);
}

/// Rows, outcomes and (once each) dead letters.
fn result(world: &World) -> (Vec<String>, [u64; 6], Vec<String>) {
    let mut letters = world.letters();
    letters.sort();
    // A dead letter of a load stage is written before the offset moves: a kill in between repeats it.
    letters.dedup();
    (world.names(), world.counts(), letters)
}

#[test]
fn a_fault_at_any_point_of_any_kind_changes_no_row() {
    let world = World::new();
    world.workload(3, 60);
    drive(&world, &mut Random(0), None);
    let expected = result(&world);
    assert!(
        expected.2.iter().any(|l| l.contains("TASK_PUT")) && expected.2.iter().any(|l| l.contains("TRANSF"))
    );
    for fault in [Fault::Dependency, Fault::Fenced, Fault::Kill] {
        for passes in 0.. {
            let mut world = World::new();
            world.batch_max = 5;
            world.config.records_max = 15;
            world.workload(3, 60);
            world.cluster.faults().script_any(passes, fault);
            drive(&world, &mut Random(0), None);
            assert_eq!(result(&world), expected, "{fault:?} at pass {passes}");
            if !world.cluster.faults().has_struck() {
                assert!(passes > 20, "the run passes {passes} points only");
                break;
            }
        }
    }
}

#[test]
fn random_faults_and_kills_change_no_row() {
    for seed in 0..80 {
        let mut random = Random(seed);
        let records = 40 + random.below(120);
        let calm = World::new();
        calm.workload(seed, records);
        drive(&calm, &mut Random(0), None);
        let mut world = World::new();
        world.batch_max = 1 + random.below(12) as usize;
        world.config.records_max = 1 + random.below(40) as usize;
        world.workload(seed, records);
        for _ in 0..random.below(12) {
            let fault = [Fault::Dependency, Fault::Fenced, Fault::Kill][random.below(3) as usize];
            world.cluster.faults().script_any(random.below(80), fault);
        }
        drive(&world, &mut random, Some(25));
        assert_eq!(result(&world), result(&calm), "seed {seed}");
    }
}

#[test]
fn a_refused_write_is_halved_to_the_record_and_the_rest_is_written() {
    let mut world = World::new();
    world.batch_max = 1_000;
    for number in 0..1_000 {
        let poison = [17, 500, 501].contains(&number);
        world.say(number % 2, &if poison { "5000000".to_owned() } else { number.to_string() });
    }
    world.store.refuse(|row| row.number.is_some_and(|n| n > 1e6));
    let (mut running, _) = world.start();
    world.settle(&mut running);
    assert_eq!(world.names().len(), 500 + 2 * 500 - 2 - 1 - 1, "odd numbers make a row, even ones two");
    let mut letters = world.letters();
    letters.sort();
    let expected =
        ["0@250 TASK_PUT sqlstate_22003", "1@250 TASK_PUT sqlstate_22003", "1@8 TASK_PUT sqlstate_22003"];
    assert_eq!(letters, expected);
    assert_eq!(
        (world.counts()[Outcome::Emitted.index()], world.counts()[Outcome::DeadLettered.index()]),
        (997, 3)
    );
    let writes = world.cluster.faults().passed(Point::StoreBefore);
    assert!(writes < 80, "{writes} writes for three records among a thousand");
}

#[test]
fn a_database_that_is_away_pauses_and_dead_letters_nothing() {
    let world = World::named("waits_for_database");
    for number in 0..100 {
        world.say(0, &number.to_string());
    }
    world.cluster.faults().set_up(Point::StoreBefore, false);
    let (mut running, _) = world.start();
    world.pass(&mut running, Duration::from_secs(120));
    let attempts = world.cluster.faults().passed(Point::StoreBefore);
    assert!((10..40).contains(&attempts), "{attempts} attempts in two minutes, with back-off");
    assert_eq!(retries(world.stage, "database"), attempts as u64);
    // Both partitions of both topics wait, the empty ones too.
    assert_eq!((is_up(world.stage, "database"), paused(world.stage)), (false, 4.0));
    world.cluster.faults().set_up(Point::StoreBefore, true);
    world.pass(&mut running, Duration::from_secs(12));
    assert_eq!((world.names().len(), world.letters().len()), (150, 0));
    assert_eq!((is_up(world.stage, "database"), paused(world.stage)), (true, 0.0));
    world.say(1, "1");
    world.settle(&mut running);
    assert_eq!(world.names().len(), 151, "the partitions are resumed");
}

#[test]
fn gathered_rows_are_written_at_their_bound() {
    let source = TopicPartition::new(INPUT, 0);
    let mut batch = Batch::new(source);
    (0..10).for_each(|offset| batch.push(offset, Timestamp(0), Some(b"k"), Some(b"1"), []));
    // By batches of 10, each write is at the first that passes 25 rows, or 2.5 batches in bytes.
    for (records_max, bytes_max) in [(25, usize::MAX), (usize::MAX, batch.bytes_held() * 5 / 2)] {
        let mut world = World::new();
        world.config.commit_interval = Some(Duration::from_secs(3_600));
        (world.config.records_max, world.config.bytes_max) = (records_max, bytes_max);
        for _ in 0..100 {
            world.say(0, "1");
        }
        let (mut running, _) = world.start();
        let mut written = Vec::new();
        for _ in 0..40 {
            running.turn().unwrap();
            written.push(world.names().len());
        }
        written.dedup();
        assert_eq!(written, [0, 30, 60, 90], "{records_max} rows, {bytes_max} bytes");
    }
}

#[test]
fn partitions_that_come_while_the_store_takes_no_rows_are_not_read() {
    let world = World::new();
    let (ports, _) = world.ports();
    let health = Health::new();
    let mut running = LoadLoop::new(LoadThings::new(), ports, world.config.clone(), health.role(GROUP));
    let other = MemorySource::join(&world.cluster, GROUP, &[INPUT, &replay(GROUP)], world.batch_max);
    world.say(0, "1");
    world.settle(&mut running);
    // As a full disk does it: positions are told, rows are not taken.
    world.cluster.faults().set_up(Point::StoreBefore, false);
    world.say(0, "3");
    world.pass(&mut running, Duration::from_secs(1));
    for _ in 0..1_000 {
        world.say(1, "1");
    }
    drop(other);
    world.pass(&mut running, Duration::from_secs(120));
    let status = health.status();
    let partitions = status["roles"][GROUP]["notes"]["partitions"].as_array().unwrap().clone();
    let taken = partitions.iter().find(|p| p["partition"] == "device.thing.v1/1").unwrap();
    assert_eq!((&taken["active"], &taken["caught_up"]), (&true.into(), &false.into()), "{taken}");
    world.cluster.faults().set_up(Point::StoreBefore, true);
    world.settle(&mut running);
    assert_eq!((world.names().len(), world.letters().len()), (1_002, 0));
}

#[test]
fn an_unknown_commit_is_told_by_the_compare_and_swap_of_the_retry() {
    let world = World::new();
    world.say(0, "1");
    world.cluster.faults().script(Point::StoreAfter, 0, Fault::Dependency);
    let (mut running, _) = world.start();
    world.pass(&mut running, Duration::from_secs(5));
    assert_eq!(world.names(), ["device.thing.v1/0@0#0"], "written once");
    assert_eq!(world.counts()[0], 1);
}

#[test]
fn a_position_that_another_writer_moved_discards_and_reads_again() {
    let mut world = World::new();
    world.config.commit_interval = Some(Duration::from_secs(5));
    for number in [1, 3, 5, 7] {
        world.say(0, &number.to_string());
    }
    let (mut running, _) = world.start();
    for _ in 0..8 {
        running.turn().unwrap();
    }
    world.store.steal(GROUP, &TopicPartition::new(INPUT, 0), 3);
    world.settle(&mut running);
    assert_eq!(world.names(), ["device.thing.v1/0@3#0"], "only what the other writer left");
}

#[test]
fn stage_dead_letters_are_acknowledged_before_the_offset_moves() {
    let world = World::new();
    world.say(0, "bad");
    world.cluster.faults().set_up(Point::Outlet, false);
    let (mut running, _) = world.start();
    world.pass(&mut running, Duration::from_secs(60));
    assert_eq!((world.position(0), world.letters().len()), (0, 0));
    world.cluster.faults().set_up(Point::Outlet, true);
    world.pass(&mut running, Duration::from_secs(12));
    assert_eq!((world.position(0), world.letters()), (1, vec!["0@0 TRANSFORMATION not_a_number".to_owned()]));
}

#[test]
fn a_revocation_writes_what_is_gathered_and_the_next_owner_goes_on() {
    let mut world = World::new();
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    for number in 0..10 {
        world.say(number % 2, "1");
    }
    let (mut first, _) = world.start();
    for _ in 0..10 {
        first.turn().unwrap();
    }
    assert!(world.names().is_empty());
    let (mut second, _) = world.start();
    first.turn().unwrap();
    assert_eq!(world.names().len(), 10);
    world.say(0, "1");
    world.say(1, "1");
    for _ in 0..10 {
        first.turn().unwrap();
        second.turn().unwrap();
    }
    first.drain().unwrap();
    second.drain().unwrap();
    assert_eq!((world.names().len(), world.counts()[0]), (12, 12));
}

#[test]
fn members_that_come_go_and_are_expelled_change_no_row() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let calm = World::new();
        calm.workload(seed, 100);
        drive(&calm, &mut Random(0), None);
        let mut world = World::new();
        world.batch_max = 3;
        world.workload(seed, 100);
        let mut members: [Option<(Loop, u64)>; 2] = [Some(world.start()), None];
        for _ in 0..20_000 {
            if world.is_done() {
                break;
            }
            let slot = random.below(2) as usize;
            match &mut members[slot] {
                Some((process, member)) => {
                    process.turn().unwrap();
                    match random.below(60) {
                        0 => world.cluster.expel(GROUP, *member),
                        1 => members[slot] = None,
                        2 => members[slot].take().unwrap().0.drain().unwrap(),
                        _ => {}
                    }
                }
                None if random.below(10) == 0 => members[slot] = Some(world.start()),
                None => world.clock.advance(Duration::from_millis(5)),
            }
        }
        assert!(world.is_done(), "seed {seed}: records are left");
        assert_eq!(result(&world), result(&calm), "seed {seed}");
    }
}

#[test]
fn kafka_gets_a_mirror_of_the_positions() {
    let world = World::new();
    world.say(0, "1");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    running.turn().unwrap();
    let (next, metadata) = world.cluster.committed(GROUP, &TopicPartition::new(INPUT, 0)).unwrap();
    let books = throughline_model::books::Books::from_metadata(&metadata).unwrap();
    assert_eq!((next, books.of(Outcome::Emitted)), (1, 1));
}

#[test]
fn a_loop_runs_on_its_own_thread_and_drains_when_it_is_asked_to_end() {
    let world = World::new();
    world.say(0, "1");
    let shutdown = Shutdown::new();
    let asked = shutdown.clone();
    let (ports, _) = world.ports();
    let config = world.config.clone();
    let thread = std::thread::spawn(move || {
        run_load(LoadThings::new(), ports, config, &asked, Health::new().role(GROUP))
    });
    while !world.is_done() {
        std::thread::yield_now();
    }
    shutdown.request();
    thread.join().unwrap().unwrap();
    assert_eq!(world.names().len(), 1);
}

#[test]
fn a_topic_that_is_replaced_under_a_running_loader_stops_it() {
    let world = World::new();
    world.say(0, "1");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    world.cluster.recreate_topic(INPUT);
    let stopped = stops(|| running.turn());
    assert_eq!(stopped.code, codes::REPLACED);
    assert!(
        stopped.message.contains("throughline groups adopt load_things --topic device.thing.v1"),
        "{stopped}"
    );
}

#[test]
fn a_database_that_fell_back_stops_the_loader_until_kafkas_copy_was_put_back() {
    let mut world = World::new();
    for number in [1, 3, 5] {
        world.say(0, &number.to_string());
        world.say(1, &number.to_string());
    }
    let empty = world.store.clone().backup();
    let (mut running, _) = world.start();
    world.settle(&mut running);
    running.drain().unwrap();
    let (backup, expected) = (world.store.backup(), 8);
    world.say(0, "7");
    world.say(1, "9");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    running.drain().unwrap();
    for (what, store, stands) in [("restored", backup, "stands at 3"), ("new", empty, "has no position")] {
        world.store = store;
        let before = world.names();
        let (mut running, _) = world.start();
        let stopped = (0..50).find_map(|_| running.turn().err()).expect("it stops");
        assert_eq!(stopped.code, codes::STORE_FELL_BACK, "{what}");
        assert!(stopped.message.contains(stands) && stopped.message.contains("up to 4"), "{stopped}");
        assert!(stopped.message.contains("throughline groups adopt load_things"), "{stopped}");
        assert_eq!(world.names(), before, "{what}: nothing was written");
        drop(running);
        // What `groups adopt` does, for a database without a position too.
        for number in 0..PARTITIONS {
            let partition = TopicPartition::new(INPUT, number);
            let next = world.store.position(GROUP, &partition).map_or(0, |(next, _)| next);
            let books = throughline_model::books::Books::open("volume-1").to_metadata();
            world.cluster.commit_foreign(GROUP, &partition, next, &books);
            if next == 0 {
                world.store.steal(GROUP, &partition, 0);
            }
        }
        let (mut running, _) = world.start();
        world.settle(&mut running);
        running.drain().unwrap();
        let names = world.names();
        let once: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!((names.len(), once.len()), (expected, expected), "{what}: every row once");
    }
}

#[test]
fn a_copy_that_a_foreign_tool_moved_says_nothing_about_the_database() {
    let world = World::new();
    world.say(0, "1");
    world.cluster.commit_foreign(GROUP, &TopicPartition::new(INPUT, 0), 99, "");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    assert_eq!(world.names().len(), 1);
}
