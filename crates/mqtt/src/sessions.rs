//! Sessions of all workers by client id, and the records that say what became of them.

use hashbrown::HashMap;
use parking_lot::Mutex;
use std::time::{Duration, Instant};
use throughline_model::codec::{Codec, CodecError};
use throughline_model::envelope::{IDENTITY_NONE, Session};
use throughline_model::ids::{TraceId, timed_message_id};
use throughline_model::record::Outbox;
use throughline_model::time::Timestamp;
use throughline_model::topics::DEVICE_SESSION_V1;

/// Subscriptions of a session: a device has two topics to subscribe to, and a gateway speaks for some devices.
/// Session and filters stay in memory for as long as a session may live.
pub const SUBSCRIPTIONS_MAX: usize = 64;

/// Which connection holds a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its worker.
    pub worker: usize,
    /// Its slot on the worker.
    pub slot: u32,
    /// The generation of the slot.
    pub generation: u16,
}

#[derive(Debug)]
struct Entry {
    owner: Option<Owner>,
    generation: i64,
    expiry: Duration,
    expires: Option<Instant>,
    subscriptions: Vec<String>,
    unacknowledged: Vec<u16>,
}

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Clean Session, Clean Start.
    pub clean: bool,
    /// How long the session outlives the connection; 0: not at all.
    pub expiry: Duration,
}

/// What a client gets.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Session Present.
    pub present: bool,
    /// Generation of the session: rises with each connection of the client id.
    pub generation: i64,
    /// The connection that held the client id until now and must be closed.
    pub taken_over: Option<Owner>,
    /// Packet ids that the client sent and that were not acknowledged: it will send them again.
    pub unacknowledged: Vec<u16>,
}

/// All sessions of this instance. It is locked when a client connects, subscribes and leaves, never for a
/// message.
#[derive(Debug)]
pub struct Registry {
    sessions: Mutex<HashMap<Box<str>, Entry, foldhash::fast::RandomState>>,
    sessions_max: usize,
}

impl Registry {
    /// Makes a registry that remembers at most `sessions_max` sessions without a connection.
    pub fn new(sessions_max: usize) -> Self {
        Self { sessions: Mutex::default(), sessions_max }
    }

    /// Opens the session of a client that connects.
    pub fn open(&self, client_id: &str, asked: Asked, owner: Owner, now: Instant, wall: Timestamp) -> Opened {
        let mut sessions = self.sessions.lock();
        let before = sessions.remove(client_id);
        let generation = before.as_ref().map_or(wall.0, |entry| wall.0.max(entry.generation + 1));
        let taken_over = before.as_ref().and_then(|entry| entry.owner);
        let alive = |entry: &Entry| entry.owner.is_some() || entry.expires.is_some_and(|at| at > now);
        let kept = before.filter(|entry| !asked.clean && !entry.expiry.is_zero() && alive(entry));
        let present = kept.is_some();
        let (subscriptions, unacknowledged) =
            kept.map(|entry| (entry.subscriptions, entry.unacknowledged)).unwrap_or_default();
        if sessions.len() >= self.sessions_max {
            forget_one(&mut sessions, now);
        }
        let entry = Entry {
            owner: Some(owner),
            generation,
            expiry: asked.expiry,
            expires: None,
            subscriptions,
            unacknowledged: Vec::new(),
        };
        sessions.insert(client_id.into(), entry);
        Opened { present, generation, taken_over, unacknowledged }
    }

    /// Ends a connection's hold of its session. Returns false where a newer connection holds it already, or
    /// did and is gone.
    pub fn close(
        &self,
        client_id: &str,
        owner: Owner,
        expiry: Duration,
        unacknowledged: Vec<u16>,
        now: Instant,
    ) -> bool {
        let mut sessions = self.sessions.lock();
        let Some(entry) = sessions.get_mut(client_id) else { return false };
        if entry.owner != Some(owner) {
            return false;
        }
        if expiry.is_zero() {
            // The generation must go on rising, and the wall clock does that for a client that comes back
            // later than it left.
            sessions.remove(client_id);
            return true;
        }
        entry.owner = None;
        entry.expiry = expiry;
        entry.expires = Some(now + expiry);
        entry.unacknowledged = unacknowledged;
        true
    }

    /// Adds a subscription. Returns false where the session has [`SUBSCRIPTIONS_MAX`] others.
    pub fn subscribe(&self, client_id: &str, filter: &str) -> bool {
        let mut sessions = self.sessions.lock();
        let Some(entry) = sessions.get_mut(client_id) else { return true };
        let known = entry.subscriptions.iter().any(|f| f == filter);
        if !known && entry.subscriptions.len() >= SUBSCRIPTIONS_MAX {
            return false;
        }
        if !known {
            entry.subscriptions.push(filter.to_owned());
        }
        true
    }

    /// Removes a subscription; says whether it existed.
    pub fn unsubscribe(&self, client_id: &str, filter: &str) -> bool {
        let mut sessions = self.sessions.lock();
        let Some(entry) = sessions.get_mut(client_id) else { return false };
        let before = entry.subscriptions.len();
        entry.subscriptions.retain(|f| f != filter);
        entry.subscriptions.len() < before
    }

    /// Returns the subscriptions of a client.
    pub fn subscriptions(&self, client_id: &str) -> Vec<String> {
        let sessions = self.sessions.lock();
        sessions.get(client_id).map(|entry| entry.subscriptions.clone()).unwrap_or_default()
    }

    /// Returns the number of sessions.
    pub fn count(&self) -> usize {
        self.sessions.lock().len()
    }
}

/// Forgets what has expired, else the session without a connection that expires first.
fn forget_one(sessions: &mut HashMap<Box<str>, Entry, foldhash::fast::RandomState>, now: Instant) {
    let before = sessions.len();
    sessions.retain(|_, entry| entry.owner.is_some() || entry.expires.is_some_and(|at| at > now));
    if sessions.len() < before {
        return;
    }
    let idle = sessions.iter().filter(|(_, entry)| entry.owner.is_none());
    let first = idle.min_by_key(|(_, entry)| entry.expires).map(|(id, _)| id.clone());
    if let Some(id) = first {
        sessions.remove(&id);
    }
}

/// One event of a session.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are those of the record")]
pub struct Happened<'a> {
    pub site: &'a str,
    pub device: &'a str,
    pub event: &'static str,
    pub cause: Option<&'a str>,
    pub client_id: &'a str,
    pub protocol: &'static str,
    pub generation: i64,
    pub boundary: &'static str,
    pub at: Timestamp,
}

/// Appends the record of an event. Its id follows from client id, generation and event, so that a record
/// that was sent again is recognised.
///
/// # Errors
/// When the value does not fit its schema, which is a defect.
pub fn push_event(
    out: &mut Outbox,
    codec: &Codec,
    instance: &str,
    random: u64,
    happened: &Happened<'_>,
) -> Result<(), CodecError> {
    let key = format!("{}/{}", happened.site, happened.device);
    let output = format!("{}:{}:{}", happened.client_id, happened.generation, happened.event);
    let id = timed_message_id(happened.at, "bridge_session", &output, &key);
    let trace = TraceId::mint(happened.at, key.as_bytes(), random);
    let session = Session {
        message_id: id.to_string(),
        trace_id: trace.to_hex(),
        identity: IDENTITY_NONE.to_owned(),
        site_id: happened.site.to_owned(),
        device_id: happened.device.to_owned(),
        received_by: instance.to_owned(),
        stream: "session".to_owned(),
        occurred_at: happened.at,
        received_at: happened.at,
        event: happened.event.to_owned(),
        client_id: happened.client_id.to_owned(),
        cause: happened.cause.map(str::to_owned),
        protocol: happened.protocol.to_owned(),
        session_generation: happened.generation,
        boundary: happened.boundary.to_owned(),
        ..Session::default()
    };
    let topic = DEVICE_SESSION_V1.into();
    let traceparent = trace.traceparent(id);
    let headers = [("traceparent", traceparent.as_bytes())];
    out.push_with(&topic, None, Some(key.as_bytes()), headers, |value| {
        codec.encode(DEVICE_SESSION_V1, &session, value).map(|()| true)
    })
}

/// Reads site and device from a client id of the form `site/device` or `site:device`.
pub fn device_of_client(client_id: &str) -> Option<(&str, &str)> {
    let (site, device) = client_id.split_once('/').or_else(|| client_id.split_once(':'))?;
    let valid = |what, name| throughline_model::ids::check_name(what, name).is_ok();
    (valid("site", site) && valid("device", device)).then_some((site, device))
}

/// Makes a client id fit as a device's name, for sessions of which no device is known.
pub fn device_from_client_id(client_id: &str) -> String {
    let fits = |c: char| !(c.is_whitespace() || c.is_control() || matches!(c, '/' | '+' | '#'));
    let mut name = String::new();
    for c in client_id.chars().map(|c| if fits(c) { c } else { '_' }) {
        if name.len() + c.len_utf8() > throughline_model::ids::NAME_BYTES_MAX {
            break;
        }
        name.push(c);
    }
    if name.is_empty() { "_".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Asked = Asked { clean: false, expiry: Duration::from_secs(60) };
    const CLEAN: Asked = Asked { clean: true, expiry: Duration::ZERO };

    fn owner(slot: u32) -> Owner {
        Owner { worker: 0, slot, generation: 1 }
    }

    #[test]
    fn a_persistent_session_survives_with_subscriptions_and_ids_until_it_expires() {
        let registry = Registry::new(10);
        let start = Instant::now();
        let open = |slot, asked, at| registry.open("c", asked, owner(slot), at, Timestamp(5));
        assert!(!open(1, KEEP, start).present);
        registry.subscribe("c", "tl/s/d/command");
        assert!(registry.close("c", owner(1), KEEP.expiry, vec![3, 4], start));
        let again = open(2, KEEP, start + Duration::from_secs(59));
        assert_eq!((again.present, again.unacknowledged), (true, vec![3, 4]));
        assert_eq!(registry.subscriptions("c"), ["tl/s/d/command"]);
        registry.close("c", owner(2), KEEP.expiry, Vec::new(), start);
        assert!(!open(3, KEEP, start + Duration::from_secs(61)).present, "expired");
        registry.close("c", owner(3), KEEP.expiry, Vec::new(), start);
        assert!(!open(4, CLEAN, start).present, "clean start");
        assert!(registry.subscriptions("c").is_empty());
    }

    #[test]
    fn a_newer_connection_takes_over_and_its_generation_is_higher() {
        let registry = Registry::new(10);
        let now = Instant::now();
        let first = registry.open("c", CLEAN, owner(1), now, Timestamp(100));
        let second = registry.open("c", CLEAN, owner(2), now, Timestamp(90));
        assert_eq!(second.taken_over, Some(owner(1)));
        assert!(second.generation > first.generation);
        assert!(!registry.close("c", owner(1), Duration::ZERO, Vec::new(), now));
        assert!(registry.close("c", owner(2), Duration::ZERO, Vec::new(), now));
        assert!(
            !registry.close("c", owner(1), Duration::ZERO, Vec::new(), now),
            "the newer one came and went"
        );
        assert_eq!(registry.count(), 0);
    }

    #[test]
    fn idle_sessions_are_bounded() {
        let registry = Registry::new(3);
        let now = Instant::now();
        for n in 0..10 {
            let id = format!("c{n}");
            registry.open(&id, KEEP, owner(n), now, Timestamp(1));
            registry.close(&id, owner(n), Duration::from_secs(60 + u64::from(n)), Vec::new(), now);
        }
        assert_eq!(registry.count(), 3);
        // Those that would have expired last are left.
        let present = |n: u32| registry.open(&format!("c{n}"), KEEP, owner(99), now, Timestamp(1)).present;
        assert_eq!([9, 8, 7, 6, 0].map(present), [true, true, true, false, false]);
    }

    #[test]
    fn client_ids_name_devices_where_they_can() {
        assert_eq!(device_of_client("site-1/pump-7"), Some(("site-1", "pump-7")));
        assert_eq!(device_of_client("site-1:pump-7"), Some(("site-1", "pump-7")));
        for id in ["pump-7", "a/b/c", "/x", "a:"] {
            assert_eq!(device_of_client(id), None, "{id}");
        }
        assert_eq!(device_from_client_id("a b/c"), "a_b_c");
        assert_eq!(device_from_client_id(&"x".repeat(300)).len(), 128);
    }
}
