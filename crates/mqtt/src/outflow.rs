//! The way out: hands the records of a publish to the producer, and says in log and health which topics
//! take none.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use throughline_model::record::{Outbox, Outgoing};
use throughline_model::topics::SERVICE_PLATFORM_LOCATOR_V1;
use throughline_runtime::ports::{Ingress, NotTaken};
use throughline_telemetry::RoleHealth;

/// The dependency's name in health.
const KAFKA: &str = "kafka";
/// After so long without an acknowledgement, while records wait for one, Kafka counts as away.
const SILENT_AFTER: Duration = Duration::from_secs(5);

/// What the listener and the client of an external broker send through.
pub(crate) struct Outflow {
    producer: Arc<dyn Ingress>,
    health: RoleHealth,
    /// Whether `refused` holds anything, so that a record that is taken costs no lock.
    any_refused: AtomicBool,
    /// Why a topic takes nothing, by topic.
    refused: Mutex<BTreeMap<String, String>>,
    /// Whether it was said that Kafka acknowledges nothing.
    silent: AtomicBool,
}

/// How far the records of a publish got.
#[derive(Debug, Default)]
pub(crate) struct Handed {
    /// The first record that was not taken.
    pub(crate) next: usize,
    /// Records taken, whose fate will be reported.
    pub(crate) sent: u32,
    /// Locators that cannot be sent. They say where a message went and are not worth the message.
    pub(crate) dropped: u32,
    /// Why `next` was not taken; `None` where nothing is left.
    pub(crate) stop: Option<NotTaken>,
}

impl Outflow {
    pub(crate) fn new(producer: Arc<dyn Ingress>, health: RoleHealth) -> Arc<Self> {
        let (any_refused, silent) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { producer, health, any_refused, refused: Mutex::default(), silent })
    }

    /// Hands over one record.
    pub(crate) fn offer(&self, record: Outgoing<'_>, token: u64) -> Result<(), NotTaken> {
        let topic = record.topic;
        let offered = self.producer.send(record, token);
        match &offered {
            Ok(()) if self.any_refused.load(Ordering::Relaxed) => self.taken(topic),
            Err(NotTaken::Topic(why)) => self.refused(topic, why),
            _ => {}
        }
        offered
    }

    /// Hands over the records from `next` on, until one is not taken.
    pub(crate) fn hand_over(&self, records: &Outbox, next: usize, token: u64) -> Handed {
        let mut handed = Handed { next, ..Handed::default() };
        while handed.next < records.len() {
            let record = records.get(handed.next);
            let is_locator = record.topic == SERVICE_PLATFORM_LOCATOR_V1;
            match self.offer(record, token) {
                Ok(()) => handed.sent += 1,
                Err(NotTaken::Record(_)) if is_locator => handed.dropped += 1,
                Err(not_taken) => {
                    handed.stop = Some(not_taken);
                    break;
                }
            }
            handed.next += 1;
        }
        handed
    }

    /// Returns how many records are not yet acknowledged.
    pub(crate) fn in_flight(&self) -> usize {
        self.producer.in_flight()
    }

    /// Says in health and log whether Kafka acknowledges; to be called every second or so.
    pub(crate) fn report(&self) {
        let silence = self.producer.silent_for();
        let silent = silence >= SILENT_AFTER;
        if self.silent.swap(silent, Ordering::Relaxed) != silent {
            match silent {
                true => tracing::warn!(
                    records = self.in_flight(),
                    "Kafka acknowledges nothing for {} s: publishes wait",
                    silence.as_secs()
                ),
                false => tracing::info!("Kafka acknowledges again, or nothing waits for it"),
            }
        }
        self.say(&self.refused.lock());
    }

    fn refused(&self, topic: &str, why: &str) {
        let mut refused = self.refused.lock();
        match refused.get_mut(topic) {
            Some(known) if known == why => return,
            Some(known) => why.clone_into(known),
            None => {
                tracing::error!(topic, why, "Kafka takes no records of a topic: its publishes wait");
                refused.insert(topic.to_owned(), why.to_owned());
            }
        }
        self.any_refused.store(true, Ordering::Relaxed);
        self.say(&refused);
    }

    fn taken(&self, topic: &str) {
        let mut refused = self.refused.lock();
        if refused.remove(topic).is_some() {
            tracing::info!(topic, "Kafka takes the topic's records again");
            self.any_refused.store(!refused.is_empty(), Ordering::Relaxed);
            self.say(&refused);
        }
    }

    fn say(&self, refused: &BTreeMap<String, String>) {
        let mut sentences: Vec<String> =
            refused.iter().map(|(topic, why)| format!("topic `{topic}`: {why}")).collect();
        if self.silent.load(Ordering::Relaxed) {
            let (silence, records) = (self.producer.silent_for().as_secs(), self.in_flight());
            sentences.push(format!("no acknowledgement for {silence} s, {records} records wait"));
        }
        self.health.dependency(KAFKA, sentences.is_empty(), &sentences.join("; "));
    }
}
