//! A plain MQTT 3.1.1 client for simulated devices: QoS 1, reconnects by itself, resends what was not
//! acknowledged.

use rumqttc::{Client, Event, MqttOptions, Packet, QoS};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Publishes that may wait for their acknowledgement; more block the caller.
const OPEN_MAX: u16 = 100;
/// The pause before a new attempt to connect.
const RECONNECT_AFTER: Duration = Duration::from_millis(500);

/// A client that only publishes. It works on a thread of its own.
pub struct Publisher {
    client: Client,
    acknowledged: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A publisher that has ended takes nothing any more.
#[derive(Debug, thiserror::Error)]
#[error("the MQTT client `{0}` has ended")]
pub struct Ended(String);

impl Publisher {
    /// Begins to connect as `client_id` with a persistent session. Does not wait for the server.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn connect(address: SocketAddr, client_id: &str) -> std::io::Result<Self> {
        let mut options = MqttOptions::new(client_id, address.ip().to_string(), address.port());
        options.set_clean_session(false).set_keep_alive(Duration::from_secs(30)).set_inflight(OPEN_MAX);
        let (client, mut connection) = Client::new(options, usize::from(OPEN_MAX));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let ends = Arc::new(AtomicBool::new(false));
        let (count, stop) = (Arc::clone(&acknowledged), Arc::clone(&ends));
        let thread = std::thread::Builder::new().name(format!("device {client_id}")).spawn(move || {
            for event in connection.iter() {
                match event {
                    Ok(Event::Incoming(Packet::PubAck(_))) => {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(_) => {}
                    Err(_) if stop.load(Ordering::Acquire) => return,
                    Err(error) => {
                        tracing::debug!("a simulated device connects again: {error}");
                        std::thread::sleep(RECONNECT_AFTER);
                    }
                }
            }
        })?;
        Ok(Self { client, acknowledged, ends, thread: Some(thread) })
    }

    /// Hands a message over; blocks while too many wait for their acknowledgement.
    ///
    /// # Errors
    /// [`Ended`] after the client has ended.
    pub fn publish(&self, topic: &str, payload: Vec<u8>) -> Result<(), Ended> {
        self.client.publish(topic, QoS::AtLeastOnce, false, payload).map_err(|_| Ended(topic.to_owned()))
    }

    /// Hands a message over unless too many wait; says whether it did.
    pub fn try_publish(&self, topic: &str, payload: Vec<u8>) -> bool {
        self.client.try_publish(topic, QoS::AtLeastOnce, false, payload).is_ok()
    }

    /// Returns how many messages were acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }
}

impl Drop for Publisher {
    /// Disconnects. A server that does not answer is left to the client's own time-outs.
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Release);
        if self.client.try_disconnect().is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the thread of a simulated device panicked");
        }
    }
}
