//! Records outside a transaction, each acknowledged before the caller goes on.

use crate::config::KafkaConfig;
use crate::context::{log_error, log_line};
use crate::failure::{by_code, dependency, failure, refused_config};
use crate::message::{produce, serve, unproven};
use crate::sent::Sent;
use crate::source::Membership;
use parking_lot::Mutex;
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer, ProducerContext};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Advance, Failure, Outlet};

/// How long a record may wait for its acknowledgement: three leader elections, and a caller that still
/// hears of the outage while it matters.
const ACK_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Deliveries {
    failed: Mutex<Option<(RDKafkaErrorCode, String)>>,
    /// The places in the outbox of what is acknowledged.
    acknowledged: Mutex<BTreeSet<usize>>,
    sent: Sent,
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

    fn delivery(&self, result: &DeliveryResult<'_>, place: usize) {
        if let Some((code, message)) = unproven(result) {
            let what = format!("a record for `{}` was not acknowledged", message.topic());
            self.failed.lock().get_or_insert((code, what));
        } else if let Ok(message) = result {
            self.acknowledged.lock().insert(place);
            self.sent.count(message.topic());
        }
    }
}

/// An idempotent producer that waits for acks=all: dead letters of load stages, requests of commands.
pub struct AckedProducer {
    config: KafkaConfig,
    member: Option<Membership>,
    producer: Option<BaseProducer<Deliveries>>,
}

impl AckedProducer {
    /// Prepares a producer; connects with the first record.
    pub fn new(config: &KafkaConfig) -> Self {
        Self { config: config.clone(), member: None, producer: None }
    }

    /// Prepares a producer that mirrors offsets as the member behind `membership`: only a member may commit
    /// for a group that has members.
    pub fn for_member(config: &KafkaConfig, membership: Membership) -> Self {
        Self { member: Some(membership), ..Self::new(config) }
    }

    fn producer(&mut self) -> Result<&BaseProducer<Deliveries>, Failure> {
        // A fatal error of an idempotent producer stays: only a new one can go on.
        if self.producer.as_ref().is_some_and(|p| p.client().fatal_error().is_some()) {
            self.producer = None;
        }
        if self.producer.is_none() {
            let mut client = self.config.writer();
            client.set("message.timeout.ms", ACK_TIMEOUT.as_millis().to_string()).set("linger.ms", "1");
            let made = BaseProducer::from_config_and_context(&client, Deliveries::default());
            self.producer = Some(made.map_err(|e| refused_config(&e))?);
        }
        Ok(self.producer.as_ref().expect("made above"))
    }
}

impl Outlet for AckedProducer {
    fn send_all(&mut self, outbox: &Outbox) -> Result<(), Failure> {
        let sent = self.send_and_wait(outbox);
        self.drop_if_doubtful(sent)
    }

    fn send_rest(&mut self, outbox: &mut Outbox) -> Result<(), Failure> {
        let sent = self.send_and_wait(outbox);
        if sent.is_ok() {
            outbox.clear();
        } else if let Some(producer) = &self.producer {
            let acknowledged = producer.client().context().acknowledged.lock();
            outbox.retain(|place| !acknowledged.contains(&place));
        }
        self.drop_if_doubtful(sent)
    }

    fn mirror(&mut self, group: &str, advances: &[Advance]) {
        match &self.member {
            Some(membership) => membership.mirror(advances),
            None => tracing::warn!(group, "offsets are not mirrored: this producer belongs to no member"),
        }
    }
}

impl AckedProducer {
    /// The producer may have lost a leader for good (see `stall`); what it still holds is sent again by the caller.
    fn drop_if_doubtful(&mut self, sent: Result<(), Failure>) -> Result<(), Failure> {
        if matches!(sent, Err(Failure::Dependency { .. })) {
            self.producer = None;
        }
        sent
    }

    fn send_and_wait(&mut self, outbox: &Outbox) -> Result<(), Failure> {
        if outbox.is_empty() {
            return Ok(());
        }
        let producer = self.producer()?;
        let failed = &producer.client().context().failed;
        *failed.lock() = None;
        producer.client().context().acknowledged.lock().clear();
        // librdkafka reports each record within its time-out; a little more is granted for the reports.
        let deadline = Instant::now() + ACK_TIMEOUT + Duration::from_secs(5);
        for (place, record) in outbox.iter().enumerate() {
            loop {
                match produce(producer, record, place) {
                    Ok(()) => break,
                    Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) => {
                        serve(producer);
                        if Instant::now() > deadline {
                            return Err(dependency("the producer's queue stayed full"));
                        }
                    }
                    Err(e) => {
                        return Err(failure(&format!("cannot send a record for `{}`", record.topic), &e));
                    }
                }
            }
        }
        while producer.in_flight_count() > 0 {
            serve(producer);
            if Instant::now() > deadline {
                return Err(dependency(format!("no acknowledgement within {} s", ACK_TIMEOUT.as_secs())));
            }
        }
        match failed.lock().take() {
            None => Ok(()),
            Some((code, what)) => Err(by_code(&what, code, &code.to_string())),
        }
    }
}
