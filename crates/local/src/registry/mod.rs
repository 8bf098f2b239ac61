//! A small schema registry that speaks Confluent's API.
//!
//! Its state is a compacted topic in Confluent's own record format, so a real registry can take over where
//! this one stops. Reads are answered from memory. Writes go through one thread, one after the other, and
//! are answered after Kafka has acknowledged them. One process writes at a time: this is for one machine,
//! in production a real registry does this work.

mod api;
mod compatibility;
mod records;
pub mod state;

pub use compatibility::Level;

use crate::error::LocalError;
use parking_lot::RwLock;
use state::{ApiError, State, Written};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_kafka::{AckedProducer, KafkaConfig, TopicReader};
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Failure, Outlet, TableReader};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

/// The topic's name; Confluent's default, so that its tools look at the right place.
pub const TOPIC: &str = "_schemas";

/// Writes that wait for their turn; more are answered with 503.
const QUEUE: usize = 64;
/// How long a start waits for a topic that cannot be read yet.
const READ_BACK_WITHIN: Duration = Duration::from_secs(30);
const READ_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// A running registry. Dropping it stops it.
#[derive(Debug)]
pub struct EmbeddedRegistry {
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl EmbeddedRegistry {
    /// Starts a registry on `listen` (port 0 for a free one) over the topic [`TOPIC`] of a cluster, which is
    /// made where it does not exist, and returns when it serves.
    ///
    /// # Errors
    /// [`LocalError::Registry`] when Kafka cannot be used, [`LocalError::PortTaken`].
    pub fn start(listen: SocketAddr, kafka: &KafkaConfig) -> Result<Self, LocalError> {
        ensure_topic(kafka).map_err(|error| unusable(&error))?;
        Self::start_with(listen, TopicReader::new(kafka), AckedProducer::new(kafka))
    }

    /// Starts it with these ports to the topic, which must exist.
    ///
    /// # Errors
    /// As [`EmbeddedRegistry::start`].
    pub fn start_with(
        listen: SocketAddr,
        mut reader: impl TableReader,
        writer: impl Outlet + Send + 'static,
    ) -> Result<Self, LocalError> {
        let mut state = State::default();
        read_back(&mut reader, &mut state)?;
        drop(reader);
        let state = Arc::new(RwLock::new(state));

        let taken =
            |source| LocalError::PortTaken { name: "the schema registry", port: listen.port(), source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(taken)?;
        let listener = runtime.block_on(TcpListener::bind(listen)).map_err(taken)?;
        let addr = listener.local_addr().map_err(taken)?;

        let (jobs, queue) = mpsc::channel(QUEUE);
        let (stop, stopped) = oneshot::channel();
        let app = api::router(Arc::clone(&state), jobs);
        let serve = move || {
            let shutdown = async move {
                // A dropped sender stops it too.
                let _ = stopped.await;
            };
            let served =
                runtime.block_on(async { axum::serve(listener, app).with_graceful_shutdown(shutdown).await });
            if let Err(error) = served {
                tracing::error!(%error, "the schema registry has stopped serving");
            }
        };
        let write = move || write_loop(&state, queue, writer);
        let writer =
            std::thread::Builder::new().name("registry-write".to_owned()).spawn(write).map_err(taken)?;
        let server =
            std::thread::Builder::new().name("registry-http".to_owned()).spawn(serve).map_err(taken)?;
        Ok(Self { addr, stop: Some(stop), threads: vec![server, writer] })
    }

    /// Returns host and port.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns the base address of the API.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

/// Reads the topic to its end. A broker that comes back after a hard kill first answers with errors that
/// pass, such as an unknown leader epoch: `follow` begins anew, and what is applied twice changes nothing.
fn read_back(reader: &mut impl TableReader, state: &mut State) -> Result<(), LocalError> {
    let limit = Instant::now() + READ_BACK_WITHIN;
    loop {
        let read = reader.follow(TOPIC, &mut |batch| {
            for record in batch.iter() {
                if let Some(key) = record.key {
                    state.apply(key, record.value);
                }
            }
        });
        match read {
            Err(Failure::Dependency { .. }) if Instant::now() < limit => std::thread::sleep(READ_AGAIN_AFTER),
            other => return other.map_err(|error| unusable(&error)),
        }
    }
}

impl Drop for EmbeddedRegistry {
    fn drop(&mut self) {
        drop(self.stop.take());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the schema registry had panicked");
            }
        }
    }
}

/// Something to be written, and where the answer goes.
struct Job {
    change: Change,
    answer: oneshot::Sender<Result<Written, ApiError>>,
}

/// A change of the registry's state.
enum Change {
    Register {
        subject: String,
        schema: String,
    },
    /// The level of a subject, or the level for all where there is none.
    SetLevel {
        subject: Option<String>,
        level: compatibility::Level,
    },
}

/// Decides each change against the state, writes it to Kafka and only then makes it visible.
fn write_loop(state: &RwLock<State>, mut queue: mpsc::Receiver<Job>, mut writer: impl Outlet) {
    let topic: Arc<str> = TOPIC.into();
    while let Some(Job { change, answer }) = queue.blocking_recv() {
        let planned = match change {
            Change::Register { subject, schema } => state.read().plan_register(&subject, &schema),
            Change::SetLevel { subject, level } => Ok(State::plan_level(subject.as_deref(), level)),
        };
        let written = planned.and_then(|plan| {
            if let Some((key, value)) = plan.record {
                let mut outbox = Outbox::default();
                outbox.push(&topic, Some(0), Some(&key), Some(&value), []);
                writer.send_all(&outbox).map_err(|error| ApiError::store(&error.to_string()))?;
                state.write().apply(&key, Some(&value));
            }
            Ok(plan.written)
        });
        // Where the client has gone, the change is made all the same and it will find it.
        let _ = answer.send(written);
    }
}

/// Makes the topic where it does not exist: one partition, because the order of all records counts.
fn ensure_topic(kafka: &KafkaConfig) -> Result<(), Failure> {
    let compacted = ("cleanup.policy".to_owned(), "compact".to_owned());
    // As many copies as the cluster's default says (KIP-464): the registry is of no use without its topic.
    let topic =
        NewTopic { name: TOPIC.to_owned(), partitions: 1, replication: -1, configs: [compacted].into() };
    Admin::new(kafka)?.create_topics(&[topic])
}

fn unusable(error: &dyn std::fmt::Display) -> LocalError {
    LocalError::Registry { topic: TOPIC.to_owned(), message: error.to_string() }
}
