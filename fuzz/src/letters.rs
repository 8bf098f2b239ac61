//! Dead letters behind hostile requests: the stage that carries them out, and the policies that ask by
//! themselves.

use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::ReplayPolicy;
use throughline_model::codec::Codec;
use throughline_model::dead_letter::header::{CODE, REPLAY_COUNT};
use throughline_model::dead_letter::status;
use throughline_model::envelope::{DeadLetterProgress, DeadLetterRequest};
use throughline_model::keyed::Keyed;
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, Outbox, Record, TopicPartition};
use throughline_model::stage::{Decide as _, Effects, Input};
use throughline_model::time::Timestamp;
use throughline_model::topics::{
    SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1 as PROGRESS, SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1 as REQUESTS,
};
use throughline_runtime::ports::{
    Advance, Extent, Failure, Outlet, SchemaSource, Stretch, StretchReader, TableReader,
};
use throughline_runtime::{Clock, PolicyPorts, ReplayPolicies, ReprocessDeadLetters};

const LETTERS: &str = "device.telemetry.v1.bridge-dlt";
const REPLAYS_MAX: u32 = 3;

/// Returns the stage that carries out requests, with four letters in partition 0 of whatever topic it asks for.
pub fn reprocess(now: Timestamp) -> ReprocessDeadLetters<Letters> {
    ReprocessDeadLetters::new(Letters::new(now), Arc::new(Still(now)), REPLAYS_MAX)
}

/// Policies that meet this progress of a request ask at most once, for something that can be carried out.
pub fn policies(progress: &Record<'_>, codec: &Arc<Codec>, now: Timestamp) {
    let mut table = Batch::new(TopicPartition::new(PROGRESS, 0));
    table.push(0, now, progress.key, progress.value, []);
    let policy = |code: &str| ReplayPolicy {
        letters: LETTERS.to_owned(),
        code: code.to_owned(),
        after: Duration::from_secs(15),
        times: 9,
        rate: 1_000,
    };
    let ports = PolicyPorts {
        letters: Letters::new(now),
        tables: Table(Some(table)),
        outlet: Requests { codec: Arc::clone(codec), now },
        schemas: NoSchemas,
        codec: Arc::clone(codec),
        clock: Arc::new(Still(now)),
    };
    let mut policies = ReplayPolicies::new(vec![policy("bad"), policy("nothing_like_it")], ports);
    let asked = policies.look().expect("nothing fails");
    assert!(asked.len() <= 1, "{asked:?}");
    assert_eq!(policies.look().expect("nothing fails"), Vec::<String>::new(), "it was asked for");
}

/// Four letters, an hour old.
pub struct Letters(Batch);

impl Letters {
    fn new(now: Timestamp) -> Self {
        let mut batch = Batch::new(TopicPartition::new(LETTERS, 0));
        let letters: [&[(&str, &[u8])]; 4] =
            [&[(CODE, b"bad")], &[(CODE, b"odd")], &[(CODE, b"bad"), (REPLAY_COUNT, b"3")], &[]];
        for (headers, offset) in letters.into_iter().zip(0..) {
            let time = now.minus(Duration::from_secs(3_600));
            batch.push(offset, time, Some(b"k"), Some(b"\0\0\0\0\x07"), headers.iter().copied());
        }
        Self(batch)
    }
}

impl StretchReader for Letters {
    fn bounds(&mut self, _topic: &str) -> Result<Option<Extent>, Failure> {
        Ok(Some(Extent { topic_id: "one".to_owned(), partitions: vec![(0, 0, self.0.len() as i64)] }))
    }

    fn first(&mut self, _partition: &TopicPartition) -> Result<i64, Failure> {
        Ok(0)
    }

    fn read(&mut self, partition: &TopicPartition, from: i64, _to: i64) -> Result<Stretch<'_>, Failure> {
        let is_there = partition.partition == 0 && from < self.0.len() as i64;
        Ok(if is_there { Stretch::Records(&self.0) } else { Stretch::End })
    }
}

struct Still(Timestamp);

impl Clock for Still {
    fn now(&self) -> Timestamp {
        self.0
    }
}

/// The table of progress, read once.
struct Table(Option<Batch>);

impl TableReader for Table {
    fn read_partitions(
        &mut self,
        _topic: &Arc<str>,
        _partitions: &[i32],
        _each: &mut dyn FnMut(&Batch),
    ) -> Result<(), Failure> {
        unreachable!("policies follow")
    }

    fn follow(&mut self, topic: &str, each: &mut dyn FnMut(&Batch)) -> Result<(), Failure> {
        assert_eq!(topic, PROGRESS);
        self.0.take().iter().for_each(each);
        Ok(())
    }
}

/// Takes requests up as the stage would.
struct Requests {
    codec: Arc<Codec>,
    now: Timestamp,
}

impl Outlet for Requests {
    fn send_all(&mut self, outbox: &Outbox) -> Result<(), Failure> {
        for request in outbox.iter() {
            assert_eq!(request.topic, REQUESTS);
            let read: DeadLetterRequest = self.codec.decode(request.value).expect("it reads");
            assert_eq!(request.key, read.request_id.as_deref().map(str::as_bytes));
            let mut batch = Batch::new(TopicPartition::new(REQUESTS, 0));
            batch.push(0, self.now, request.key, request.value, []);
            let codec = &self.codec;
            let input = Input { topic: REQUESTS, replayed: false, partition: 0, record: batch.get(0), codec };
            let mut states = Keyed::default();
            let mut effects = Effects::new(Arc::clone(codec));
            let settled = reprocess(self.now).process(&input, &mut states, &mut effects);
            assert_eq!(settled.outcome, Outcome::Emitted, "{settled:?}");
            let taken: Vec<&DeadLetterProgress> = states.iter().map(|(_, state)| &state.progress).collect();
            assert_eq!(taken[0].status, status::ACCEPTED, "{:?}", taken[0].error);
        }
        Ok(())
    }

    fn mirror(&mut self, _group: &str, _advances: &[Advance]) {}
}

struct NoSchemas;

impl SchemaSource for NoSchemas {
    fn fetch(&mut self, _id: u32) -> Result<Option<String>, Failure> {
        Ok(None)
    }
}
