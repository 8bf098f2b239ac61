//! Dead letters as operators handle them: the headers that tell where one comes from, which letters a request
//! is about, and which request a letter belongs to.
//!
//! No letter carries a mark of what was decided about it: Kafka cannot change or delete one record. A letter
//! belongs to the first request that selects it, and that follows from the requests alone; so the stage that
//! carries them out and the command that lists letters cannot disagree.

mod codes;

pub use codes::{CODES, code_fault};

use crate::catalog::{parse_dlt, parse_parking};
use crate::codec::{Codec, CodecError, framed_id};
use crate::envelope::{DeadLetterProgress, DeadLetterRequest, Enveloped, IDENTITY_NONE, ProgressRange};
use crate::keyed::KeyedState;
use crate::record::Record;
use crate::time::Timestamp;
use crate::topics::SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1;
use std::cmp::Ordering;
use std::collections::{BTreeSet, VecDeque};
use uuid::Uuid;

/// The stage that carries out requests; also its consumer group.
pub const STAGE: &str = "reprocess_dead_letters";

/// Returns who asks where a policy of the catalog does, so that a request tells.
pub fn policy_name(letters: &str, code: &str) -> String {
    format!("policy {letters}/{code}")
}

/// Names of headers.
pub mod header {
    /// The stage that refused the record (Kafka Connect's).
    pub const STAGE: &str = "__connect.errors.connector.name";
    /// The reason code (Kafka Connect's).
    pub const CODE: &str = "__connect.errors.exception.class.name";
    /// What was wrong (Kafka Connect's).
    pub const MESSAGE: &str = "__connect.errors.exception.message";
    /// The request that replayed the record last.
    pub const REPLAY_ID: &str = "tl-replay-id";
    /// How often the record was replayed.
    pub const REPLAY_COUNT: &str = "tl-replay-count";
    /// How often an act stage has set the record aside in its retry topic, as text.
    pub const RETRY_COUNT: &str = "tl-retry-count";
    /// Before this time, milliseconds since 1970 as text, a record of a retry topic is not tried again.
    pub const RETRY_NOT_BEFORE: &str = "tl-retry-not-before";
    /// The rule that made the record, `<id>@<version>`: on alerts, commands and forwarded messages, so that
    /// what a later stage refuses is known to come from it.
    pub const RULE: &str = "tl-rule";
    /// Where the first dead letter lies, `topic/partition/offset`, kept through further failures. The bridge
    /// derives the ids of what it could not decode from it, so that a second replay changes nothing.
    pub const ORIGIN: &str = "tl-bridge-origin";
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send the letters to the replay topic of the group that refused them.
    Replay,
    /// Count them as dealt with.
    Drop,
    /// End the request of the same id; a drop is undone.
    Cancel,
}

impl Action {
    /// Returns the name in requests.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Drop => "drop",
            Self::Cancel => "cancel",
        }
    }

    /// Reads the name.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Replay, Self::Drop, Self::Cancel].into_iter().find(|action| action.label() == text)
    }
}

/// How a request stands.
pub mod status {
    /// Taken up; where its letters lie is not known yet.
    pub const ACCEPTED: &str = "accepted";
    /// At work.
    pub const RUNNING: &str = "running";
    /// Every selected letter was dealt with.
    pub const DONE: &str = "done";
    /// Ended by a cancel request.
    pub const CANCELLED: &str = "cancelled";
    /// It cannot be carried out; `error` says why.
    pub const FAILED: &str = "failed";
}

/// A dead letter, as far as selecting it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Letter<'a> {
    pub partition: i32,
    pub offset: i64,
    pub time: Timestamp,
    pub code: &'a str,
    pub schema_id: Option<u32>,
    pub replays: u32,
}

impl<'a> Letter<'a> {
    /// Reads what a record of a dead-letter or parking topic says about itself.
    pub fn of(partition: i32, record: &Record<'a>) -> Self {
        let text = |name| record.headers.last(name).and_then(|v| std::str::from_utf8(v).ok());
        Self {
            partition,
            offset: record.offset,
            time: record.time,
            code: text(header::CODE).unwrap_or_default(),
            schema_id: record.value.and_then(|value| framed_id(value).ok()),
            replays: text(header::REPLAY_COUNT).and_then(|n| n.parse().ok()).unwrap_or(0),
        }
    }
}

/// What was decided about a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Nobody has dealt with it yet.
    Open,
    /// It was sent to the replay topic; if it failed there it is a new letter.
    Replayed,
    /// It was dropped.
    Dropped,
    /// It had exhausted its replays and lies in the parking topic.
    Parked,
}

impl Fate {
    /// Returns the word for people and scripts.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Replayed => "replayed",
            Self::Dropped => "dropped",
            Self::Parked => "parked",
        }
    }
}

impl DeadLetterProgress {
    /// Begins the progress of a request that was written at `received_at`, the broker's time.
    pub fn accepted(request: &DeadLetterRequest, received_at: Timestamp) -> Self {
        let ranges = request.ranges.iter();
        Self {
            request_code: request.request_code.clone(),
            received_at,
            action: request.action.clone(),
            topic: request.topic.clone(),
            code: request.code.clone(),
            schema_id: request.schema_id,
            since: request.since,
            until: request.until,
            ranges: ranges
                .map(|r| ProgressRange { partition: r.partition, first: r.first, end: r.end, next: r.first })
                .collect(),
            again: request.again,
            rate_per_second: request.rate_per_second,
            requested_by: request.requested_by.clone(),
            justification: request.justification.clone(),
            replays_below: request.replays_below,
            status: status::ACCEPTED.to_owned(),
            ..Self::derived_from(request, STAGE, "progress")
        }
    }

    /// Makes the progress of a request that does not read.
    pub fn unreadable(request_id: &str, why: String, received_at: Timestamp) -> Self {
        let request = DeadLetterRequest {
            request_id: Some(request_id.to_owned()),
            message_id: Uuid::nil().to_string(),
            identity: IDENTITY_NONE.to_owned(),
            occurred_at: received_at,
            ..DeadLetterRequest::default()
        };
        let mut progress = Self::accepted(&request, received_at);
        progress.end(status::FAILED, Some(why), received_at);
        progress
    }

    /// Returns what the request wants, where it is a replay or a drop.
    pub fn wants(&self) -> Option<Action> {
        Action::parse(&self.action).filter(|action| *action != Action::Cancel)
    }

    /// Says whether its positions are those of the topic that has this id now: those of a topic that was deleted
    /// and made anew mean other letters. A request that was not placed yet, or by an older version, has no id.
    pub fn is_of(&self, topic_id: &str) -> bool {
        self.topic_id.as_deref().is_none_or(|own| own == topic_id || topic_id.is_empty())
    }

    /// Says whether there is work left.
    pub fn is_open(&self) -> bool {
        matches!(self.status.as_str(), status::ACCEPTED | status::RUNNING)
    }

    /// Ends it.
    pub fn end(&mut self, how: &str, error: Option<String>, at: Timestamp) {
        self.status = how.to_owned();
        self.error = error;
        self.done_at = Some(at);
    }

    /// Says whether the selector takes a letter, wherever it lies.
    pub fn selects(&self, letter: &Letter<'_>) -> bool {
        self.code.as_deref().is_none_or(|code| code == letter.code)
            && self.schema_id.is_none_or(|id| letter.schema_id.map(i64::from) == Some(id))
            && self.since.is_none_or(|since| letter.time >= since)
            && self.until.is_none_or(|until| letter.time < until)
            && self.replays_below.is_none_or(|bound| i64::from(letter.replays) < bound)
    }

    /// Says whether the letter's position was looked at already.
    pub fn has_passed(&self, letter: &Letter<'_>) -> bool {
        let within =
            |r: &ProgressRange| r.partition == letter.partition && (r.first..r.next).contains(&letter.offset);
        self.ranges.iter().any(within)
    }

    /// Says what claim the request has to a letter.
    fn claim(&self, letter: &Letter<'_>) -> Claim {
        let within =
            |r: &ProgressRange| r.partition == letter.partition && (r.first..r.end).contains(&letter.offset);
        let Some(action) = self.wants().filter(|_| self.ranges.iter().any(within) && self.selects(letter))
        else {
            return Claim::None;
        };
        let given_up = match self.status.as_str() {
            status::CANCELLED => action == Action::Drop || !self.has_passed(letter),
            status::FAILED => !self.has_passed(letter),
            _ => false,
        };
        if given_up { Claim::Until(self.done_at.unwrap_or_default()) } else { Claim::Held }
    }

    /// Orders requests by when they were written.
    pub fn order(&self, other: &Self) -> Ordering {
        self.received_at.cmp(&other.received_at).then_with(|| self.request_id.cmp(&other.request_id))
    }
}

/// What claim a request has to a letter.
enum Claim {
    None,
    /// It was given up then: requests written before passed the letter over.
    Until(Timestamp),
    Held,
}

/// Returns the request that a letter belongs to: the first that selects it, of `requests` about its topic in
/// [their order](DeadLetterProgress::order). What a request selected and gave up, because it was cancelled
/// before it came there or is a drop that was undone, belongs to none that was written meanwhile.
pub fn claimant<'r>(
    letter: &Letter<'_>,
    requests: impl IntoIterator<Item = &'r DeadLetterProgress>,
) -> Option<&'r DeadLetterProgress> {
    let mut barred_before = Timestamp(i64::MIN);
    for request in requests {
        if request.received_at < barred_before {
            continue;
        }
        match request.claim(letter) {
            Claim::None => {}
            Claim::Until(time) => barred_before = barred_before.max(time),
            Claim::Held => return Some(request),
        }
    }
    None
}

/// Returns what was decided about a letter of a topic, and the request that it belongs to. `requests` are
/// those about the topic, in [their order](DeadLetterProgress::order); a letter that was replayed
/// `replays_max` times is parked instead of being replayed, unless it lies in a parking topic already.
pub fn fate_of(
    topic: &str,
    letter: &Letter<'_>,
    requests: &[DeadLetterProgress],
    replays_max: u32,
) -> (Fate, Option<String>) {
    let Some(request) = claimant(letter, requests) else { return (Fate::Open, None) };
    let fate = match request.wants() {
        _ if !request.has_passed(letter) => Fate::Open,
        Some(Action::Drop) => Fate::Dropped,
        _ if is_exhausted(topic, letter, replays_max) => Fate::Parked,
        _ => Fate::Replayed,
    };
    (fate, request.request_id.clone())
}

/// Says whether a letter was replayed so often that it goes to the parking topic instead. Who replays from a
/// parking topic has decided about its letters: their count begins anew.
pub fn is_exhausted(topic: &str, letter: &Letter<'_>, replays_max: u32) -> bool {
    parse_parking(topic).is_none() && letter.replays >= replays_max
}

/// Takes the name of a dead-letter or parking topic apart into (topic, group).
pub fn parse_letters(name: &str) -> Option<(&str, &str)> {
    parse_dlt(name).or_else(|| parse_parking(name))
}

/// A request with its progress as the keyed state of the stage. Its bytes are the value of the progress topic.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReprocessState {
    /// What the topic holds.
    pub progress: DeadLetterProgress,
    /// When to go on, by the platform's clock; absent: at once. It is not kept: a successor goes on at once.
    pub due: Option<Timestamp>,
    /// The failures whose letters were dealt with last. They are not kept: after a restart a failure that was
    /// told twice just before may be replayed twice.
    pub recent: RecentFailures,
}

/// A failure: topic, partition, offset and time (ms) of the record that failed, and how often it had been
/// replayed. By its time it is known from a record at the same place of a topic that was made anew.
pub type FailureId = (String, i32, i64, i64, u32);

/// Failures that were told last. A load stage that does not know whether Kafka took its letters writes them
/// again, close behind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecentFailures {
    order: VecDeque<FailureId>,
    known: BTreeSet<FailureId>,
}

impl RecentFailures {
    /// More than the letters of one write of a load stage, of which the next attempt writes all again.
    pub const MAX: usize = 20_000;

    /// Notes a failure; returns whether it is new among the last [`RecentFailures::MAX`].
    pub fn note(&mut self, failure: FailureId) -> bool {
        if !self.known.insert(failure.clone()) {
            return false;
        }
        self.order.push_back(failure);
        if self.order.len() > Self::MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

impl KeyedState for ReprocessState {
    fn encode(&self, codec: &Codec, out: &mut Vec<u8>) -> Result<(), CodecError> {
        codec.encode(SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1, &self.progress, out)
    }

    fn decode(bytes: &[u8], codec: &Codec) -> Result<Self, CodecError> {
        Ok(Self { progress: codec.decode(Some(bytes))?, ..Self::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOPIC: &str = "device.thing.v1.count_things-dlt";

    fn letter(offset: i64, code: &'static str) -> Letter<'static> {
        Letter { partition: 0, offset, time: Timestamp(offset), code, schema_id: Some(7), replays: 0 }
    }

    fn request(action: Action, status: &str, first: i64, next: i64, end: i64) -> DeadLetterProgress {
        DeadLetterProgress {
            action: action.label().to_owned(),
            topic: TOPIC.to_owned(),
            status: status.to_owned(),
            ranges: vec![ProgressRange { partition: 0, first, end, next }],
            ..DeadLetterProgress::default()
        }
    }

    #[test]
    fn a_selector_takes_what_meets_all_its_parts() {
        let all = DeadLetterProgress::default();
        let code = DeadLetterProgress { code: Some("bad".to_owned()), ..all.clone() };
        let schema = DeadLetterProgress { schema_id: Some(8), ..all.clone() };
        let time =
            DeadLetterProgress { since: Some(Timestamp(2)), until: Some(Timestamp(5)), ..code.clone() };
        let fresh = DeadLetterProgress { replays_below: Some(1), ..all.clone() };
        for (request, letter, expected) in [
            (&all, letter(0, ""), true),
            (&code, letter(0, "bad"), true),
            (&code, letter(0, "worse"), false),
            (&schema, letter(0, "bad"), false),
            (&schema, Letter { schema_id: Some(8), ..letter(0, "x") }, true),
            (&schema, Letter { schema_id: None, ..letter(0, "x") }, false),
            (&time, letter(2, "bad"), true),
            (&time, letter(5, "bad"), false),
            (&time, letter(1, "bad"), false),
            (&fresh, letter(1, "bad"), true),
            (&fresh, Letter { replays: 1, ..letter(1, "bad") }, false),
        ] {
            assert_eq!(request.selects(&letter), expected, "{request:?} {letter:?}");
        }
    }

    #[test]
    fn a_letter_belongs_to_the_first_request_that_selects_it() {
        use Action::{Drop, Replay};
        let check = |requests: &[DeadLetterProgress], offset, expected| {
            let (fate, _) = fate_of(TOPIC, &letter(offset, "bad"), requests, 10);
            assert_eq!(fate, expected, "{offset} of {requests:?}");
        };
        check(&[], 3, Fate::Open);
        check(&[request(Replay, status::RUNNING, 0, 4, 9)], 3, Fate::Replayed);
        check(&[request(Replay, status::RUNNING, 0, 4, 9)], 4, Fate::Open);
        check(
            &[request(Drop, status::DONE, 0, 9, 9), request(Replay, status::DONE, 0, 9, 9)],
            3,
            Fate::Dropped,
        );
        check(
            &[request(Replay, status::DONE, 0, 9, 9), request(Drop, status::DONE, 0, 9, 9)],
            3,
            Fate::Replayed,
        );
        check(&[request(Drop, status::CANCELLED, 0, 9, 9)], 3, Fate::Open);
        check(
            &[request(Replay, status::CANCELLED, 0, 4, 9), request(Drop, status::DONE, 0, 9, 9)],
            5,
            Fate::Dropped,
        );
        check(&[request(Replay, status::CANCELLED, 0, 4, 9)], 3, Fate::Replayed);
    }

    #[test]
    fn what_a_request_gave_up_belongs_to_none_that_was_written_meanwhile() {
        let at = |request: DeadLetterProgress, time| DeadLetterProgress {
            received_at: Timestamp(time),
            ..request
        };
        let cancelled = |action, next| DeadLetterProgress {
            done_at: Some(Timestamp(50)),
            ..at(request(action, status::CANCELLED, 0, next, 9), 10)
        };
        for given_up in [cancelled(Action::Drop, 9), cancelled(Action::Replay, 2)] {
            let meanwhile = at(request(Action::Replay, status::DONE, 0, 9, 9), 20);
            let later = at(request(Action::Replay, status::DONE, 0, 9, 9), 60);
            let letter = letter(3, "bad");
            let fate = |requests: &[DeadLetterProgress]| fate_of(TOPIC, &letter, requests, 10).0;
            assert_eq!(fate(&[given_up.clone(), meanwhile.clone()]), Fate::Open);
            assert_eq!(fate(&[given_up, meanwhile, later]), Fate::Replayed);
        }
    }

    #[test]
    fn a_failure_is_known_until_so_many_others_were_told() {
        let failure = |offset: usize| ("t".to_owned(), 0, offset as i64, 7, 0);
        let mut recent = RecentFailures::default();
        assert!((0..RecentFailures::MAX).all(|offset| recent.note(failure(offset))));
        assert!(!recent.note(failure(0)), "the oldest is known still");
        assert!(recent.note(failure(RecentFailures::MAX)));
        assert!(recent.note(failure(0)), "one more came since");
        assert_eq!((recent.order.len(), recent.known.len()), (RecentFailures::MAX, RecentFailures::MAX));
    }

    #[test]
    fn an_exhausted_letter_is_parked_but_never_twice() {
        let done = [request(Action::Replay, status::DONE, 0, 9, 9)];
        let exhausted = Letter { replays: 10, ..letter(3, "bad") };
        assert_eq!(fate_of(TOPIC, &exhausted, &done, 10).0, Fate::Parked);
        assert_eq!(fate_of("device.thing.v1.count_things-parking", &exhausted, &done, 10).0, Fate::Replayed);
    }
}
