//! Configuration of the bridge.

use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// What a bridge does: listens, subscribes to another broker, or both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BridgeConfig {
    /// The instance's name: `received_by` of what it admits. Two live instances never share one.
    pub instance: String,
    /// The own listener.
    pub listener: Option<ListenerConfig>,
    /// An existing broker to read from.
    pub external: Option<ExternalConfig>,
}

impl BridgeConfig {
    /// Returns how many inboxes the bridge needs, see `Inboxes::new`.
    pub fn inboxes(&self) -> usize {
        self.listener.as_ref().map_or(0, |l| l.workers.max(1)) + usize::from(self.external.is_some())
    }
}

/// The own listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListenerConfig {
    /// Address and port; port 0 takes a free one.
    pub address: SocketAddr,
    /// Threads that serve connections, 1 to 64. One keeps up with 300,000 messages a second; more cost
    /// more CPU a message.
    pub workers: usize,
    /// Whether clients on this machine need no login. Others always need one.
    pub anonymous_on_loopback: bool,
    /// Who may connect.
    pub logins: Vec<LoginConfig>,
    /// What is held at most.
    pub bounds: Bounds,
}

impl Default for ListenerConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 1883)),
            workers: 1,
            anonymous_on_loopback: true,
            logins: Vec::new(),
            bounds: Bounds::default(),
        }
    }
}

/// What the listener holds at most. docs/bridge.md says what a sender sees at each bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {
    /// Connections of all workers; more are closed as they come.
    pub connections_max: usize,
    /// Publishes of a connection that wait for Kafka, 1 to 65,535; also MQTT 5's Receive Maximum. Reading
    /// pauses there.
    pub open_publishes_max: u16,
    /// Payload bytes of a connection that wait for Kafka. Reading pauses there.
    pub open_bytes_max: usize,
    /// Bytes that wait to be sent to a client that does not read. Reading from it pauses there.
    pub out_bytes_max: usize,
    /// Bytes of all connections that were read and cannot be processed yet, and records that the full producer
    /// did not take. Beyond it no connection is read, and one of which part of a packet was read is closed.
    pub held_bytes_max: usize,
    /// Topics and payloads of the wills of all connections; a client whose will passes it is refused.
    pub wills_bytes_max: usize,
    /// The largest packet; larger ones close the connection. Kafka's `max.message.bytes` must be above it.
    pub packet_bytes_max: usize,
    /// How long a connection may take to be accepted after it was opened.
    pub connect_deadline_ms: u64,
    /// Persistent sessions remembered, connected or not; the one that expires first is forgotten.
    pub sessions_max: usize,
    /// How long a persistent session outlives its connection at most.
    pub session_expiry_max_s: u32,
    /// Session events and wills of a worker that wait for Kafka; more are dropped and counted. So many wills
    /// of all workers may wait for their delay; more are published at once.
    pub asides_max: usize,
    /// Their bytes; the same holds beyond it.
    pub asides_bytes_max: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections_max: 100_000,
            open_publishes_max: 1_000,
            open_bytes_max: 4 << 20,
            out_bytes_max: 256 << 10,
            held_bytes_max: 256 << 20,
            wills_bytes_max: 64 << 20,
            packet_bytes_max: 256 << 10,
            connect_deadline_ms: 10_000,
            sessions_max: 100_000,
            session_expiry_max_s: 86_400,
            asides_max: 10_000,
            asides_bytes_max: 16 << 20,
        }
    }
}

/// A user and what its clients may publish.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoginConfig {
    /// The user name.
    pub user: String,
    /// The password's hash as `mosquitto_passwd` writes it: `$7$<iterations>$<salt>$<hash>`.
    pub password_hash: Option<String>,
    /// A file whose first line is the password, for secrets that are mounted.
    pub password_file: Option<PathBuf>,
    /// The sites it speaks for; `["*"]` is every site.
    pub sites: Vec<String>,
    /// The devices it speaks for, as `site/device`; empty: every device of its sites.
    pub devices: Vec<String>,
}

/// An existing broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExternalConfig {
    /// `mqtt://host:port`; the broker must speak MQTT 5.
    pub url: String,
    /// The user.
    pub user: Option<String>,
    /// A file whose first line is the password.
    pub password_file: Option<PathBuf>,
    /// The group of the shared subscriptions: instances of one group share the messages.
    pub group: String,
    /// Messages that wait for Kafka, 1 to 65,535: Receive Maximum, so the broker holds the rest.
    pub open_publishes_max: u16,
    /// The largest packet accepted from the broker.
    pub packet_bytes_max: u32,
    /// Keep-alive in seconds, at least 5.
    pub keep_alive_s: u16,
    /// How long the broker keeps the session while the bridge is away.
    pub session_expiry_s: u32,
}

impl Default for ExternalConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            user: None,
            password_file: None,
            group: "throughline".to_owned(),
            open_publishes_max: 1_000,
            packet_bytes_max: 256 << 10,
            keep_alive_s: 30,
            session_expiry_s: 86_400,
        }
    }
}

/// A configuration that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// A value is wrong.
    #[error("`{key}` {why}")]
    Config {
        /// The key.
        key: String,
        /// Why, and what is right.
        why: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen for MQTT on {address}: {error}; `listener.address` chooses another")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// A thread or its runtime cannot be started.
    #[error("cannot start a bridge worker: {0}")]
    Worker(std::io::Error),
    /// A topic has no schema: nothing could be written.
    #[error("topic `{0}` has no schema bound: `throughline topics apply` registers it")]
    Unbound(String),
}

/// Reads the first line of a secret's file.
///
/// # Errors
/// Names the key and the file.
pub(crate) fn read_secret(key: &str, path: &std::path::Path) -> Result<String, BridgeError> {
    let refuse = |why: String| BridgeError::Config { key: key.to_owned(), why };
    let text = std::fs::read_to_string(path)
        .map_err(|e| refuse(format!("names {}, which cannot be read: {e}", path.display())))?;
    match text.lines().next().filter(|line| !line.is_empty()) {
        Some(line) => Ok(line.to_owned()),
        None => Err(refuse(format!("names {}, which is empty", path.display()))),
    }
}
