//! Records from the bridge: handed over without blocking, each one's fate reported by its token.

use crate::bystander::every_partition_has_a_leader;
use crate::config::KafkaConfig;
use crate::context::{log_error, log_line};
use crate::failure::refused_config;
use crate::message::{produce, serve as serve_once, unproven};
use crate::sent::Sent;
use parking_lot::RwLock;
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer, ProducerContext, PurgeConfig};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use throughline_model::record::Outgoing;
use throughline_runtime::Sabotage;
use throughline_runtime::ports::{Failure, Fate, Ingress, NotTaken};
use tracing::{error, warn};

// A token travels through librdkafka in place of a pointer.
const _: () = assert!(size_of::<usize>() == size_of::<u64>(), "tokens need 64-bit pointers");

/// One turn of the thread that serves deliveries; they are served as they come within it.
const TURN: Duration = Duration::from_millis(100);
/// How often a topic that took nothing is asked for, and how long the answer may take. The thread that asks
/// serves deliveries, so it is not to wait long.
const ASK_AGAIN: Duration = Duration::from_secs(1);
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// A producer that has records in flight and reports none for so long, while the cluster answers others and
/// every partition has a leader all that time, has lost them for good (see `stall` and `bystander`).
const STALLED_AFTER: Duration = Duration::from_secs(20);
/// How often the cluster is asked about its leaders while records wait in vain.
const LOOK_EVERY: Duration = Duration::from_secs(5);
const STALLED: &str = "records wait in vain although every partition has a leader";
/// How long a producer that ends waits for the fate of its last records.
const LAST_REPORTS: Duration = Duration::from_secs(5);

/// How the bridge's producer behaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IngressConfig {
    /// How long a record waits for company, in milliseconds. Measured at 5,000 messages a second with
    /// 0 / 1 / 2 / 5 ms: p50 0.6 / 2.0 / 2.7 / 3.6 ms at 57 / 46 / 33 / 24 CPU-seconds per million.
    pub linger_ms: u32,
    /// How long a record may wait for Kafka, in milliseconds, before its connection is closed.
    pub produce_timeout_ms: u32,
    /// Records that may wait at once; beyond it the bridge stops reading. A million costs 39 % more CPU.
    pub queue_records_max: u32,
    /// Bytes that may wait at once, in KiB.
    pub queue_kib_max: u32,
}

impl Default for IngressConfig {
    fn default() -> Self {
        Self { linger_ms: 1, produce_timeout_ms: 300_000, queue_records_max: 100_000, queue_kib_max: 262_144 }
    }
}

/// Sorts a delivery report.
fn fate_of(result: &DeliveryResult<'_>) -> Fate {
    use RDKafkaErrorCode as Code;
    match unproven(result) {
        None => Fate::Delivered,
        // Not `InvalidDifferentRecord`: another record of the batch is the bad one.
        Some((
            Code::MessageSizeTooLarge
            | Code::MessageBatchTooLarge
            | Code::InvalidMessageSize
            | Code::InvalidRecord
            | Code::InvalidTimestamp
            | Code::PolicyViolation,
            _,
        )) => Fate::Refused,
        Some(_) => Fate::Failed,
    }
}

fn why_not_taken(error: &KafkaError) -> NotTaken {
    match error {
        KafkaError::MessageProduction(code) => match code {
            RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidArgument => {
                NotTaken::Record(code.to_string())
            }
            // `Fatal` is of a producer that `serve` replaces.
            RDKafkaErrorCode::QueueFull | RDKafkaErrorCode::Fatal => NotTaken::Full,
            // librdkafka passes on whatever the brokers say of the topic: unknown, not authorized, …
            code => NotTaken::Topic(code.to_string()),
        },
        // The name of the topic cannot be passed on.
        other => NotTaken::Topic(other.to_string()),
    }
}

type Callback = Arc<dyn Fn(u64, Fate) + Send + Sync>;

/// Topics that take nothing, until the cluster says otherwise.
///
/// librdkafka forgets every second that a topic is missing. It would then take a record while it asks, and
/// report it as failed a moment later, and each such report costs a connection.
#[derive(Default)]
struct ClosedTopics {
    any: AtomicBool,
    why: RwLock<BTreeMap<String, String>>,
}

impl ClosedTopics {
    fn why(&self, topic: &str) -> Option<String> {
        if self.any.load(Ordering::Relaxed) { self.why.read().get(topic).cloned() } else { None }
    }

    fn close(&self, topic: &str, why: &str) {
        self.why.write().insert(topic.to_owned(), why.to_owned());
        self.any.store(true, Ordering::Relaxed);
    }

    /// Opens those again that the cluster knows and lets us see.
    fn ask(&self, producer: &BaseProducer<Deliveries>) {
        let closed: Vec<String> = self.why.read().keys().cloned().collect();
        for topic in closed {
            let metadata = producer.client().fetch_metadata(Some(&topic), ANSWER_WITHIN);
            if metadata.is_ok_and(|m| m.topics().iter().all(|t| t.error().is_none())) {
                let mut why = self.why.write();
                why.remove(&topic);
                self.any.store(!why.is_empty(), Ordering::Relaxed);
            }
        }
    }
}

struct Deliveries {
    callback: Callback,
    sent: Sent,
    closed: Arc<ClosedTopics>,
    /// Set with each report, taken by the thread that looks for a stall.
    reported: AtomicBool,
    /// Set where Kafka took a record, or refused it for itself.
    answered: AtomicBool,
    /// Set where a record failed.
    failed: AtomicBool,
    /// Set where a record waited too long, though others may have been reported meanwhile.
    timed_out: AtomicBool,
}

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log_error(&error, reason);
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, token: usize) {
        use RDKafkaErrorCode as Code;
        self.reported.store(true, Ordering::Relaxed);
        let fate = fate_of(result);
        let heard = if fate == Fate::Failed { &self.failed } else { &self.answered };
        heard.store(true, Ordering::Relaxed);
        if result.as_ref().is_err_and(|(e, _)| e.rdkafka_error_code() == Some(Code::MessageTimedOut)) {
            self.timed_out.store(true, Ordering::Relaxed);
        }
        if let (Fate::Delivered, Ok(message)) = (fate, result) {
            self.sent.count(message.topic());
        }
        if let Err((error, message)) = result
            && let Some(
                code @ (Code::UnknownTopic
                | Code::UnknownTopicOrPartition
                | Code::InvalidTopic
                | Code::TopicAuthorizationFailed),
            ) = error.rdkafka_error_code()
        {
            self.closed.close(message.topic(), &code.to_string());
        }
        if Sabotage::AcknowledgeEarly.is_chosen() {
            return;
        }
        (self.callback)(token as u64, fate);
    }
}

struct Shared {
    config: KafkaConfig,
    tuning: IngressConfig,
    callback: Callback,
    closed: Arc<ClosedTopics>,
    /// Written only when a fatal error made a new producer necessary.
    producer: RwLock<Arc<BaseProducer<Deliveries>>>,
    stop: AtomicBool,
    /// For how many milliseconds nothing was reported while records were in flight.
    silent_ms: AtomicU64,
}

/// The bridge's producer: idempotent, acks=all, lz4, in order per key.
pub struct IngressProducer {
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

impl IngressProducer {
    /// Starts the producer and the thread that calls `delivered(token, fate)`, once for each record taken.
    /// The callback must be quick and must not call back into the producer.
    ///
    /// # Errors
    /// [`Failure::Stop`] when librdkafka refuses the configuration.
    pub fn start(
        config: &KafkaConfig,
        tuning: &IngressConfig,
        delivered: impl Fn(u64, Fate) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let callback: Callback = Arc::new(delivered);
        let closed = Arc::default();
        let producer = RwLock::new(Arc::new(make(config, tuning, &callback, &closed)?));
        let (config, tuning, stop) = (config.clone(), tuning.clone(), AtomicBool::new(false));
        let silent_ms = AtomicU64::new(0);
        let shared = Arc::new(Shared { config, tuning, callback, closed, producer, stop, silent_ms });
        let serving = Arc::clone(&shared);
        let server = std::thread::Builder::new()
            .name("kafka-ingress".to_owned())
            .spawn(move || serve(&serving))
            .map_err(|e| crate::failure::dependency(format!("no thread to serve deliveries on: {e}")))?;
        Ok(Self { shared, server: Some(server) })
    }

    /// Waits until every record was acknowledged or refused, at most `wait`. Returns whether that is so.
    pub fn drain(&self, wait: Duration) -> bool {
        let deadline = Instant::now() + wait;
        while self.in_flight() > 0 {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

impl Ingress for IngressProducer {
    fn send(&self, record: Outgoing<'_>, token: u64) -> Result<(), NotTaken> {
        let closed = &self.shared.closed;
        if let Some(why) = closed.why(record.topic) {
            return Err(NotTaken::Topic(why));
        }
        let producer = self.shared.producer.read();
        let taken = produce(&producer, record, token as usize);
        let full = matches!(taken, Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)));
        if (Sabotage::AcknowledgeEarly.is_chosen() && taken.is_ok())
            || (Sabotage::DropOnFull.is_chosen() && full)
        {
            (self.shared.callback)(token, Fate::Delivered);
            return Ok(());
        }
        taken.map_err(|error| {
            let not_taken = why_not_taken(&error);
            if let NotTaken::Topic(why) = &not_taken {
                closed.close(record.topic, why);
            }
            not_taken
        })
    }

    fn in_flight(&self) -> usize {
        usize::try_from(self.shared.producer.read().in_flight_count()).unwrap_or_default()
    }

    fn silent_for(&self) -> Duration {
        Duration::from_millis(self.shared.silent_ms.load(Ordering::Relaxed))
    }
}

impl Drop for IngressProducer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(server) = self.server.take()
            && server.join().is_err()
        {
            error!("the thread that serves deliveries panicked");
        }
        end(&self.shared.producer.read());
    }
}

fn make(
    config: &KafkaConfig,
    tuning: &IngressConfig,
    callback: &Callback,
    closed: &Arc<ClosedTopics>,
) -> Result<BaseProducer<Deliveries>, Failure> {
    let mut client = config.writer();
    client
        .set("linger.ms", tuning.linger_ms.to_string())
        .set("message.timeout.ms", tuning.produce_timeout_ms.to_string())
        .set("queue.buffering.max.messages", tuning.queue_records_max.to_string())
        .set("queue.buffering.max.kbytes", tuning.queue_kib_max.to_string())
        // One request at a time to a broker: what is sent behind a batch that the broker refuses for a moment
        // could be taken before it (see `unproven`), and a device's records would change places.
        .set("max.in.flight.requests.per.connection", "1");
    let client = config.finish(client);
    let context = Deliveries {
        callback: Arc::clone(callback),
        sent: Sent::default(),
        closed: Arc::clone(closed),
        reported: AtomicBool::new(false),
        answered: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        timed_out: AtomicBool::new(false),
    };
    BaseProducer::from_config_and_context(&client, context).map_err(|e| refused_config(&e))
}

fn serve(shared: &Shared) {
    let mut asked = Instant::now();
    let mut silence = Silence { since: Instant::now(), failed: false };
    let mut stall = Stall::new(STALLED_AFTER);
    while !shared.stop.load(Ordering::Acquire) {
        let producer = Arc::clone(&shared.producer.read());
        producer.poll(TURN);
        if shared.closed.any.load(Ordering::Relaxed) && asked.elapsed() >= ASK_AGAIN {
            shared.closed.ask(&producer);
            asked = Instant::now();
        }
        let silent_ms = u64::try_from(silence.look(&producer).as_millis()).unwrap_or(u64::MAX);
        shared.silent_ms.store(silent_ms, Ordering::Relaxed);
        let fatal = producer.client().fatal_error().map(|(code, why)| format!("{code}: {why}"));
        let stalled = stall.look(&producer, &shared.config).then(|| STALLED.to_owned());
        if let Some(why) = fatal.or(stalled) {
            warn!("the bridge's Kafka producer is made anew: {why}");
            // Where that did not help, the next one is given longer.
            let longest = Duration::from_millis(shared.tuning.produce_timeout_ms.into());
            let helped = silence.since > stall.begun;
            let next = if helped { STALLED_AFTER } else { (stall.after * 2).min(longest.max(STALLED_AFTER)) };
            stall = Stall::new(next);
            // Whatever the old one held fails now.
            silence.failed = true;
            match make(&shared.config, &shared.tuning, &shared.callback, &shared.closed) {
                Ok(renewed) => {
                    *shared.producer.write() = Arc::new(renewed);
                    end(&producer);
                }
                Err(error) => error!("the bridge's Kafka producer cannot be made anew: {error}"),
            }
        }
    }
}

/// For how long Kafka answered nothing while records waited.
struct Silence {
    /// When Kafka answered last, or nothing was to be answered.
    since: Instant,
    /// Whether a record failed since.
    failed: bool,
}

impl Silence {
    fn look(&mut self, producer: &BaseProducer<Deliveries>) -> Duration {
        let reports = producer.client().context();
        self.failed |= reports.failed.swap(false, Ordering::Relaxed);
        if reports.answered.swap(false, Ordering::Relaxed) {
            (self.since, self.failed) = (Instant::now(), false);
        } else if producer.in_flight_count() == 0 && !self.failed {
            self.since = Instant::now();
        }
        self.since.elapsed()
    }
}

/// Whether a producer reports what it could.
struct Stall {
    begun: Instant,
    /// How long the cluster must be ready in vain.
    after: Duration,
    looked: Instant,
    /// The answer of a look that is under way; the thread that serves deliveries does not wait for it.
    looking: Option<Receiver<bool>>,
    /// Since when the cluster could have taken every record, as far as was looked.
    ready: Option<Instant>,
    /// When a record was reported last, or none was in flight.
    progress: Instant,
    /// Whether a record waited too long while the cluster could have taken it.
    timed_out: bool,
}

impl Stall {
    fn new(after: Duration) -> Self {
        let now = Instant::now();
        Self { begun: now, after, looked: now, looking: None, ready: None, progress: now, timed_out: false }
    }

    /// Says whether the producer stalls. An outage is none: its time does not count. Whether there is one is
    /// asked while records wait and nothing is heard of them.
    fn look(&mut self, producer: &BaseProducer<Deliveries>, config: &KafkaConfig) -> bool {
        let reports = producer.client().context();
        self.timed_out |= reports.timed_out.swap(false, Ordering::Relaxed);
        if reports.reported.swap(false, Ordering::Relaxed) || producer.in_flight_count() == 0 {
            self.progress = Instant::now();
        }
        if !self.timed_out && self.progress.elapsed() < LOOK_EVERY {
            self.ready = None;
            self.looking = None;
            return false;
        }
        match self.looking.as_ref().map(Receiver::try_recv) {
            Some(Ok(true)) => {
                self.ready.get_or_insert_with(Instant::now);
                self.looking = None;
            }
            Some(Ok(false) | Err(TryRecvError::Disconnected)) => {
                (self.ready, self.timed_out, self.looking) = (None, false, None);
            }
            Some(Err(TryRecvError::Empty)) => {}
            None if self.looked.elapsed() >= LOOK_EVERY => {
                self.looked = Instant::now();
                self.looking = begin_look(config);
            }
            None => {}
        }
        let is_long = |since: Instant| since.elapsed() >= self.after;
        self.ready.is_some_and(is_long) && (self.timed_out || is_long(self.progress))
    }
}

/// Asks on a thread of its own whether the cluster could take every record.
fn begin_look(config: &KafkaConfig) -> Option<Receiver<bool>> {
    let (answer, looking) = mpsc::channel();
    let config = config.clone();
    let ask = move || {
        let _nobody_waits_any_more = answer.send(every_partition_has_a_leader(&config));
    };
    let begun = std::thread::Builder::new().name("kafka-look".to_owned()).spawn(ask);
    begun.map_err(|e| warn!("no thread to look at the cluster on: {e}")).ok().map(|_ends_by_itself| looking)
}

/// Gives up what is queued or in flight, so that each token is reported.
fn end(producer: &BaseProducer<Deliveries>) {
    producer.purge(PurgeConfig::default().queue().inflight());
    let deadline = Instant::now() + LAST_REPORTS;
    while producer.in_flight_count() > 0 && Instant::now() < deadline {
        serve_once(producer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_the_records_own_fault_is_said_of_the_record() {
        use RDKafkaErrorCode as Code;
        for (code, kind) in [
            (Code::MessageSizeTooLarge, "record"),
            (Code::InvalidArgument, "record"),
            (Code::QueueFull, "full"),
            (Code::Fatal, "full"),
            (Code::UnknownTopic, "topic"),
            (Code::UnknownTopicOrPartition, "topic"),
            (Code::UnknownPartition, "topic"),
            (Code::InvalidTopic, "topic"),
            (Code::TopicAuthorizationFailed, "topic"),
        ] {
            let said = match why_not_taken(&KafkaError::MessageProduction(code)) {
                NotTaken::Full => "full",
                NotTaken::Topic(_) => "topic",
                NotTaken::Record(_) => "record",
            };
            assert_eq!(said, kind, "{code:?}");
        }
    }
}
