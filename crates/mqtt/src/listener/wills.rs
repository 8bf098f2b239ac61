//! Wills: what a client asked to be published when it is lost. Those with a delay wait here for all workers,
//! because a client may come back to any of them.

use super::conn::{Client, Will};
use super::worker::{Worker, wall_clock};
use crate::auth::Login;
use crate::config::Bounds;
use crate::feeds::Publish;
use crate::transform::Verdict;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::Instant;
use throughline_model::record::Outbox;

struct Delayed {
    at: Instant,
    records: Outbox,
}

#[derive(Default)]
struct Waiting {
    by_client: HashMap<String, Delayed>,
    bytes: usize,
}

/// The wills that wait for their delay, at most one a client.
#[derive(Default)]
pub(crate) struct Wills(Mutex<Waiting>);

impl Wills {
    /// Forgets the will of a client that came back. Call it after its session was opened.
    pub(crate) fn void(&self, client_id: &str) {
        self.0.lock().remove(client_id);
    }

    /// Lets a will wait. `close` ends the session's hold and says whether the client had not come back yet; it
    /// runs under the lock, so that the client comes back either before it or to find the will.
    ///
    /// Returns the records where there is no room.
    fn delay(
        &self,
        client_id: &str,
        at: Instant,
        records: Outbox,
        bounds: &Bounds,
        close: impl FnOnce() -> bool,
    ) -> Option<Outbox> {
        let mut waiting = self.0.lock();
        if !close() {
            return None;
        }
        let bytes = client_id.len() + records.bytes_held();
        if waiting.by_client.len() >= bounds.asides_max || waiting.bytes + bytes > bounds.asides_bytes_max {
            return Some(records);
        }
        waiting.remove(client_id);
        waiting.bytes += bytes;
        waiting.by_client.insert(client_id.to_owned(), Delayed { at, records });
        None
    }

    /// Takes those that are due, or all.
    fn take_due(&self, now: Option<Instant>) -> Vec<Outbox> {
        let mut waiting = self.0.lock();
        let is_due = |will: &Delayed| now.is_none_or(|now| will.at <= now);
        let due = waiting.by_client.iter().filter(|(_, will)| is_due(will));
        let due: Vec<String> = due.map(|(client_id, _)| client_id.clone()).collect();
        due.iter().filter_map(|client_id| waiting.remove(client_id)).collect()
    }
}

impl Waiting {
    fn remove(&mut self, client_id: &str) -> Option<Outbox> {
        let will = self.by_client.remove(client_id)?;
        self.bytes -= client_id.len() + will.records.bytes_held();
        Some(will.records)
    }
}

impl Worker {
    /// Makes the will's records, the session event and what its topic's feed makes of it, and publishes them
    /// now or after the will's delay. `close` ends the session's hold, see [`Wills::delay`].
    pub(crate) fn will(
        &self,
        client: &Client,
        level: u8,
        will: &Will,
        now: Instant,
        close: impl FnOnce() -> bool,
    ) {
        let mut records = Outbox::default();
        self.event(&mut records, client, level, "will", None);
        {
            let mut transformer = self.transformer.borrow_mut();
            let publish = will_publish(&client.id, client.login.as_deref(), will);
            match transformer.admit(&publish, &client.scope(), None) {
                Verdict::Accepted => {}
                Verdict::DeadLettered(code) => {
                    self.meters.dead_letter(transformer.records().get(0).topic, code);
                }
                Verdict::Forbidden(reason) => self.meters.refused(reason),
            }
            for record in transformer.records().iter() {
                let topic = record.topic.into();
                records.push(&topic, record.partition, record.key, record.value, record.headers.iter());
            }
        }
        // A will's delay ends with the session, and that with this instance.
        let delay = will.delay.min(client.session_expiry);
        let bounds = &self.shared.config.bounds;
        let due = if delay.is_zero() || self.draining.get().is_some() {
            close();
            Some(records)
        } else {
            self.shared.wills.delay(&client.id, now + delay, records, bounds, close)
        };
        if let Some(records) = due {
            self.asides.borrow_mut().push(records);
        }
    }

    /// Publishes the wills whose delay is over; without a time all of them, because their sessions end.
    pub(crate) fn fire_wills(&self, now: Option<Instant>) {
        for records in self.shared.wills.take_due(now) {
            self.asides.borrow_mut().push(records);
        }
    }
}

/// Returns the publish that a will is.
pub(super) fn will_publish<'a>(client_id: &'a str, login: Option<&'a Login>, will: &'a Will) -> Publish<'a> {
    Publish {
        topic: &will.topic,
        payload: &will.payload,
        client_id,
        user: login.map(|l| l.user.as_str()),
        login_site: login.and_then(Login::single_site),
        properties: &[],
        received_at: wall_clock(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(bytes: usize) -> Outbox {
        let mut records = Outbox::default();
        records.push(&"t".into(), None, None, Some(&vec![b'w'; bytes]), []);
        records
    }

    #[test]
    fn a_will_beyond_the_bound_of_those_that_wait_is_due_at_once() {
        let now = Instant::now();
        let held = "client-1".len() + records(1_000).bytes_held();
        // Two have room: by their number, or by their bytes to the last of them.
        for (asides_max, asides_bytes_max) in [(2, usize::MAX), (10, 2 * held)] {
            let bounds = Bounds { asides_max, asides_bytes_max, ..Bounds::default() };
            let wills = Wills::default();
            let is_due = |client: &str| wills.delay(client, now, records(1_000), &bounds, || true).is_some();
            assert_eq!(["client-1", "client-2", "client-3"].map(is_due), [false, false, true]);
            wills.void("client-1");
            assert_eq!(
                ["client-3", "client-1"].map(is_due),
                [false, true],
                "who came back made room for one"
            );
            assert_eq!(wills.take_due(None).len(), 2);
            assert_eq!(wills.0.lock().bytes, 0);
        }
    }
}
