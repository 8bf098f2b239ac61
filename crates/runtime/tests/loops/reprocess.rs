//! Requests about dead letters: each selected letter is dealt with once, wherever a process is killed, not
//! faster than asked for, and a bad request disturbs no other.

use crate::common::{Random, drive_until};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::codec::Codec;
use throughline_model::dead_letter::{Action, RecentFailures, ReprocessState, STAGE, header, status};
use throughline_model::envelope::{DeadLetterProgress, DeadLetterRequest, LetterRange};
use throughline_model::keyed::Keyed;
use throughline_model::stage::{Decide as _, Effects};
use throughline_model::time::Timestamp;
use throughline_model::topics::{
    SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1 as PROGRESS, SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1 as REQUESTS,
};
use throughline_runtime::{Clock, DecideLoop, DecidePorts, LoopConfig, ReprocessDeadLetters};
use throughline_telemetry::{Health, Metric, counter};
use throughline_testkit::{
    Committed, FakeClock, Fault, MemoryCluster, MemorySchemas, MemorySource, MemoryStretches, MemoryTables,
    MemoryTransactions,
};

pub const LETTERS: &str = "device.thing.v1.count_things-dlt";
const REPLAYS: &str = "device.thing.v1.count_things-replay";
const PARKING: &str = "device.thing.v1.count_things-parking";
const REPLAYS_MAX: u32 = 3;

pub type Loop = DecideLoop<
    ReprocessDeadLetters<MemoryStretches>,
    MemorySource,
    MemoryTransactions,
    MemoryTables,
    MemorySchemas,
>;

pub struct World {
    pub clock: FakeClock,
    pub cluster: MemoryCluster,
    pub codec: Arc<Codec>,
}

impl World {
    pub fn new() -> Self {
        let clock = FakeClock::default();
        let cluster = MemoryCluster::new(clock.clone());
        for topic in [LETTERS, REPLAYS, PARKING, REQUESTS, PROGRESS, &*replays_of_requests()] {
            cluster.create_topic(topic, 1);
        }
        Self { clock, cluster, codec: throughline_testkit::codec() }
    }

    pub fn start(&self) -> Loop {
        let replays = replays_of_requests();
        let source = MemorySource::join(&self.cluster, STAGE, &[REQUESTS, &replays], 3);
        let ports = DecidePorts {
            transactions: MemoryTransactions::new(&self.cluster, "instance-0", STAGE, &source),
            source,
            tables: MemoryTables::new(&self.cluster),
            schemas: MemorySchemas::new(&self.cluster),
            incarnation: self.cluster.ask_incarnation(),
            codec: Arc::clone(&self.codec),
            clock: Arc::new(self.clock.clone()),
        };
        let clock = Arc::new(self.clock.clone());
        let stage = ReprocessDeadLetters::new(MemoryStretches::new(&self.cluster, 4), clock, REPLAYS_MAX);
        let config = LoopConfig { tick_grace: Duration::ZERO, ..LoopConfig::default() };
        DecideLoop::new(stage, ports, config, Health::new().role(STAGE))
    }

    pub fn letter(&self, name: &str, code: &str, replays: u32) {
        self.clock.advance(Duration::from_millis(10));
        let count = replays.to_string();
        let count = (replays > 0).then_some((header::REPLAY_COUNT, count.as_bytes()));
        let headers = [(header::CODE, code.as_bytes())].into_iter().chain(count);
        self.cluster.append(LETTERS, 0, Some(b"k"), Some(name.as_bytes()), headers);
    }

    /// The letter of a load stage of the record at `offset`.
    fn told(&self, offset: i64) {
        let (partition, time) = (0_i32.to_be_bytes(), 7_i64.to_be_bytes());
        let place = offset.to_be_bytes();
        let origin: [(&str, &[u8]); 5] = [
            (header::CODE, b"bad"),
            ("kafka_dlt-original-topic", b"device.thing.v1"),
            ("kafka_dlt-original-partition", &partition),
            ("kafka_dlt-original-offset", &place),
            ("kafka_dlt-original-timestamp", &time),
        ];
        self.cluster.append(LETTERS, 0, Some(b"k"), Some(offset.to_string().as_bytes()), origin);
    }

    /// Letters `0` to `count`, every third of them `odd`, all others `bad`.
    fn letters(&self, count: u32) {
        for number in 0..count {
            self.letter(&number.to_string(), if number % 3 == 0 { "odd" } else { "bad" }, 0);
        }
    }

    pub fn ask(&self, request: &DeadLetterRequest) {
        self.clock.advance(Duration::from_millis(10));
        let mut value = Vec::new();
        self.codec.encode(REQUESTS, request, &mut value).unwrap();
        self.cluster.append_keyed(REQUESTS, request.request_id.as_deref().unwrap(), &value);
    }

    pub fn progress(&self, id: &str) -> Option<DeadLetterProgress> {
        let table = self.cluster.table(PROGRESS, 0);
        table.get(id).map(|value| self.codec.decode(Some(value)).unwrap())
    }

    fn has_ended(&self, ids: &[&str]) -> bool {
        ids.iter().all(|id| self.progress(id).is_some_and(|progress| !progress.is_open()))
    }

    pub fn replayed(&self) -> Vec<String> {
        self.cluster.records(REPLAYS).iter().map(Committed::value_text).collect()
    }

    /// Runs until the requests have ended. `kill_one_in` turns ends the process between two turns.
    fn run(&self, ids: &[&str], random: &mut Random, kill_one_in: Option<u64>) {
        let start = || {
            self.cluster.faults().revive();
            self.start()
        };
        drive_until(self.start(), start, |p| p.turn(), || self.has_ended(ids), random, kill_one_in);
    }

    pub fn settle(&self, ids: &[&str]) {
        self.run(ids, &mut Random(0), None);
    }

    /// Asks for a replay of so many letters under the id `slow`, 20 a second, and runs until some are sent.
    fn begin_slow_replay(&self, letters: u32) -> Loop {
        self.letters(letters);
        self.ask(&DeadLetterRequest { rate_per_second: Some(20), ..request("slow", Action::Replay) });
        let mut running = self.start();
        while self.replayed().len() < 10 {
            running.turn().unwrap();
        }
        running
    }

    /// Runs until a request that had ended is cancelled.
    pub fn settle_cancelled(&self, id: &str) {
        let is_cancelled = || self.progress(id).is_some_and(|p| p.status == status::CANCELLED);
        drive_until(self.start(), || self.start(), |p| p.turn(), is_cancelled, &mut Random(0), None);
    }
}

fn replays_of_requests() -> String {
    throughline_model::catalog::replay_topic(REQUESTS, STAGE)
}

pub fn request(id: &str, action: Action) -> DeadLetterRequest {
    DeadLetterRequest {
        message_id: "0193f2a4-7c1e-8000-90ab-0123456789ab".to_owned(),
        request_id: Some(id.to_owned()),
        action: action.label().to_owned(),
        topic: LETTERS.to_owned(),
        requested_by: "a test".to_owned(),
        justification: Some("for a test".to_owned()),
        ..DeadLetterRequest::default()
    }
}

pub fn coded(id: &str, action: Action, code: &str) -> DeadLetterRequest {
    DeadLetterRequest { code: Some(code.to_owned()), ..request(id, action) }
}

#[test]
fn a_replay_carries_the_bytes_their_lineage_and_where_they_lay() {
    let world = World::new();
    world.letter("x", "bad", 1);
    world.ask(&request("r", Action::Replay));
    world.settle(&["r"]);
    let [replay] = &world.cluster.records(REPLAYS)[..] else { panic!("one replay") };
    assert_eq!((replay.value_text().as_str(), replay.key_text().as_str()), ("x", "k"));
    assert_eq!(replay.header(header::REPLAY_ID), Some(b"r".as_slice()));
    assert_eq!(replay.header(header::REPLAY_COUNT), Some(b"2".as_slice()));
    assert_eq!(replay.header(header::ORIGIN), Some(format!("{LETTERS}/0/0").as_bytes()));
    assert_eq!(replay.header(header::CODE), Some(b"bad".as_slice()));
    let progress = world.progress("r").unwrap();
    assert_eq!((progress.status.as_str(), progress.replayed), (status::DONE, 1));
}

#[test]
fn whatever_fails_and_wherever_it_is_killed_no_letter_is_skipped_or_doubled() {
    let undisturbed = || {
        let world = World::new();
        world.letters(30);
        world.letter("exhausted", "bad", REPLAYS_MAX);
        world.ask(&coded("drop", Action::Drop, "odd"));
        world.ask(&request("replay", Action::Replay));
        world
    };
    let check = |world: &World, what: &str| {
        let expected: Vec<String> = (0..30).filter(|n| n % 3 != 0).map(|n| n.to_string()).collect();
        assert_eq!(world.replayed(), expected, "{what}");
        let parked = world.cluster.records(PARKING);
        assert_eq!(parked.iter().map(Committed::value_text).collect::<Vec<_>>(), ["exhausted"], "{what}");
        let (drop, replay) = (world.progress("drop").unwrap(), world.progress("replay").unwrap());
        assert_eq!((drop.dropped, drop.replayed), (10, 0), "{what}");
        assert_eq!((replay.replayed, replay.parked, replay.skipped), (20, 1, 10), "{what}");
    };
    let ids = ["drop", "replay"];
    for fault in [Fault::Dependency, Fault::Fenced, Fault::Kill] {
        for passes in 0.. {
            let world = undisturbed();
            world.cluster.faults().script_any(passes, fault);
            world.settle(&ids);
            check(&world, &format!("{fault:?} at pass {passes}"));
            if !world.cluster.faults().has_struck() {
                assert!(passes > 20, "the run passes {passes} points only");
                break;
            }
        }
    }
    for seed in 0..40 {
        let world = undisturbed();
        let mut random = Random(seed);
        for _ in 0..random.below(6) {
            let fault = [Fault::Dependency, Fault::Fenced, Fault::Kill][random.below(3) as usize];
            world.cluster.faults().script_any(random.below(60), fault);
        }
        world.run(&ids, &mut random, Some(6));
        check(&world, &format!("seed {seed}"));
    }
}

#[test]
fn a_rate_is_kept_and_the_source_is_served_meanwhile() {
    let world = World::new();
    world.letters(60);
    world.ask(&DeadLetterRequest { rate_per_second: Some(20), ..request("slow", Action::Replay) });
    let began = world.clock.now();
    let mut running = world.start();
    let mut asked = false;
    for _ in 0..20_000 {
        running.turn().unwrap();
        if !asked && world.replayed().len() >= 10 {
            asked = true;
            world.ask(&request("broken", Action::Cancel));
        }
        if world.has_ended(&["slow"]) {
            break;
        }
    }
    let passed = world.clock.now().0 - began.0;
    assert!((2_900_000..8_000_000).contains(&passed), "60 letters at 20 a second took {passed} µs");
    let other = world.progress("broken").unwrap();
    assert_eq!(other.status, status::FAILED, "it was read while the first was at work");
    assert!(other.done_at < world.progress("slow").unwrap().done_at);
    assert_eq!(world.replayed().len(), 60);
}

#[test]
fn a_cancelled_replay_stops_where_it_is_and_its_rest_stays_open() {
    let world = World::new();
    let mut running = world.begin_slow_replay(60);
    world.ask(&request("slow", Action::Cancel));
    world.ask(&request("rest", Action::Replay));
    while !world.has_ended(&["slow", "rest"]) {
        running.turn().unwrap();
    }
    let expected: Vec<String> = (0..60).map(|n| n.to_string()).collect();
    assert_eq!(world.replayed(), expected, "the second one takes what the first one left");
    assert_eq!(world.progress("slow").unwrap().status, status::CANCELLED);
}

#[test]
fn requests_are_counted_by_how_they_ended() {
    let world = World::new();
    world.letters(30);
    let coded = |code: &str, request: DeadLetterRequest| DeadLetterRequest {
        request_code: Some(format!("counted_{code}")),
        ..request
    };
    world.ask(&coded("done", request("done", Action::Replay)));
    world.settle(&["done"]);
    let slow =
        DeadLetterRequest { again: true, rate_per_second: Some(10), ..request("slow", Action::Replay) };
    world.ask(&coded("slow", slow));
    let mut running = world.start();
    while world.replayed().len() < 32 {
        running.turn().unwrap();
    }
    world.ask(&coded("cancel", request("slow", Action::Cancel)));
    world.ask(&coded("again", request("done", Action::Replay)));
    world.ask(&coded("bad", request("bad", Action::Cancel)));
    while !world.has_ended(&["slow", "bad"]) {
        running.turn().unwrap();
    }
    for (code, response, reason) in [
        ("done", "success", ""),
        ("slow", "failure", "cancelled"),
        ("cancel", "success", ""),
        ("again", "ignored", "known"),
        ("bad", "failure", ""),
    ] {
        let code = format!("counted_{code}");
        let labels = [("request_code", &*code), ("response_code", response), ("reason", reason)];
        assert_eq!(counter(Metric::RequestsTotal, &labels).value(), 1, "{code} {response} {reason}");
    }
}

#[test]
fn a_second_replay_sends_nothing_unless_again_is_asked_for() {
    let world = World::new();
    world.letters(9);
    world.ask(&coded("drop", Action::Drop, "odd"));
    world.ask(&request("first", Action::Replay));
    world.ask(&request("second", Action::Replay));
    world.settle(&["drop", "first", "second"]);
    assert_eq!(world.replayed().len(), 6);
    let second = world.progress("second").unwrap();
    assert_eq!((second.replayed, second.skipped), (0, 9));
    world.ask(&DeadLetterRequest { again: true, ..request("third", Action::Replay) });
    world.settle(&["third"]);
    assert_eq!(world.replayed().len(), 12, "what was dropped stays dropped");
    world.ask(&request("drop", Action::Cancel));
    world.ask(&request("fourth", Action::Replay));
    world.settle(&["fourth"]);
    assert_eq!(world.progress("fourth").unwrap().replayed, 3, "a cancelled drop leaves its letters open");
}

#[test]
fn a_letter_that_was_told_twice_is_replayed_once() {
    let world = World::new();
    // A write of a load stage whose acknowledgements were lost, and its next attempt.
    [0, 1, 2, 0, 1, 2, 3].into_iter().for_each(|offset| world.told(offset));
    world.ask(&request("r", Action::Replay));
    world.settle(&["r"]);
    assert_eq!(world.replayed(), ["0", "1", "2", "3"]);
    let progress = world.progress("r").unwrap();
    assert_eq!((progress.replayed, progress.skipped), (4, 3));
}

#[test]
fn what_a_request_was_told_is_forgotten_when_it_ends() {
    let world = World::new();
    (0..8).for_each(|offset| world.told(offset));
    let stretches = MemoryStretches::new(&world.cluster, 4);
    let mut stage = ReprocessDeadLetters::new(stretches, Arc::new(world.clock.clone()), REPLAYS_MAX);
    let (mut states, mut effects) =
        (Keyed::<ReprocessState>::default(), Effects::new(Arc::clone(&world.codec)));
    states.get_mut("r").progress =
        DeadLetterProgress::accepted(&request("r", Action::Replay), world.clock.now());
    let mut most = false;
    while states.get("r").is_some_and(|state| state.progress.is_open()) {
        stage.fire("r", Timestamp(0), &mut states, &mut effects);
        most |= states.get("r").is_some_and(|state| state.recent != RecentFailures::default());
    }
    let ended = states.get("r").expect("requests are remembered");
    assert!(most && ended.recent == RecentFailures::default(), "told {most}");
    assert_eq!(ended.progress.replayed, 8);
}

#[test]
fn what_was_decided_about_a_topic_says_nothing_about_another_one_of_its_name() {
    let world = World::new();
    world.letters(6);
    world.ask(&coded("drop", Action::Drop, "odd"));
    world.ask(&request("first", Action::Replay));
    world.settle(&["drop", "first"]);
    assert_eq!(world.replayed().len(), 4);
    world.cluster.recreate_topic(LETTERS);
    world.letters(6);
    world.ask(&request("second", Action::Replay));
    world.settle(&["second"]);
    assert_eq!(world.progress("second").unwrap().replayed, 6, "all of them are new letters");
}

#[test]
fn requests_are_carried_out_in_the_order_of_their_records_whatever_the_brokers_clock_says() {
    let world = World::new();
    world.letters(9);
    world.ask(&request("z", Action::Replay));
    world.settle(&["z"]);
    // The next leader's clock is behind; and an equal time would put the smaller id first.
    world.clock.set(world.clock.now().minus(Duration::from_secs(3_600)));
    world.ask(&request("a", Action::Replay));
    world.settle(&["a"]);
    let second = world.progress("a").unwrap();
    assert_eq!((second.replayed, second.skipped), (0, 9));
    assert_eq!(world.replayed().len(), 9);
}

#[test]
fn a_clock_that_is_set_back_does_not_hold_up_a_request() {
    let world = World::new();
    let mut running = world.begin_slow_replay(40);
    world.clock.set(world.clock.now().minus(Duration::from_secs(3_600)));
    let end = world.clock.now().plus(Duration::from_secs(60));
    while !world.has_ended(&["slow"]) {
        assert!(world.clock.now() < end, "{:?}", world.progress("slow"));
        running.turn().unwrap();
    }
    assert_eq!(world.replayed().len(), 40);
}

#[test]
fn letters_that_retention_deletes_under_a_request_are_counted() {
    let world = World::new();
    let mut running = world.begin_slow_replay(60);
    world.cluster.delete_before(LETTERS, 0, 40);
    while !world.has_ended(&["slow"]) {
        running.turn().unwrap();
    }
    let progress = world.progress("slow").unwrap();
    assert_eq!(progress.replayed + progress.overtaken, 60, "{progress:?}");
    assert!(progress.overtaken >= 20, "{progress:?}");
}

#[test]
fn a_request_is_finite_and_what_was_parked_counts_anew() {
    let world = World::new();
    world.letters(4);
    let ranges = vec![LetterRange { partition: 0, first: 1, end: 3 }];
    world.ask(&DeadLetterRequest { ranges, ..request("part", Action::Replay) });
    world.settle(&["part"]);
    assert_eq!(world.replayed(), ["1", "2"]);
    let exhausted = REPLAYS_MAX.to_string();
    let headers = [(header::REPLAY_COUNT, exhausted.as_bytes())];
    world.cluster.append(PARKING, 0, Some(b"k"), Some(b"parked"), headers);
    world.ask(&DeadLetterRequest { topic: PARKING.to_owned(), ..request("parked", Action::Replay) });
    world.settle(&["parked"]);
    let replays = world.cluster.records(REPLAYS);
    let last = replays.last().unwrap();
    assert_eq!(
        (last.value_text().as_str(), last.header(header::REPLAY_COUNT)),
        ("parked", Some(b"1".as_slice()))
    );
}

#[test]
fn a_bad_request_fails_with_its_cause_and_disturbs_no_other() {
    let world = World::new();
    world.letters(3);
    let beyond = vec![LetterRange { partition: 0, first: 0, end: 99 }];
    let elsewhere = vec![LetterRange { partition: 7, first: 0, end: 1 }];
    let unknown = "device.nothing.v1.count_things-dlt".to_owned();
    let bad = [
        (
            "unknown",
            DeadLetterRequest { topic: unknown, ..request("unknown", Action::Replay) },
            "does not exist",
        ),
        (
            "input",
            DeadLetterRequest { topic: "device.thing.v1".to_owned(), ..request("input", Action::Replay) },
            "neither",
        ),
        ("beyond", DeadLetterRequest { ranges: beyond, ..request("beyond", Action::Replay) }, "ends at 3"),
        (
            "elsewhere",
            DeadLetterRequest { ranges: elsewhere, ..request("elsewhere", Action::Drop) },
            "no partition 7",
        ),
        ("why", DeadLetterRequest { justification: None, ..request("why", Action::Drop) }, "justification"),
        (
            "what",
            DeadLetterRequest { action: "burn".to_owned(), ..request("what", Action::Drop) },
            "no action",
        ),
        ("whom", request("whom", Action::Cancel), "no request of this id"),
    ];
    for (_, request, _) in &bad {
        world.ask(request);
    }
    world.cluster.append_keyed(REQUESTS, "garbage", b"garbage");
    world.ask(&request("good", Action::Replay));
    world.settle(&["unknown", "input", "beyond", "elsewhere", "why", "what", "whom", "garbage", "good"]);
    for (id, _, why) in bad {
        let progress = world.progress(id).unwrap();
        let error = progress.error.unwrap_or_default();
        assert!(progress.status == status::FAILED && error.contains(why), "{id}: {error}");
    }
    let garbage = world.progress("garbage").unwrap();
    assert!(garbage.error.unwrap_or_default().contains("framing"), "it says why it does not read");
    let letters = world.cluster.records(&throughline_model::catalog::dlt_topic(REQUESTS, STAGE));
    assert_eq!(letters.iter().map(Committed::value_text).collect::<Vec<_>>(), ["garbage"]);
    assert_eq!(world.replayed().len(), 3);
    assert!(world.progress("good").unwrap().done_at > Some(Timestamp(0)));
}
