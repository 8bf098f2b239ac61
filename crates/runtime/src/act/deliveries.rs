//! Deliveries: which is begun, and what its answer says about the record and about the other side.

use super::window::{Route, Step};
use super::{ANSWER_WAIT, ActLoop, FINISH_BUDGET, UNDER_WAY_MAX};
use crate::clock::elapsed;
use crate::config::Stopped;
use crate::dead_letter::{Fault, Retry, push_retry};
use crate::policy::{self, Class, Response};
use crate::ports::{Answer, Effector, Failure, SchemaSource, Source, Transactions};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::retry_topic;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::TopicPartition;
use throughline_model::stage::Act;
use throughline_model::time::Timestamp;

/// So many failures in a row, none of which shows whose fault it is, are taken for the other side's: the record
/// that failed, the one behind it, and either of them once more.
const FAILURES_TELL: u32 = 3;
/// Why a record that is emitted was not delivered.
const SET_ASIDE: &str = "set_aside";
/// Why a record that was set aside too often is dead-lettered.
const EXHAUSTED: &str = "retries_exhausted";

impl<A, E, S, T, Q> ActLoop<A, E, S, T, Q>
where
    A: Act,
    E: Effector,
    S: Source,
    T: Transactions,
    Q: SchemaSource,
{
    /// Begins what is due: one delivery in each partition or, while the other side is down, one in all.
    pub(super) fn begin_due(&mut self) {
        let now = self.clock.now();
        if self.gate.has_failed() {
            let next = self.windows.iter().filter_map(|(partition, window)| {
                window.next_to_begin(now).map(|(index, tried)| (tried, partition, index))
            });
            let next = next.min().map(|(_, partition, index)| (partition.clone(), index));
            if let Some((partition, index)) = next
                && self.under_way.is_empty()
                && self.gate.is_due(now)
            {
                self.begin(&partition, index, now);
            }
            return;
        }
        let next = self.windows.iter().filter_map(|(partition, window)| {
            window.next_to_begin(now).map(|(index, _)| (partition.clone(), index))
        });
        let next: Vec<_> = next.collect();
        for (partition, index) in next {
            self.begin(&partition, index, now);
        }
    }

    fn begin(&mut self, partition: &TopicPartition, index: usize, now: Timestamp) {
        let window = self.windows.get_mut(partition).expect("it was just found");
        if window.items[index].delivery.expires_at.is_some_and(|expires| expires < now) {
            window.items[index].settle(Settled::new(Outcome::Expired, ""), Route::Nowhere);
            self.pass_settled(partition);
        } else if self.under_way.len() < UNDER_WAY_MAX {
            let token = self.next_token;
            self.next_token += 1;
            self.under_way.insert(token, partition.clone());
            self.effector.begin(token, window.begin(index, token));
        }
    }

    /// Takes the answers there are, waiting for the first at most `wait`.
    pub(super) fn hear(&mut self, mut wait: Duration) {
        while !self.under_way.is_empty() {
            let Some((token, answer)) = self.effector.answer(wait) else { return };
            wait = Duration::ZERO;
            self.judge(token, answer);
        }
    }

    /// Waits within a budget for the answers of these partitions and commits what is known.
    pub(super) fn finish(&mut self, partitions: &[TopicPartition]) -> Result<(), Stopped> {
        if self.needs_reset {
            return Ok(());
        }
        let began = self.clock.now();
        let is_under_way = |act: &Self| {
            let windows = partitions.iter().filter_map(|partition| act.windows.get(partition));
            windows.into_iter().any(super::window::Window::is_under_way)
        };
        while is_under_way(self) && elapsed(began, self.clock.now()) < FINISH_BUDGET {
            self.source.keep_alive();
            self.signals.turned();
            self.hear(ANSWER_WAIT);
        }
        self.commit_now()
    }

    fn judge(&mut self, token: u64, answer: Answer) {
        let now = self.clock.now();
        let Some(partition) = self.under_way.remove(&token) else { return };
        match answer {
            Answer::Delivered => {
                self.passes();
                self.settle(&partition, token, Settled::emitted(), Route::Nowhere);
            }
            Answer::Refused { code, message } => {
                self.passes();
                let reason = Cow::Owned(code);
                let settled = Settled { reason, ..Settled::dead_lettered("", message) };
                self.settle(&partition, token, settled, Route::Letters("TASK_PUT"));
            }
            Answer::Unavailable { message } => {
                self.wait_again(&partition, token, now);
                self.is_down(message, now);
            }
            Answer::Failed { message, wait } => {
                self.failed_in_a_row += 1;
                let passed = self.passed;
                let item = self.windows.get_mut(&partition).and_then(|window| window.under(token));
                let asides = item.and_then(|item| item.failed(passed).then_some(item.asides));
                // Where others pass it is the record's fault, else the other side's.
                let class = if asides.is_some() { Class::Data } else { Class::Dependency };
                let rule = policy::rule(self.spec.kind, policy::Step::Deliver, class);
                if let (Some(asides), Some(Response::SetAside)) = (asides, rule.map(|rule| rule.response)) {
                    self.set_aside(&partition, token, asides, message, wait);
                    return;
                }
                let pause = wait.unwrap_or_default().min(self.config.retry_most);
                self.wait_again(&partition, token, now.plus(pause.max(self.config.retry_least)));
                if self.failed_in_a_row >= FAILURES_TELL {
                    self.is_down(message, now);
                }
            }
        }
    }

    /// The other side took or refused something, so it works.
    fn passes(&mut self) {
        self.passed += 1;
        self.failed_in_a_row = 0;
        self.gate.succeeded();
        self.signals.works(self.effector.dependency());
    }

    /// The other side cannot be used: the next attempt is due after the back-off.
    fn is_down(&mut self, message: String, now: Timestamp) {
        // Several that were under way fail together; that is one failure.
        if self.gate.is_due(now) {
            self.gate.failed(now);
        }
        let dependency = self.effector.dependency();
        self.signals.failed(&Failure::Dependency { dependency, message });
    }

    fn wait_again(&mut self, partition: &TopicPartition, token: u64, due: Timestamp) {
        if let Some(item) = self.windows.get_mut(partition).and_then(|window| window.under(token)) {
            item.wait_until(due, self.clock.now());
        }
    }

    fn settle(&mut self, partition: &TopicPartition, token: u64, settled: Settled, route: Route) {
        if let Some(item) = self.windows.get_mut(partition).and_then(|window| window.under(token)) {
            item.settle(settled, route);
            self.pass_settled(partition);
        }
    }

    /// Sends a record to the retry topic, or to the dead letters where it was there too often.
    fn set_aside(
        &mut self,
        partition: &TopicPartition,
        token: u64,
        asides: u32,
        message: String,
        wait: Option<Duration>,
    ) {
        tracing::debug!(stage = self.spec.group, %partition, asides, "set aside: {message}");
        if asides >= self.config.asides_max {
            let message = format!("set aside {asides} times, others passed meanwhile; at last: {message}");
            let settled = Settled::dead_lettered(EXHAUSTED, message);
            self.settle(partition, token, settled, Route::Letters("TASK_PUT"));
            return;
        }
        let doubled = self.config.aside_least.saturating_mul(1_u32.checked_shl(asides).unwrap_or(u32::MAX));
        let pause = doubled.max(wait.unwrap_or_default()).min(self.config.aside_most);
        let retry = Retry { count: asides + 1, not_before: self.clock.now().plus(pause) };
        let settled = Settled::new(Outcome::Emitted, SET_ASIDE);
        self.settle(partition, token, settled, Route::Retry(retry, message));
    }

    /// Moves the partition past what is settled at the beginning of its window.
    pub(super) fn pass_settled(&mut self, partition: &TopicPartition) {
        let Some(window) = self.windows.get_mut(partition) else { return };
        let lane = self.lanes.get_mut(partition).expect("each window has its lane");
        while let Some(item) = window.pop_settled() {
            let Step::Settled(settled, route) = &item.step else { return };
            let record = item.record();
            let mut fault = Fault {
                stage: self.spec.group,
                topic: &partition.topic,
                partition: partition.partition,
                replayed: lane.replayed,
                step: "TASK_PUT",
                code: &settled.reason,
                message: settled.message.as_deref().unwrap_or_default(),
            };
            match route {
                Route::Nowhere => {}
                Route::Letters(step) => {
                    fault.step = step;
                    lane.destination.push(&mut window.outbox, &record, &fault);
                }
                Route::Retry(retry, message) => {
                    fault.message = message;
                    let to: Arc<str> = retry_topic(&lane.topic, self.spec.group).into();
                    push_retry(&mut window.outbox, &to, &record, &fault, *retry);
                }
            }
            lane.pass(record.offset, settled);
            lane.time_batch(item.timing(settled.outcome));
            self.pending_since.get_or_insert(self.clock.now());
        }
    }
}
