//! PUBLISH, the only packet that matters for speed.

use super::conn::{Conn, Held};
use super::worker::{Worker, wall_clock};
use crate::auth::Login;
use crate::feeds::Publish;
use crate::inbox::Token;
use crate::ring::Done;
use crate::transform::Verdict;
use std::rc::Rc;
use throughline_runtime::ports::NotTaken;

/// MQTT 5, PUBACK reason code: not authorized.
const NOT_AUTHORIZED: u8 = 0x87;

impl Worker {
    /// Takes a PUBLISH of QoS 0 (`packet_id` 0) or 1. Everything about it happens here, so that a parser
    /// of our own can take the crate's place.
    pub(crate) fn publish(
        self: &Rc<Self>,
        conn: &Rc<Conn>,
        topic: &str,
        payload: &[u8],
        packet_id: u16,
        dup: bool,
        properties: &[(String, String)],
    ) {
        self.meters.publishes[usize::from(packet_id != 0)].add(1);
        let mut guard = conn.state.borrow_mut();
        let state = &mut *guard;
        let Some(client) = state.client.as_mut() else { return };
        if dup && !client.resent.is_empty() {
            self.note_resent(&mut client.resent, packet_id);
        }
        let login = client.login.as_deref();
        let publish = Publish {
            topic,
            payload,
            client_id: &client.id,
            user: login.map(|l| l.user.as_str()),
            login_site: login.and_then(Login::single_site),
            properties,
            received_at: wall_clock(),
        };
        let mut transformer = self.transformer.borrow_mut();
        let scope = client.scope();
        let mark = self.shared.poison.mark(publish.client_id, topic, payload);
        let mut verdict = transformer.admit(&publish, &scope, None);
        if verdict == Verdict::Accepted && self.shared.poison.take(mark) {
            verdict = transformer.refuse(&publish, &scope, "Kafka refused the record after it had been sent");
        }
        let mut code = 0;
        match verdict {
            Verdict::Accepted => {}
            Verdict::DeadLettered(reason) => {
                self.meters.dead_letter(transformer.records().get(0).topic, reason);
                let client = publish.client_id;
                self.meters.log(|more| {
                    tracing::warn!(client, topic, reason, more, "an MQTT message became a dead letter");
                });
            }
            Verdict::Forbidden(reason) => {
                self.meters.refused(reason);
                let client = publish.client_id;
                self.meters.log(|more| {
                    tracing::warn!(client, topic, reason, more, "a client may not publish this");
                });
                if state.level != 5 {
                    drop(guard);
                    return self.close(conn, "not_permitted", 0);
                }
                code = NOT_AUTHORIZED;
            }
        }
        let announced = client.announced;
        let sequence = state.ring.next_sequence();
        let token = Token {
            worker: self.index as u8,
            slot: conn.owner.slot,
            generation: conn.owner.generation,
            sequence,
        };
        let mut handed = self.shared.outflow.hand_over(transformer.records(), 0, token.pack());
        let mut count = transformer.records().len() as u32 - handed.dropped;
        self.meters.dropped_locators(handed.dropped);
        if verdict == Verdict::Accepted
            && handed.sent == 0
            && let Some(NotTaken::Record(why)) = &handed.stop
        {
            // The record is larger than Kafka takes: the payload itself may still fit.
            transformer.refuse(&publish, &scope, why);
            self.meters.dead_letter(transformer.records().get(0).topic, "record_refused");
            count = 1;
            handed = self.shared.outflow.hand_over(transformer.records(), 0, token.pack());
        }
        // Also where the connection is closed next: its slot waits for the fate of each.
        state.outstanding += handed.sent;
        if let Some(NotTaken::Record(why)) = handed.stop {
            if handed.sent > 0 {
                // Part of a list is written; when it comes again, the whole becomes a dead letter.
                self.shared.poison.remember(mark);
            }
            drop((guard, transformer));
            return self.broken(conn, &why);
        }
        if count > 0 || packet_id != 0 {
            state.ring.push(Done { packet_id, code, mark }, count, payload.len(), self.now.get());
        }
        if let Some(stop) = handed.stop {
            let records = transformer.take_records();
            state.held = Some(Held { records, next: handed.next, sequence });
            let waiting = if stop == NotTaken::Full { &self.held } else { &self.blocked };
            waiting.borrow_mut().push_back(Rc::clone(conn));
        }
        drop(guard);
        if verdict == Verdict::Accepted && !announced {
            let device = transformer.device().map(|(site, device)| (site.to_owned(), device.to_owned()));
            drop(transformer);
            let device = device.as_ref().map(|(site, device)| (site.as_str(), device.as_str()));
            self.announce(conn, device);
        } else {
            drop(transformer);
        }
        if count == 0 {
            // Nothing is awaited from Kafka, so nothing else would send the PUBACK.
            self.acknowledge(conn);
        }
    }

    /// Sends records of a publish that were not taken before. Returns why some of them still wait.
    pub(crate) fn send_records(self: &Rc<Self>, conn: &Rc<Conn>, held: Held) -> Option<NotTaken> {
        let Held { records, next, sequence } = held;
        let token = Token {
            worker: self.index as u8,
            slot: conn.owner.slot,
            generation: conn.owner.generation,
            sequence,
        };
        let handed = self.shared.outflow.hand_over(&records, next, token.pack());
        self.meters.dropped_locators(handed.dropped);
        let mut state = conn.state.borrow_mut();
        state.outstanding += handed.sent;
        (0..handed.dropped).for_each(|_| state.ring.settle(sequence, true));
        match handed.stop {
            Some(NotTaken::Record(why)) => {
                if let Some(mark) = state.ring.mark(sequence) {
                    self.shared.poison.remember(mark);
                }
                drop(state);
                self.broken(conn, &why);
                None
            }
            Some(stop) => {
                state.held = Some(Held { records, next: handed.next, sequence });
                Some(stop)
            }
            None if handed.dropped > 0 => {
                drop(state);
                // The records before it may have been acknowledged already.
                self.acknowledge(conn);
                None
            }
            None => None,
        }
    }

    fn broken(self: &Rc<Self>, conn: &Rc<Conn>, why: &str) {
        self.meters.refused("record_too_large");
        let peer = conn.peer;
        self.meters.log(|more| {
            tracing::error!(%peer, why, more, "Kafka takes neither a record nor, now, its dead letter");
        });
        self.close(conn, "packet_too_large", 0x95);
    }

    fn note_resent(&self, resent: &mut Vec<u16>, packet_id: u16) {
        if let Some(at) = resent.iter().position(|id| *id == packet_id) {
            resent.swap_remove(at);
            self.meters.resent.add(1);
        }
    }
}
