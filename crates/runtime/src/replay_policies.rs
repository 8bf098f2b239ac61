//! Replays that nobody has to ask for: a policy of the catalog waits until no further letter of its cause has
//! come for a while, and then writes an ordinary request.
//!
//! It only reads and asks; `reprocess_dead_letters` carries the request out like any other, so a letter that
//! somebody dealt with already belongs to the earlier request and is skipped. That it asks once follows from
//! three things. The id of a request is derived from the policy and the newest letter, so that two members, or
//! one before and after a restart, write the same request, which counts once. A policy never asks twice for
//! the same position. And a letter that was replayed [`times`](ReplayPolicy::times) times, by whomever, is none
//! of its letters any more: what fails again waits for a person.

use crate::clock::Clock;
use crate::config::LoopConfig;
use crate::ports::{Failure, Outlet, SchemaSource, Stretch, StretchReader, TableReader};
use crate::schemas::Schemas;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use throughline_model::catalog::ReplayPolicy;
use throughline_model::codec::Codec;
use throughline_model::dead_letter::{Action, Letter, STAGE, claimant, status};
use throughline_model::envelope::{
    DeadLetterProgress, DeadLetterRequest, Enveloped, IDENTITY_NONE, LetterRange,
};
use throughline_model::ids::{TraceId, timed_message_id};
use throughline_model::record::{Batch, Outbox, TopicPartition};
use throughline_model::stage::traceparent;
use throughline_model::time::Timestamp;
use throughline_model::topics::{
    SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1 as PROGRESS, SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1 as REQUESTS,
};

/// Letters that one look takes for a policy, one stretch beyond at most: the next look goes on. It bounds how long
/// one policy keeps the others and the end of the process waiting.
const LOOKED_AT_MAX: usize = 20_000;

/// What the policies look through and write to.
pub struct PolicyPorts<L, T, O, Q> {
    /// Reads letters.
    pub letters: L,
    /// Follows the requests.
    pub tables: T,
    /// Writes requests.
    pub outlet: O,
    /// Resolves the schemas that requests were written under.
    pub schemas: Q,
    /// The schemas known so far, with the topic of requests bound.
    pub codec: Arc<Codec>,
    /// The platform's time.
    pub clock: Arc<dyn Clock>,
}

/// The policies at work. Call [`ReplayPolicies::look`] every second or so.
pub struct ReplayPolicies<L, T, O, Q> {
    letters: L,
    tables: T,
    outlet: O,
    schemas: Schemas<Q>,
    clock: Arc<dyn Clock>,
    watched: Vec<Watched>,
    /// Every request that is known, by id; what was asked here counts at once.
    requests: BTreeMap<String, DeadLetterProgress>,
    /// What was followed and is not decoded yet.
    backlog: VecDeque<Batch>,
}

/// A policy with what it has seen.
struct Watched {
    policy: ReplayPolicy,
    /// The topic in which the rest counts.
    topic_id: String,
    /// The next position of each partition.
    next: BTreeMap<i32, i64>,
    /// Time of the newest letter of the cause, whether it may be replayed or not: it is not over while they come.
    heard: Timestamp,
    /// Letters to ask for: from the first to behind the last, by partition.
    wanted: BTreeMap<i32, (i64, i64)>,
    /// Positions before which none of them is open, by partition.
    checked: BTreeMap<i32, i64>,
    /// Time of the newest of them.
    newest: Timestamp,
}

impl<L, T, O, Q> ReplayPolicies<L, T, O, Q>
where
    L: StretchReader,
    T: TableReader,
    O: Outlet,
    Q: SchemaSource,
{
    /// Makes the policies; nothing is read yet.
    pub fn new(policies: Vec<ReplayPolicy>, ports: PolicyPorts<L, T, O, Q>) -> Self {
        let watched = policies.into_iter().map(|policy| Watched::of(policy, String::new()));
        Self {
            letters: ports.letters,
            tables: ports.tables,
            outlet: ports.outlet,
            schemas: Schemas::new(ports.schemas, ports.codec, &LoopConfig::default()),
            clock: ports.clock,
            watched: watched.collect(),
            requests: BTreeMap::new(),
            backlog: VecDeque::new(),
        }
    }

    /// Looks at new letters and writes the requests that are due. Returns the ids of what it asked for.
    ///
    /// # Errors
    /// [`Failure::Dependency`]; the next call goes on.
    pub fn look(&mut self) -> Result<Vec<String>, Failure> {
        self.follow_requests()?;
        let mut asked = Vec::new();
        for index in 0..self.watched.len() {
            let mut left = LOOKED_AT_MAX;
            let is_at_the_end = self.read(index, &mut left)?;
            let watched = &self.watched[index];
            let quiet_until = watched.heard.plus(watched.policy.after);
            if !is_at_the_end || watched.wanted.is_empty() || self.clock.now() < quiet_until {
                continue;
            }
            match self.is_any_open(index, &mut left)? {
                Some(true) => asked.push(self.ask(index)?),
                Some(false) => {} // Somebody dealt with all of them.
                None => continue,
            }
            let watched = &mut self.watched[index];
            watched.wanted.clear();
            watched.checked.clear();
        }
        Ok(asked)
    }

    /// Takes what is new about requests.
    fn follow_requests(&mut self) -> Result<(), Failure> {
        let backlog = &mut self.backlog;
        self.tables.follow(PROGRESS, &mut |batch| backlog.push_back(batch.clone()))?;
        while let Some(batch) = self.backlog.front() {
            self.schemas.resolve(batch, false, self.clock.now())?;
            for record in batch.iter() {
                let Some(key) = record.key_str() else { continue };
                // What does not read is no request of ours, and stops the stage that owns the topic.
                if let Ok(progress) = self.schemas.codec().decode::<DeadLetterProgress>(record.value) {
                    if matches!(progress.status.as_str(), status::CANCELLED | status::FAILED) {
                        // What it gave up may be open again.
                        let about = self.watched.iter_mut().filter(|w| w.policy.letters == progress.topic);
                        about.for_each(|watched| watched.checked.clear());
                    }
                    self.requests.insert(key.to_owned(), progress);
                }
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    /// Reads on in the letters of a policy. Returns whether it has seen all that there are.
    fn read(&mut self, index: usize, left: &mut usize) -> Result<bool, Failure> {
        let watched = &mut self.watched[index];
        let Some(extent) = self.letters.bounds(&watched.policy.letters)? else { return Ok(false) };
        if watched.topic_id != extent.topic_id {
            *watched = Watched::of(watched.policy.clone(), extent.topic_id);
        }
        let name = watched.policy.name();
        let own: Vec<&DeadLetterProgress> =
            self.requests.values().filter(|request| request.requested_by == name).collect();
        let own: Vec<_> = own.into_iter().filter(|request| request.is_of(&watched.topic_id)).collect();
        for (partition, first, end) in extent.partitions {
            let mut next = watched.next.get(&partition).copied().unwrap_or(first).max(first);
            let at = TopicPartition::new(watched.policy.letters.as_str(), partition);
            while next < end {
                if *left == 0 {
                    return Ok(false);
                }
                match self.letters.read(&at, next, end)? {
                    Stretch::Waiting => return Ok(false),
                    Stretch::End => next = end,
                    Stretch::Records(batch) => {
                        for record in batch.iter().filter(|record| record.offset >= next) {
                            watched.see(&Letter::of(partition, &record), &own);
                            *left = left.saturating_sub(1);
                        }
                        next = batch.iter().last().map_or(next, |record| record.offset + 1).max(next);
                    }
                }
                watched.next.insert(partition, next);
            }
        }
        Ok(true)
    }

    /// Says whether a letter is left that belongs to no request; `None` where not all could be looked at just now:
    /// then the next call goes on where this one stood.
    fn is_any_open(&mut self, index: usize, left: &mut usize) -> Result<Option<bool>, Failure> {
        let Watched { policy, wanted, checked, topic_id, .. } = &mut self.watched[index];
        let about =
            |request: &&DeadLetterProgress| request.topic == policy.letters && request.is_of(topic_id);
        let mut requests: Vec<&DeadLetterProgress> = self.requests.values().filter(about).collect();
        requests.sort_by(|a, b| a.order(b));
        for (partition, (first, end)) in wanted {
            let at = TopicPartition::new(policy.letters.as_str(), *partition);
            let next = checked.entry(*partition).or_insert(*first);
            while *next < *end {
                if *left == 0 {
                    return Ok(None);
                }
                match self.letters.read(&at, *next, *end)? {
                    Stretch::Waiting => return Ok(None),
                    Stretch::End => *next = *end,
                    Stretch::Records(batch) => {
                        for record in batch.iter().filter(|r| (*next..*end).contains(&r.offset)) {
                            let letter = Letter::of(*partition, &record);
                            let is_open = claimant(&letter, requests.iter().copied()).is_none();
                            if policy.takes(&letter) && is_open {
                                return Ok(Some(true));
                            }
                            *left = left.saturating_sub(1);
                        }
                        *next = batch.iter().last().map_or(*end, |record| record.offset + 1).max(*next);
                    }
                }
            }
        }
        Ok(Some(false))
    }

    /// Writes the request of a policy, unless it is known. Returns its id.
    fn ask(&mut self, index: usize) -> Result<String, Failure> {
        let request = self.watched[index].request(self.clock.now());
        let id = request.request_id.clone().unwrap_or_default();
        if self.requests.contains_key(&id) {
            return Ok(id);
        }
        let trace = traceparent(&request.envelope());
        let headers = trace.as_deref().map(|t| ("traceparent", t.as_bytes()));
        let codec = self.schemas.codec();
        let mut outbox = Outbox::default();
        let written = outbox.push_with(&REQUESTS.into(), None, Some(id.as_bytes()), headers, |out| {
            codec.encode(REQUESTS, &request, out).map(|()| true)
        });
        // The topics of the catalog are bound when a role starts.
        written.map_err(|e| Failure::Dependency { dependency: "registry", message: e.to_string() })?;
        self.outlet.send_all(&outbox)?;
        let ranges: Vec<String> =
            request.ranges.iter().map(|r| format!("{}/{}..{}", r.partition, r.first, r.end)).collect();
        tracing::warn!(
            stage = STAGE,
            request = id,
            ranges = ranges.join(" "),
            "a replay is asked for by the {}",
            request.requested_by
        );
        // Until its progress is read; then the broker's time stands in it.
        self.requests.insert(id.clone(), DeadLetterProgress::accepted(&request, request.occurred_at));
        Ok(id)
    }
}

impl Watched {
    fn of(policy: ReplayPolicy, topic_id: String) -> Self {
        Self {
            policy,
            topic_id,
            next: BTreeMap::new(),
            heard: Timestamp(0),
            wanted: BTreeMap::new(),
            checked: BTreeMap::new(),
            newest: Timestamp(0),
        }
    }

    /// Takes a letter into account. `own` are the requests that the policy wrote.
    fn see(&mut self, letter: &Letter<'_>, own: &[&DeadLetterProgress]) {
        if letter.code != self.policy.code {
            return;
        }
        self.heard = self.heard.max(letter.time);
        let was_asked = own.iter().flat_map(|request| &request.ranges).any(|range| {
            range.partition == letter.partition && (range.first..range.end).contains(&letter.offset)
        });
        if was_asked || !self.policy.takes(letter) {
            return;
        }
        let (_, end) = self.wanted.entry(letter.partition).or_insert((letter.offset, letter.offset));
        *end = letter.offset + 1;
        self.newest = self.newest.max(letter.time);
    }

    fn request(&self, now: Timestamp) -> DeadLetterRequest {
        let policy = &self.policy;
        let name = policy.name();
        let newest: Vec<String> = self.wanted.iter().map(|(p, (_, end))| format!("{p}/{end}")).collect();
        let id = timed_message_id(self.newest, STAGE, &name, &newest.join(" "));
        let random = id.as_u64_pair().1;
        let range = |(partition, (first, end)): (&i32, &(i64, i64))| LetterRange {
            partition: *partition,
            first: *first,
            end: *end,
        };
        let seconds = policy.after.as_secs();
        DeadLetterRequest {
            message_id: id.to_string(),
            trace_id: TraceId::mint(now, id.as_bytes(), random).to_string(),
            request_id: Some(id.to_string()),
            request_code: Some("dead_letter_replay".to_owned()),
            identity: IDENTITY_NONE.to_owned(),
            received_by: STAGE.to_owned(),
            stream: "dead_letter_request".to_owned(),
            occurred_at: now,
            received_at: now,
            action: Action::Replay.label().to_owned(),
            topic: policy.letters.clone(),
            code: Some(policy.code.clone()),
            ranges: self.wanted.iter().map(range).collect(),
            rate_per_second: Some(i64::from(policy.rate)),
            requested_by: name,
            justification: Some(format!("no further letter of this cause came for {seconds} s")),
            replays_below: Some(i64::from(policy.times)),
            ..DeadLetterRequest::default()
        }
    }
}
