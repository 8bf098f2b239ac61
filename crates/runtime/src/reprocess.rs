//! `reprocess_dead_letters` (decide): carries out requests to replay or drop dead letters.
//!
//! A request becomes a state, whose timer fires until its work is done; each firing takes a stretch of the
//! dead-letter topic. What a firing sends and how far it came are in one transaction of the decide loop, so a
//! successor goes on at the next letter and neither skips nor doubles one. It differs from other decide stages
//! in one thing: its timers read letters through a port. What they decide follows from state and letters
//! alone; the clock says only when.
//!
//! Outcomes of a request: *emitted*; *ignored* with `known` where it was taken up before and with `ended` where
//! there is nothing to cancel; *dead_lettered* where it does not read. One that reads but cannot be carried out
//! fails, and its progress says why.

use crate::clock::Clock;
use crate::dead_letter::failure_of;
use crate::ports::{Failure, Stretch, StretchReader};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::{parking_topic, replay_topic};
use throughline_model::dead_letter::{
    Action, Letter, RecentFailures, ReprocessState, STAGE, claimant, header, is_exhausted, parse_letters,
    status,
};
use throughline_model::envelope::{DeadLetterProgress, DeadLetterRequest, ProgressRange};
use throughline_model::keyed::Keyed;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Outbox, Record, TopicPartition};
use throughline_model::stage::{Decide, Effects, Input, Kind, StageSpec};
use throughline_model::time::Timestamp;
use throughline_model::topics::{
    SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1, SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1,
};

/// Letters that one firing replays at most: a transaction of them takes milliseconds.
const CHUNK: i64 = 1_000;
/// Letters that one firing looks at, at most: the loop polls its source in between.
const LOOKED_AT_MAX: usize = 5_000;
/// Bytes that one firing sends, at most but for the last letter.
const BYTES_MAX: usize = 4 << 20;
/// Firings a second of a request with a rate: a smaller burst would cost a transaction a letter.
const FIRINGS_PER_SECOND: i64 = 10;
/// A person looks at the progress.
const COMMIT_INTERVAL: Duration = Duration::from_millis(50);
/// Until letters that have not come are looked for again.
const WAIT: Duration = Duration::from_millis(100);
/// Until a dependency that failed is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// More than any pause between two firings of a request, of which that after a failure is the longest.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// The stage.
pub struct ReprocessDeadLetters<L> {
    spec: StageSpec,
    letters: L,
    clock: Arc<dyn Clock>,
    replays_max: u32,
}

impl<L: StretchReader> ReprocessDeadLetters<L> {
    /// Makes the stage. A letter that was replayed `replays_max` times is parked.
    pub fn new(letters: L, clock: Arc<dyn Clock>, replays_max: u32) -> Self {
        Self { spec: reprocess_spec(), letters, clock, replays_max }
    }

    /// Takes the next stretch of a request. Returns how long to wait before the one after it.
    fn advance(
        &mut self,
        progress: &mut DeadLetterProgress,
        earlier: &[&DeadLetterProgress],
        recent: &mut RecentFailures,
        effects: &mut Effects,
    ) -> Result<Duration, Failure> {
        let now = self.clock.now();
        if progress.status == status::ACCEPTED {
            let extent = self.letters.bounds(&progress.topic)?;
            match extent.as_ref().map(|extent| place(progress, &extent.partitions)) {
                Some(Ok(ranges)) => {
                    (progress.ranges, progress.status) = (ranges, status::RUNNING.to_owned());
                    progress.topic_id = extent.map(|extent| extent.topic_id).filter(|id| !id.is_empty());
                }
                Some(Err(why)) => {
                    progress.end(status::FAILED, Some(why), now);
                    return Ok(Duration::ZERO);
                }
                None => {
                    let why = format!("the topic `{}` does not exist", progress.topic);
                    progress.end(status::FAILED, Some(why), now);
                    return Ok(Duration::ZERO);
                }
            }
        }
        let open = progress.ranges.iter().position(|range| range.next < range.end);
        let Some(index) = open else {
            progress.end(status::DONE, None, now);
            return Ok(Duration::ZERO);
        };
        let range = progress.ranges[index].clone();
        let partition = TopicPartition::new(progress.topic.as_str(), range.partition);
        let begins = match self.letters.read(&partition, range.next, range.end)? {
            Stretch::Records(batch) => batch.iter().map(|record| record.offset).find(|at| *at >= range.next),
            Stretch::End => Some(range.end),
            Stretch::Waiting => return Ok(WAIT),
        };
        let from = begins.unwrap_or(range.next).min(range.end);
        if from > range.next {
            // Positions are left out where transactions end, too: only retention moves the beginning.
            let gone = self.letters.first(&partition)?.min(range.end) - range.next;
            if gone > 0 {
                progress.overtaken = progress.overtaken.saturating_add(gone);
                tracing::error!(
                    stage = STAGE,
                    topic = progress.topic,
                    partition = range.partition,
                    positions = gone,
                    "retention deleted dead letters before a request came to them"
                );
            }
            progress.ranges[index].next = from;
        }
        if from == range.end {
            return Ok(Duration::ZERO);
        }
        let Stretch::Records(batch) = self.letters.read(&partition, from, range.end)? else {
            return Ok(Duration::ZERO);
        };
        let rate = progress.rate_per_second.filter(|rate| *rate > 0);
        let most = rate.map_or(CHUNK, |rate| (rate / FIRINGS_PER_SECOND).clamp(1, CHUNK));
        // Whose positions are those of a topic that is gone has no claim here.
        let earlier: Vec<_> = earlier
            .iter()
            .copied()
            .filter(|other| progress.topic_id.as_deref().is_none_or(|id| other.is_of(id)))
            .collect();
        let mut deal = Deal { progress, earlier, recent, effects, replays_max: self.replays_max, sent: 0 };
        let mut next = from;
        for record in batch.iter().filter(|record| record.offset >= from).take(LOOKED_AT_MAX) {
            if record.offset >= range.end {
                next = range.end;
                break;
            }
            deal.with(range.partition, &record);
            next = record.offset + 1;
            if deal.sent >= most || deal.effects.outbox().bytes_held() >= BYTES_MAX {
                break;
            }
        }
        let sent = deal.sent;
        progress.ranges[index].next = next;
        Ok(rate.map_or(Duration::ZERO, |rate| Duration::from_micros((sent * 1_000_000 / rate) as u64)))
    }
}

/// Returns what the stage reads and keeps.
pub fn reprocess_spec() -> StageSpec {
    StageSpec {
        group: STAGE,
        kind: Kind::Decide,
        inputs: vec![SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1],
        tables: Vec::new(),
        changelog: Some(SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1.to_owned()),
        commit_interval: COMMIT_INTERVAL,
    }
}

impl<L: StretchReader> Decide for ReprocessDeadLetters<L> {
    type State = ReprocessState;

    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    /// A request's time is the broker's: it says nothing about when to go on.
    fn timers_follow_the_clock(&self) -> bool {
        true
    }

    fn process(
        &mut self,
        input: &Input<'_>,
        states: &mut Keyed<Self::State>,
        effects: &mut Effects,
    ) -> Settled {
        let time = input.record.time;
        let key = input.record.key_str().filter(|key| !key.is_empty());
        let request = input.decode::<DeadLetterRequest>().map_err(|e| (e.code(), e.to_string()));
        let request = request.and_then(|request| match key {
            Some(key) if request.request_id.as_deref() == Some(key) => Ok((key, request)),
            _ => Err(("key_mismatch", "the record's key is not the id of the request".to_owned())),
        });
        match request {
            Ok((key, request)) => {
                let taken_up = take_up(key, &request, time, states);
                let ended = states.get(key).map(|state| &state.progress).filter(|p| !p.is_open());
                let asked = request.request_code.as_deref();
                match (&taken_up.reason, ended) {
                    (Cow::Borrowed(reason), _) if taken_up.outcome == Outcome::Ignored => {
                        effects.answered(asked, "ignored", Some(reason));
                    }
                    (_, Some(ended)) => {
                        if ended.status == status::CANCELLED {
                            effects.answered(asked, "success", None);
                        }
                        answer(ended, effects);
                    }
                    (_, None) => {}
                }
                taken_up
            }
            Err((code, why)) => {
                // Whoever waits for it sees why; the letter keeps the bytes.
                if let Some(key) = key.filter(|key| states.get(key).is_none()) {
                    states.get_mut(key).progress = DeadLetterProgress::unreadable(key, why.clone(), time);
                    effects.answered(None, "failure", Some(code));
                }
                Settled::dead_lettered(code, why)
            }
        }
    }

    fn due_at(&self, state: &Self::State) -> Option<Timestamp> {
        // What lies farther ahead was put off by a clock that was set back.
        let most = self.clock.now().plus(PAUSE_MAX);
        state.progress.is_open().then(|| state.due.filter(|due| *due <= most).unwrap_or(Timestamp(0)))
    }

    fn fire(&mut self, key: &str, due: Timestamp, states: &mut Keyed<Self::State>, effects: &mut Effects) {
        let Some(mut progress) = states.get(key).map(|state| state.progress.clone()) else { return };
        let mut recent = std::mem::take(&mut states.get_mut(key).recent);
        let earlier = earlier_than(&progress, states);
        // Which letters belong to an earlier request is known once it was placed.
        let unplaced = earlier.iter().any(|request| request.status == status::ACCEPTED);
        let advanced =
            if unplaced { Ok(WAIT) } else { self.advance(&mut progress, &earlier, &mut recent, effects) };
        let pause = match advanced {
            Ok(pause) => {
                if progress.is_open() {
                    progress.error = None;
                }
                pause
            }
            Err(failure) => {
                tracing::warn!(stage = STAGE, request = key, "{failure}; it is tried again");
                progress.error = Some(failure.to_string());
                RETRY
            }
        };
        if !progress.is_open() {
            answer(&progress, effects);
            // Requests are remembered for ever, and these are up to megabytes of each.
            recent = RecentFailures::default();
        }
        let next = self.clock.now().plus(pause);
        let state = states.get_mut(key);
        state.progress = progress;
        state.recent = recent;
        state.due = Some(next.max(Timestamp(due.0 + 1)));
    }
}

/// Notes how a request ended, for `requests_total`. Its progress says why.
fn answer(ended: &DeadLetterProgress, effects: &mut Effects) {
    let (response_code, reason) = match ended.status.as_str() {
        status::DONE => ("success", None),
        status::CANCELLED => ("failure", Some("cancelled")),
        _ => ("failure", None),
    };
    effects.answered(ended.request_code.as_deref(), response_code, reason);
}

/// Makes a state of a request, or carries out a cancel.
fn take_up(
    key: &str,
    request: &DeadLetterRequest,
    time: Timestamp,
    states: &mut Keyed<ReprocessState>,
) -> Settled {
    let action = Action::parse(&request.action);
    if let Some(known) = states.get(key).map(|state| &state.progress) {
        let ends = action == Some(Action::Cancel)
            && (known.is_open() || (known.wants() == Some(Action::Drop) && known.status == status::DONE));
        return match action {
            _ if ends => {
                let state = states.get_mut(key);
                state.progress.end(status::CANCELLED, None, time);
                state.recent = RecentFailures::default();
                Settled::emitted()
            }
            Some(Action::Cancel) => Settled::new(Outcome::Ignored, "ended"),
            _ => Settled::new(Outcome::Ignored, "known"),
        };
    }
    // Requests are carried out in the order of their records, which the broker's clock may not keep.
    let newest = states.iter().map(|(_, state)| state.progress.received_at).max();
    let time = newest.map_or(time, |newest| time.max(Timestamp(newest.0.saturating_add(1))));
    let mut progress = DeadLetterProgress::accepted(request, time);
    if let Some(why) = fault(action, request) {
        progress.end(status::FAILED, Some(why), time);
    }
    states.get_mut(key).progress = progress;
    Settled::emitted()
}

/// Says what is wrong with a new request.
fn fault(action: Option<Action>, request: &DeadLetterRequest) -> Option<String> {
    let is_range = |r: &throughline_model::envelope::LetterRange| 0 <= r.first && r.first <= r.end;
    let justified = request.justification.as_deref().is_some_and(|why| !why.trim().is_empty());
    match action {
        None => Some(format!("`{}` is no action: replay, drop or cancel", request.action)),
        Some(Action::Cancel) => Some("there is no request of this id to cancel".to_owned()),
        Some(Action::Drop) if !justified => Some("a drop needs a justification".to_owned()),
        Some(_) if parse_letters(&request.topic).is_none() => {
            Some(format!("`{}` is neither a dead-letter nor a parking topic", request.topic))
        }
        Some(_) => {
            request.ranges.iter().find(|range| !is_range(range)).map(|r| {
                format!("positions {} to {} of partition {} are no range", r.first, r.end, r.partition)
            })
        }
    }
}

/// Returns where the letters of a request lie, now that the bounds of its topic are known: what retention
/// deleted is left out, and what will come is refused, for a request is finite.
fn place(progress: &DeadLetterProgress, bounds: &[(i32, i64, i64)]) -> Result<Vec<ProgressRange>, String> {
    let whole = |(partition, first, end): &(i32, i64, i64)| ProgressRange {
        partition: *partition,
        first: *first,
        end: *end,
        next: *first,
    };
    if progress.ranges.is_empty() {
        return Ok(bounds.iter().map(whole).collect());
    }
    let placed = progress.ranges.iter().map(|range| {
        let (partition, topic) = (range.partition, &progress.topic);
        let Some((_, first, end)) = bounds.iter().find(|(number, _, _)| *number == partition) else {
            return Err(format!("`{topic}` has no partition {partition}"));
        };
        if range.end > *end {
            return Err(format!("`{topic}`/{partition} ends at {end}, before {}", range.end));
        }
        let next = range.next.max(*first).min(range.end);
        Ok(ProgressRange { next, ..range.clone() })
    });
    placed.collect()
}

/// Returns the requests about the same topic that were written before `progress`, in their order.
fn earlier_than<'s>(
    progress: &DeadLetterProgress,
    states: &'s Keyed<ReprocessState>,
) -> Vec<&'s DeadLetterProgress> {
    let others = states.iter().map(|(_, state)| &state.progress);
    let earlier = others.filter(|other| other.topic == progress.topic && other.order(progress).is_lt());
    let mut earlier: Vec<_> = earlier.collect();
    earlier.sort_by(|a, b| a.order(b));
    earlier
}

/// What a firing does with its letters.
struct Deal<'a> {
    progress: &'a mut DeadLetterProgress,
    earlier: Vec<&'a DeadLetterProgress>,
    recent: &'a mut RecentFailures,
    effects: &'a mut Effects,
    replays_max: u32,
    /// Records sent, to the replay or to the parking topic.
    sent: i64,
}

impl Deal<'_> {
    fn with(&mut self, partition: i32, record: &Record<'_>) {
        let letter = Letter::of(partition, record);
        if !self.progress.selects(&letter) {
            return;
        }
        let wants = self.progress.wants();
        let exhausted = is_exhausted(&self.progress.topic, &letter, self.replays_max);
        let requests = self.earlier.iter().copied().chain([&*self.progress]);
        let claimant = claimant(&letter, requests);
        let is_ours = claimant.is_some_and(|request| request.request_id == self.progress.request_id);
        let was_replayed = claimant.is_some_and(|request| request.wants() == Some(Action::Replay));
        let again = wants == Some(Action::Replay) && self.progress.again && was_replayed && !exhausted;
        let is_told_again = failure_of(record).is_some_and(|failure| !self.recent.note(failure));
        if (!is_ours && !again) || is_told_again {
            count(&mut self.progress.skipped);
        } else if wants == Some(Action::Drop) {
            count(&mut self.progress.dropped);
        } else if exhausted {
            self.park(record);
        } else {
            self.replay(partition, record);
        }
    }

    fn park(&mut self, record: &Record<'_>) {
        let Some((topic, group)) = parse_letters(&self.progress.topic) else { return };
        let to = self.effects.name(&parking_topic(topic, group));
        self.effects.outbox_mut().push(&to, None, record.key, record.value, record.headers.iter());
        count(&mut self.progress.parked);
        self.sent += 1;
    }

    fn replay(&mut self, partition: i32, record: &Record<'_>) {
        let id = self.progress.request_id.clone().unwrap_or_default();
        let from = TopicPartition::new(self.progress.topic.as_str(), partition);
        push_replay(self.effects.outbox_mut(), &from, record, &id);
        count(&mut self.progress.replayed);
        self.sent += 1;
    }
}

/// The number it was is read from Kafka, so it may be the largest.
fn count(letters: &mut i64) {
    *letters = letters.saturating_add(1);
}

/// Appends the replay of a dead letter that lies in `from`: key, value and headers byte for byte, with the
/// request's id, the count of replays, which begins anew for what was parked, and where the letter lies
/// unless it says where the first one lay.
pub fn push_replay(outbox: &mut Outbox, from: &TopicPartition, record: &Record<'_>, request_id: &str) {
    let Some((topic, group)) = parse_letters(&from.topic) else { return };
    let letter = Letter::of(from.partition, record);
    let was_parked = throughline_model::catalog::parse_parking(&from.topic).is_some();
    let count = if was_parked { 1 } else { letter.replays.saturating_add(1) }.to_string();
    let origin = format!("{from}/{}", record.offset);
    let lineage = [header::REPLAY_ID, header::REPLAY_COUNT];
    let kept = record.headers.iter().filter(|(name, _)| !lineage.contains(name));
    let added = [(header::REPLAY_ID, request_id.as_bytes()), (header::REPLAY_COUNT, count.as_bytes())];
    let first = record.headers.last(header::ORIGIN).is_none();
    let origin = first.then_some((header::ORIGIN, origin.as_bytes()));
    let to: Arc<str> = replay_topic(topic, group).into();
    outbox.push(&to, None, record.key, record.value, kept.chain(added).chain(origin));
}
