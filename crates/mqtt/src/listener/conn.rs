//! One connection: its state, and nothing that decides.

use crate::auth::Login;
use crate::ring::Ring;
use crate::sessions::Owner;
use crate::transform::Scope;
use mqtt_protocol_core::mqtt::connection::GenericConnection;
use mqtt_protocol_core::mqtt::{Version, role};
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_model::record::Outbox;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Notify;

pub(crate) type Protocol = GenericConnection<role::Server, u16>;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// CONNECT has not come.
    New,
    /// CONNECT came, the password is being checked; what comes meanwhile is held.
    Authenticating,
    /// CONNACK went out.
    Open,
    /// Nothing is read any more.
    Closing,
}

/// A will.
#[derive(Clone, Debug)]
pub(crate) struct Will {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) delay: Duration,
}

/// Who is connected.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: String,
    pub(crate) login: Option<Arc<Login>>,
    pub(crate) session_generation: i64,
    pub(crate) session_expiry: Duration,
    pub(crate) keep_alive: Duration,
    pub(crate) will: Option<Will>,
    /// Site and device of its session events, once they are known.
    pub(crate) device: Option<(String, String)>,
    pub(crate) announced: bool,
    /// Packet ids that an earlier connection of the session left unacknowledged.
    pub(crate) resent: Vec<u16>,
}

impl Will {
    pub(crate) fn bytes(&self) -> usize {
        self.topic.len() + self.payload.len()
    }
}

impl Client {
    /// Returns what it may publish.
    pub(crate) fn scope(&self) -> Scope<'_> {
        self.login.as_deref().map(Login::scope).unwrap_or_default()
    }
}

/// Records that the full producer did not take.
pub(crate) struct Held {
    pub(crate) records: Outbox,
    pub(crate) next: usize,
    pub(crate) sequence: u32,
}

/// What changes about a connection.
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) level: u8,
    pub(crate) client: Option<Client>,
    pub(crate) ring: Ring,
    pub(crate) held: Option<Held>,
    pub(crate) unread: Vec<u8>,
    pub(crate) out: Vec<u8>,
    pub(crate) deadline: Option<Instant>,
    /// Records sent to Kafka whose fate is not known.
    pub(crate) outstanding: u32,
    pub(crate) failed: bool,
    pub(crate) cause: &'static str,
    /// Whether the client said good-bye, so that its will is void.
    pub(crate) will_void: bool,
}

/// A connection.
pub(crate) struct Conn {
    pub(crate) owner: Owner,
    pub(crate) peer: SocketAddr,
    pub(crate) write: RefCell<Option<OwnedWriteHalf>>,
    pub(crate) protocol: RefCell<Protocol>,
    pub(crate) state: RefCell<State>,
    /// Wakes its task: it may read again, or it is closing.
    pub(crate) wake: Notify,
    /// Whether complete packets may lie in `unread` because a bound stopped their processing.
    pub(crate) stalled: Cell<bool>,
    pub(crate) paused: Cell<bool>,
    pub(crate) touched: Cell<bool>,
    /// What it holds, as it was last added to the sum of all connections.
    pub(crate) held_bytes: Cell<usize>,
}

impl Conn {
    pub(crate) fn new(owner: Owner, peer: SocketAddr, write: OwnedWriteHalf, deadline: Instant) -> Self {
        let mut protocol = Protocol::new(Version::Undetermined);
        protocol.set_auto_ping_response(true);
        let state = State {
            phase: Phase::New,
            level: 0,
            client: None,
            ring: Ring::default(),
            held: None,
            unread: Vec::new(),
            out: Vec::new(),
            deadline: Some(deadline),
            outstanding: 0,
            failed: false,
            cause: "",
            will_void: false,
        };
        Self {
            owner,
            peer,
            write: RefCell::new(Some(write)),
            protocol: RefCell::new(protocol),
            state: RefCell::new(state),
            wake: Notify::new(),
            stalled: Cell::new(false),
            paused: Cell::new(false),
            touched: Cell::new(false),
            held_bytes: Cell::new(0),
        }
    }

    /// Returns the bytes that were read and are not processed, and those of records that wait for room.
    pub(crate) fn holds_bytes(&self) -> usize {
        let state = self.state.borrow();
        state.unread.len() + state.held.as_ref().map_or(0, |held| held.records.bytes_held())
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state.borrow().phase
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.phase() == Phase::Closing
    }

    /// Writes what waits; returns false where the peer is gone.
    pub(crate) fn flush(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let write = self.write.borrow();
        let Some(write) = write.as_ref() else { return false };
        let mut written = 0;
        while written < state.out.len() {
            match write.try_write(&state.out[written..]) {
                Ok(0) => return false,
                Ok(n) => written += n,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        state.out.drain(..written);
        true
    }
}
