//! The readings that stages are measured with: made by the bridge's own transform, so that the records are
//! those which the bridge would have written.

use super::limit;
use super::place::{PLAIN_TOPIC, Place};
use crate::failure::CliError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use throughline_kafka::{IngressConfig, IngressProducer};
use throughline_model::envelope::DeviceMessage;
use throughline_model::record::{Outbox, Outgoing, TopicPartition};
use throughline_model::time::Timestamp;
use throughline_model::topics::DATA_CORE_READING_V1;
use throughline_mqtt::Router;
use throughline_mqtt::feeds::Publish;
use throughline_mqtt::transform::{Scope, Transformer, Verdict};
use throughline_runtime::ports::{Fate, Ingress, NotTaken};
use throughline_runtime::{Clock, WallClock};

/// Devices that take turns.
const DEVICES: u64 = 1_000;
/// Of so many readings one is hot enough to raise alerts, which the device's next one clears.
const HOT_EACH: u64 = 9_973;
/// How long new partitions may be without a leader.
const ELECTION: Duration = Duration::from_secs(10);
/// Different records that the plain producer writes again and again.
pub const SAMPLES: u64 = 10_000;

/// Makes readings, the next one at each call.
pub struct Readings {
    transformer: Transformer,
    now: Timestamp,
    made: u64,
}

impl Readings {
    /// Begins with the first reading of the first device.
    ///
    /// # Errors
    /// When the catalog's feeds do not compile.
    pub fn new(place: &Place) -> Result<Self, CliError> {
        let context = &place.context;
        let router = Router::compile(&context.catalog).map_err(|e| CliError::usage(e.to_string()))?;
        let transformer = Transformer::new(Arc::new(router), Arc::clone(&context.codec), "bench");
        Ok(Self { transformer, now: WallClock.now(), made: 0 })
    }

    /// Makes the next reading and returns its record.
    ///
    /// # Errors
    /// When the catalog has no feed for it any more.
    pub fn next(&mut self) -> Result<Outgoing<'_>, CliError> {
        let (device, seq) = (self.made % DEVICES, self.made / DEVICES);
        let hot = self.made % HOT_EACH == HOT_EACH - 1;
        let temperature = if hot { 95.5 } else { 20.0 + (self.made % 331) as f64 * 0.1 };
        let pressure = 2.0 + (self.made % 127) as f64 * 0.01;
        let ts = self.now.as_millis();
        self.made += 1;
        let topic = format!("tl/bench/device-{device}/telemetry");
        let payload = format!(
            r#"{{"epoch":1,"seq":{seq},"ts":{ts},"values":{{"temperature":{temperature:.1},"pressure":{pressure:.2},"running":true}}}}"#
        );
        let publish = Publish {
            topic: &topic,
            payload: payload.as_bytes(),
            client_id: "bench",
            user: None,
            login_site: None,
            properties: &[],
            received_at: self.now,
        };
        match self.transformer.admit(&publish, &Scope::default(), None) {
            Verdict::Accepted => Ok(self.transformer.records().get(0)),
            other => Err(CliError::failed(format!(
                "the reading `{payload}` on `{topic}` was not taken: {other:?}"
            ))),
        }
    }

    /// Makes the next reading as a value.
    ///
    /// # Errors
    /// As [`Readings::next`].
    pub fn next_message(&mut self, place: &Place) -> Result<DeviceMessage, CliError> {
        let record = self.next()?;
        place.context.codec.decode(record.value).map_err(|e| CliError::failed(e.to_string()))
    }
}

/// Returns how many records a topic holds, which nothing was deleted from. Partitions that were made just
/// now may have no leader for a moment.
///
/// # Errors
/// Exit code 4 when Kafka does not say within some seconds.
pub fn end(place: &Place, topic: &str) -> Result<i64, CliError> {
    let count = place.admin.topics()?.get(topic).copied().unwrap_or_default();
    let partitions: Vec<TopicPartition> = (0..count).map(|p| TopicPartition::new(topic, p)).collect();
    let deadline = Instant::now() + ELECTION;
    loop {
        match place.admin.latest(&partitions) {
            Ok(ends) if ends.len() == partitions.len() => return Ok(ends.values().sum()),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            _ if Instant::now() > deadline => {
                return Err(CliError::unreachable(format!(
                    "Kafka does not know every partition of `{topic}`"
                )));
            }
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Returns records for the plain producer, of the keys, values and headers that the bridge writes.
///
/// # Errors
/// As [`Readings::next`].
pub fn samples(place: &Place) -> Result<Outbox, CliError> {
    let mut readings = Readings::new(place)?;
    let topic: Arc<str> = PLAIN_TOPIC.into();
    let mut samples = Outbox::default();
    for _ in 0..SAMPLES {
        let record = readings.next()?;
        samples.push(&topic, None, record.key, record.value, record.headers.iter());
    }
    Ok(samples)
}

/// Fills `topic`, that of the devices or that of checked readings, up to `messages` readings.
///
/// # Errors
/// When Kafka does not acknowledge all of them.
pub fn fill(place: &Place, topic: &str, messages: u64) -> Result<(), CliError> {
    let there = u64::try_from(end(place, topic)?).unwrap_or_default();
    if there >= messages {
        return Ok(());
    }
    let failed = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&failed);
    let ingress =
        IngressProducer::start(&place.context.kafka(), &IngressConfig::default(), move |_, fate| {
            count.fetch_add(u64::from(fate != Fate::Delivered), Ordering::Relaxed);
        })?;
    let deadline = Instant::now() + limit(messages);
    let topic: Arc<str> = topic.into();
    let mut readings = Readings::new(place)?;
    readings.made = there;
    let mut outbox = Outbox::default();
    for token in there..messages {
        outbox.clear();
        if &*topic == DATA_CORE_READING_V1 {
            let message = readings.next_message(place)?;
            let key = format!("{}/{}", message.site_id, message.device_id);
            outbox
                .push_with(&topic, None, Some(key.as_bytes()), [], |out| {
                    place.context.codec.encode(&topic, &message, out).map(|()| true)
                })
                .map_err(|e| CliError::failed(e.to_string()))?;
            send(&ingress, outbox.get(0), token, deadline)?;
        } else {
            send(&ingress, readings.next()?, token, deadline)?;
        }
        if token % 1_024 == 0 && place.signals.asked() {
            return Err(CliError::failed("interrupted"));
        }
    }
    let drained = ingress.drain(deadline.saturating_duration_since(Instant::now()));
    match failed.load(Ordering::Relaxed) {
        0 if drained => Ok(()),
        failed => Err(CliError::unreachable(format!(
            "Kafka did not take all of {messages} readings: {failed} refused, {} open",
            ingress.in_flight()
        ))),
    }
}

fn send(
    ingress: &IngressProducer,
    record: Outgoing<'_>,
    token: u64,
    deadline: Instant,
) -> Result<(), CliError> {
    loop {
        match ingress.send(record, token) {
            Ok(()) => return Ok(()),
            Err(NotTaken::Full) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Err(NotTaken::Full) => return Err(CliError::unreachable("Kafka takes no more readings")),
            Err(refused) => return Err(CliError::failed(refused.to_string())),
        }
    }
}
