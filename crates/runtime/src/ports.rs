//! The ports between the loops and the world. Each is owned by one thread and called in blocking style.

use std::sync::Arc;
use std::time::Duration;
use throughline_model::books::Books;
use throughline_model::record::{Batch, Outbox, TopicPartition};
use throughline_model::rows::Rows;
use throughline_model::stage::Delivery;

/// Everything that can happen to a stage; one loop consumes it.
#[derive(Debug)]
pub enum PipelineEvent {
    /// These partitions are offered. They deliver nothing until [`Source::start`]: the loop restores their
    /// state first. The member keeps its place in the group meanwhile.
    Offered(Vec<TopicPartition>),
    /// These partitions shall be given back: commit what is in flight, then call [`Source::release`].
    Revoking(Vec<TopicPartition>),
    /// These partitions are gone already (session lost, fenced): drop what is in flight, commit nothing.
    Lost(Vec<TopicPartition>),
    /// Records of one partition.
    Records(Batch),
    /// This partition has been read to its end.
    CaughtUp(TopicPartition),
    /// Positions `[from, to)` of the partition were deleted by retention before they were read.
    Overtaken {
        /// The partition.
        partition: TopicPartition,
        /// The position that was to be read.
        from: i64,
        /// The first position that still exists.
        to: i64,
    },
    /// Nothing came within the time asked for.
    Idle,
    /// The source cannot deliver now; it goes on trying with bounded back-off and says so once.
    Unavailable(String),
    /// The source can deliver again, where no record and no end of a partition said so.
    Available,
    /// A partition does not hold what was read of it: a person must decide how to go on. It delivers nothing
    /// any more.
    Stop {
        /// The code that `throughline explain` describes.
        code: &'static str,
        /// What, where, why, and the command that helps.
        message: String,
    },
}

/// Where a partition goes on, with its books.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The next offset to read.
    pub next: i64,
    /// The books, or what was found in their place.
    pub books: BooksFound,
}

/// What was found beside a committed offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BooksFound {
    /// Nothing was ever committed: the group's start policy applies and a volume is opened.
    #[default]
    New,
    /// Our books.
    Ours(Books),
    /// An offset that a foreign tool moved, with the metadata it left.
    Foreign(String),
}

/// Reads partitions as a member of a group.
pub trait Source {
    /// Waits at most `wait` for the next event. Must be called often, also while partitions are paused.
    fn poll(&mut self, wait: Duration) -> PipelineEvent;

    /// Keeps the membership alive during work that lasts; what happens meanwhile is told by the next polls.
    fn keep_alive(&mut self);

    /// Returns the committed position of each partition, waiting for open transactions that hold offsets
    /// (`require_stable`, KIP-447). `next` is −1 where nothing is committed and the partition's earliest
    /// position shall be taken.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when Kafka cannot be asked.
    fn committed(&mut self, partitions: &[TopicPartition]) -> Result<Vec<Position>, Failure>;

    /// Begins (or begins again, after a failed transaction) to deliver a partition from `next`; −1 is the
    /// earliest position.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when the client refuses.
    fn start(&mut self, partitions: &[(TopicPartition, i64)]) -> Result<(), Failure>;

    /// Gives partitions back after [`PipelineEvent::Revoking`] or acknowledges [`PipelineEvent::Lost`].
    fn release(&mut self, partitions: &[TopicPartition]);

    /// Stops (`true`) or resumes (`false`) the delivery of partitions; records already fetched are kept or
    /// fetched again, never lost.
    fn pause(&mut self, partitions: &[TopicPartition], paused: bool);
}

/// What went wrong at a port, by what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A dependency is down or slow: pause, retry with bounded back-off, dead-letter nothing.
    #[error("{dependency} cannot be used: {message}")]
    Dependency {
        /// `kafka`, `registry`, `database`, or the other side of an act stage.
        dependency: &'static str,
        /// What it said.
        message: String,
    },
    /// Another writer owns the partition, or the transaction's fate is unknown: drop producer and state,
    /// read the committed offsets and restore.
    #[error("this writer was fenced or its commit is unknown: {0}")]
    Fenced(String),
    /// The data cannot be taken: search the record and dead-letter it.
    #[error("the data was refused ({code}): {message}")]
    Data {
        /// A stable code, for instance `sqlstate_22003`.
        code: String,
        /// What the store said, without the data.
        message: String,
    },
    /// A person must act; the stage stops and says so.
    #[error("{code}: {message}")]
    Stop {
        /// The code that `throughline explain` describes.
        code: &'static str,
        /// What, where, why, and the command that helps.
        message: String,
    },
}

/// A partition's step from `from` to `to` with the books as of `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    /// The partition.
    pub partition: TopicPartition,
    /// The position before.
    pub from: i64,
    /// The position after: the next offset to read.
    pub to: i64,
    /// Cumulative counts up to `to`.
    pub books: Books,
}

/// Writes outputs, state changes and offsets in one transaction.
pub trait Transactions {
    /// Sends records within the current transaction, beginning it where there is none. Blocks while the
    /// producer's queue is full.
    ///
    /// # Errors
    /// Any failure dooms the transaction: call [`Transactions::reset`].
    fn send(&mut self, outbox: &Outbox) -> Result<(), Failure>;

    /// Commits the current transaction together with the offsets; with no records it commits the offsets
    /// alone, in a transaction all the same.
    ///
    /// # Errors
    /// After any error nothing is known to be committed: call [`Transactions::reset`].
    fn commit(&mut self, advances: &[Advance]) -> Result<(), Failure>;

    /// Drops the producer with whatever it holds and makes a new one, which fences its predecessor and
    /// ends its open transaction.
    ///
    /// # Errors
    /// [`Failure::Dependency`]: try again with back-off.
    fn reset(&mut self) -> Result<(), Failure>;
}

/// Reads compacted topics from their beginning to the end they had when asked, committed data only, open
/// transactions awaited.
pub trait TableReader {
    /// Passes every record of the partitions of `topic`, tombstones included: each partition in order, the
    /// partitions among each other in none.
    ///
    /// # Errors
    /// [`Failure::Dependency`]; what was passed before must then be discarded.
    fn read_partitions(
        &mut self,
        topic: &Arc<str>,
        partitions: &[i32],
        each: &mut dyn FnMut(&Batch),
    ) -> Result<(), Failure>;

    /// Passes every record of all partitions of `topic` and then, with each later call, what has come
    /// since. The first call reads to the end; later calls return at once when there is nothing.
    ///
    /// # Errors
    /// [`Failure::Dependency`]; the next call may begin anew and pass again, in its order, what it passed before.
    fn follow(&mut self, topic: &str, each: &mut dyn FnMut(&Batch)) -> Result<(), Failure>;
}

/// What lies at a position of a partition, for a reader of committed data.
#[derive(Debug)]
pub enum Stretch<'a> {
    /// Records from the position on, perhaps after some that lie before it.
    Records(&'a Batch),
    /// There is none before the end asked for.
    End,
    /// Nothing came yet.
    Waiting,
}

/// A partition's number with its first position and its end.
pub type Bounds = (i32, i64, i64);

/// What there is of a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Its id, which another topic under the same name does not have; empty where the cluster has none.
    pub topic_id: String,
    /// Its partitions.
    pub partitions: Vec<Bounds>,
}

/// Reads stretches of partitions without being a member of a group: dead letters that are to be replayed.
pub trait StretchReader: Send {
    /// Returns the id of `topic` with the first position and the end of each partition, or `None` where it does
    /// not exist.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when Kafka cannot be asked.
    fn bounds(&mut self, topic: &str) -> Result<Option<Extent>, Failure>;

    /// Returns the first position that there is of a partition.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when Kafka cannot be asked.
    fn first(&mut self, partition: &TopicPartition) -> Result<i64, Failure>;

    /// Returns what lies in `[from, to)`, waiting for it only briefly. Whoever goes on where the records of
    /// the call before ended reads without a seek.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when Kafka cannot be read.
    fn read(&mut self, partition: &TopicPartition, from: i64, to: i64) -> Result<Stretch<'_>, Failure>;
}

/// Writes rows and advances offsets in one database transaction.
pub trait Store {
    /// Returns the position of each partition from the database, which decides.
    ///
    /// # Errors
    /// [`Failure::Dependency`] or, where the topic incarnation differs, [`Failure::Stop`].
    fn positions(&mut self, group: &str, partitions: &[TopicPartition]) -> Result<Vec<Position>, Failure>;

    /// Writes rows and moves offsets by compare-and-swap in one transaction.
    ///
    /// # Errors
    /// [`Failure::Fenced`] when an offset is not at `from`; [`Failure::Data`] when a row is refused;
    /// [`Failure::Dependency`]; [`Failure::Stop`]. Nothing is written after any of them, but for an
    /// unknown commit, after which the compare-and-swap of the retry tells.
    fn write(&mut self, group: &str, rows: &Rows, advances: &[Advance]) -> Result<(), Failure>;
}

/// Writes records outside a transaction and waits for their acknowledgement: dead letters of load stages,
/// requests of commands.
pub trait Outlet {
    /// Returns when every record is acknowledged by Kafka with acks=all.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when one was not; others may have been written.
    fn send_all(&mut self, outbox: &Outbox) -> Result<(), Failure>;

    /// As [`Outlet::send_all`], and takes what is acknowledged out of `outbox`, also where others are not: the
    /// next attempt does not write it again.
    ///
    /// # Errors
    /// As [`Outlet::send_all`].
    fn send_rest(&mut self, outbox: &mut Outbox) -> Result<(), Failure> {
        self.send_all(outbox)?;
        outbox.clear();
        Ok(())
    }

    /// Mirrors the positions of a load stage to Kafka for lag tools, and as a witness against a database that
    /// fell back; the database decides, so an error is only logged. Never called before the database's commit.
    fn mirror(&mut self, group: &str, advances: &[Advance]);
}

/// What the other side of an act stage made of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has it.
    Delivered,
    /// It refuses this message and would again.
    Refused {
        /// A stable code, for instance `http_422`.
        code: String,
        /// What it said.
        message: String,
    },
    /// It did not take this message now, or did not say in time. That may be the message's fault or its own:
    /// whether others pass tells.
    Failed {
        /// What went wrong.
        message: String,
        /// How long it asks to be left alone.
        wait: Option<Duration>,
    },
    /// It cannot be used at all: no connection, or it does not know us. That says nothing about the message.
    Unavailable {
        /// What went wrong.
        message: String,
    },
}

/// Performs the deliveries of an act stage.
pub trait Effector {
    /// Returns the name of the other side in log, health and metrics.
    fn dependency(&self) -> &'static str;

    /// Begins a delivery and returns at once. Its answer comes once, under `token`, within a bounded time.
    fn begin(&mut self, token: u64, delivery: &Delivery);

    /// Returns the next answer, waiting for one at most `wait`.
    fn answer(&mut self, wait: Duration) -> Option<(u64, Answer)>;
}

/// Resolves schema ids before a stage sees a record.
pub trait SchemaSource {
    /// Returns the schema text of `id`, or `None` where the registry says that there is none.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when the registry cannot be asked.
    fn fetch(&mut self, id: u32) -> Result<Option<String>, Failure>;
}

/// Takes records from the bridge without blocking; reports each one's [`Fate`] by its token.
pub trait Ingress: Send + Sync {
    /// Hands a record over. The token comes back through the delivery callback that the adapter was made
    /// with, exactly once, unless this returns an error.
    ///
    /// # Errors
    /// [`NotTaken`]; after all but [`NotTaken::Record`] stop reading from the connection and try again later.
    fn send(&self, record: throughline_model::record::Outgoing<'_>, token: u64) -> Result<(), NotTaken>;

    /// Returns how many records are not yet acknowledged.
    fn in_flight(&self) -> usize;

    /// Returns for how long nothing was heard of any record while some were in flight; zero where none is.
    fn silent_for(&self) -> Duration;
}

/// Why an [`Ingress`] did not take a record. Only the last may become a dead letter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// The queue is full, or the producer is about to be replaced.
    #[error("the producer queue is full")]
    Full,
    /// The topic takes no records now, because it is missing, say, or we may not write to it: a fault of the
    /// platform. Records of other topics may be taken meanwhile.
    #[error("the topic takes no records: {0}")]
    Topic(String),
    /// The record itself cannot be sent, however often it is tried.
    #[error("the record cannot be sent: {0}")]
    Record(String),
}

/// What became of a record that an [`Ingress`] took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Kafka acknowledged it with acks=all.
    Delivered,
    /// Kafka did not acknowledge it in time, or said why it cannot now. It may hold the record nevertheless.
    Failed,
    /// Kafka refuses this very record and would again.
    Refused,
}
