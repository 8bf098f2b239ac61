//! Outputs, state changes and offsets in one transaction.

use crate::config::{KafkaConfig, REQUEST_TIMEOUT, TRANSACTION_TIMEOUT};
use crate::context::{log_error, log_line};
use crate::failure::{by_code, dependency, is_fence, refused_config};
use crate::message::{list, produce, serve, unproven};
use crate::sent::Sent;
use crate::source::Membership;
use parking_lot::Mutex;
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer, ProducerContext};
use std::time::{Duration, Instant};
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Advance, Failure, Transactions};

/// Deliveries are served this often while records are handed over.
const SERVE_EVERY: usize = 1_024;

/// Remembers the first delivery that failed: it dooms the transaction.
#[derive(Default)]
struct Deliveries {
    failed: Mutex<Option<(RDKafkaErrorCode, String)>>,
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
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Some((code, message)) = unproven(result) {
            let what = format!("a record for `{}` was not delivered", message.topic());
            self.failed.lock().get_or_insert((code, what));
        } else if let Ok(message) = result {
            self.sent.count(message.topic());
        }
    }
}

/// The transactional producer of one group and instance.
///
/// Its `transactional.id` is group and instance name, so that a successor fences its predecessor and ends
/// its open transaction. No call blocks longer than about twice the transaction's time-out (10 s).
pub struct TransactionalProducer {
    config: KafkaConfig,
    id: String,
    membership: Membership,
    producer: Option<BaseProducer<Deliveries>>,
    open: bool,
}

impl TransactionalProducer {
    /// Prepares the producer of `group`, whose source is `membership`. Connects with the first
    /// [`Transactions::reset`], or with the first send.
    pub fn new(config: &KafkaConfig, group: &str, membership: Membership) -> Self {
        let id = format!("{group}-{}", config.instance);
        Self { config: config.clone(), id, membership, producer: None, open: false }
    }

    fn make(&self) -> Result<BaseProducer<Deliveries>, Failure> {
        let mut client = self.config.writer();
        client
            .set("transactional.id", &self.id)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT.as_millis().to_string())
            .set("message.timeout.ms", TRANSACTION_TIMEOUT.as_millis().to_string())
            // A commit waits for the last batch: a linger is latency, and loops hand over whole batches.
            .set("linger.ms", "1");
        BaseProducer::from_config_and_context(&client, Deliveries::default()).map_err(|e| refused_config(&e))
    }

    /// Begins a transaction where none is open.
    fn begin(&mut self) -> Result<(), Failure> {
        if self.producer.is_none() {
            self.reset()?;
        }
        if !self.open {
            let begun = self.live()?.begin_transaction();
            begun.map_err(|e| self.sort("cannot begin a transaction", &e))?;
            self.open = true;
        }
        Ok(())
    }

    fn live(&self) -> Result<&BaseProducer<Deliveries>, Failure> {
        self.producer.as_ref().ok_or_else(|| dependency("the transactional producer is not made yet"))
    }

    fn sort(&self, what: &str, error: &KafkaError) -> Failure {
        let what = format!("{what} of `{}`", self.id);
        let KafkaError::Transaction(inner) = error else {
            return crate::failure::failure(&what, error);
        };
        if is_fence(inner.code()) || inner.is_fatal() {
            return Failure::Fenced(format!("{what}: {inner}"));
        }
        by_code(&what, inner.code(), &inner.to_string())
    }
}

fn doomed(producer: &BaseProducer<Deliveries>) -> Result<(), Failure> {
    match &*producer.client().context().failed.lock() {
        None => Ok(()),
        Some((code, what)) => {
            // A purge or a fence is reported for each record: what counts is the producer's own state.
            if let Some((fatal, why)) = producer.client().fatal_error() {
                return Err(Failure::Fenced(format!("{what}: {fatal}: {why}")));
            }
            Err(by_code(what, *code, &code.to_string()))
        }
    }
}

/// Waits until nothing is in flight. rdkafka's own flush polls in slices of 100 ms and each runs its full
/// length: measured, a commit then takes 108 ms instead of 9–15.
fn drain(producer: &BaseProducer<Deliveries>) -> Result<(), Failure> {
    let deadline = Instant::now() + TRANSACTION_TIMEOUT;
    while producer.in_flight_count() > 0 {
        serve(producer);
        doomed(producer)?;
        if Instant::now() > deadline {
            return Err(dependency("records were not acknowledged within the transaction's time-out"));
        }
    }
    doomed(producer)
}

impl Transactions for TransactionalProducer {
    fn send(&mut self, outbox: &Outbox) -> Result<(), Failure> {
        if outbox.is_empty() {
            return Ok(());
        }
        self.begin()?;
        let producer = self.live()?;
        let deadline = Instant::now() + TRANSACTION_TIMEOUT;
        for (index, record) in outbox.iter().enumerate() {
            if index % SERVE_EVERY == SERVE_EVERY - 1 {
                producer.poll(Duration::ZERO);
            }
            loop {
                match produce(producer, record, ()) {
                    Ok(()) => break,
                    Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) => {
                        serve(producer);
                        doomed(producer)?;
                        if Instant::now() > deadline {
                            return Err(dependency("the producer's queue stayed full"));
                        }
                    }
                    Err(error) => {
                        doomed(producer)?;
                        let what = format!("cannot send a record for `{}`", record.topic);
                        return Err(self.sort(&what, &error));
                    }
                }
            }
        }
        doomed(producer)
    }

    fn commit(&mut self, advances: &[Advance]) -> Result<(), Failure> {
        self.begin()?;
        let producer = self.live()?;
        drain(producer)?;
        if !advances.is_empty() {
            let offsets = list(advances.iter().map(|a| (&a.partition, a.to)));
            for advance in advances {
                let entry = offsets.find_partition(&advance.partition.topic, advance.partition.partition);
                entry.expect("put in above").set_metadata(advance.books.to_metadata());
            }
            let member = self.membership.group_metadata();
            let member = member.ok_or_else(|| Failure::Fenced("the group's member is gone".to_owned()))?;
            let sent = producer.send_offsets_to_transaction(&offsets, &member, REQUEST_TIMEOUT);
            sent.map_err(|e| self.sort("cannot send offsets in the transaction", &e))?;
        }
        let committed = producer.commit_transaction(TRANSACTION_TIMEOUT);
        committed.map_err(|e| self.sort("the commit is refused or unknown", &e))?;
        self.open = false;
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Failure> {
        self.open = false;
        // Dropping purges what is queued; the transaction on the broker is ended by the successor below.
        self.producer = None;
        let producer = self.make()?;
        producer
            .init_transactions(TRANSACTION_TIMEOUT)
            .map_err(|e| self.sort("cannot initialise transactions", &e))?;
        self.producer = Some(producer);
        Ok(())
    }
}
