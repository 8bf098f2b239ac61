//! The SQL store: rows and offsets in one transaction, on SQLite or PostgreSQL behind one type.
//!
//! A store is a projection of Kafka: it can be rebuilt from there. What makes each message take effect once
//! is that the transaction which writes the rows also moves the offset, and moves it only from where it is
//! expected ([`SqlStore::write`](throughline_runtime::ports::Store::write)): a second writer of the partition
//! and a repeated write change no row, and so write nothing at all. `docs/operations-database.md` describes
//! tables, partitions, failure classes and what an operator does.
//!
//! The interface is blocking, for the threads of the load loops. It owns a small tokio runtime, so it must
//! be neither called nor dropped inside an async task; there, use `spawn_blocking`.

pub mod baseline;
mod error;
mod fold;
mod incarnation;
mod migrate;
mod postgres;
mod read;
mod sqlite;
mod validate;

pub use error::{CODES, Class, Codes, Engine, FAILURE_CLASSES, FailureClass};
pub use read::Table;
pub use validate::{ID_BYTES_MAX, TEXT_BYTES_MAX, validate};

use crate::fold::{FoldedTwins, fold_alerts, fold_twins};
use crate::incarnation::{other_incarnation, topic_id};
use crate::postgres::Postgres;
use crate::sqlite::Sqlite;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_model::rows::{AlertRow, ReadingRow, Rows, SessionRow, TwinRow};
use throughline_runtime::ports::{Advance, BooksFound, Failure, Position, Store};
use throughline_runtime::{AskIncarnation, Sabotage};
use tokio::runtime::Runtime;
use uuid::Uuid;

/// Between the two halves of what a sabotaged build tears apart, so that a kill can come between.
const SABOTAGE_PAUSE: Duration = Duration::from_millis(500);

/// What a store needs to know beside its URL.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The id of the Kafka cluster that offsets count in; empty for a store that is only read.
    pub cluster_id: String,
    /// The id of each topic that offsets count in. A topic that was deleted and made again has another.
    pub topic_ids: HashMap<String, Uuid>,
    /// Asks for both anew. [`Store::positions`] does each time, so that a process that runs on notices a
    /// topic or cluster that was replaced; without it what was given here stays.
    pub ask: Option<AskIncarnation>,
    /// Bound of one call, after which the database counts as unavailable. Locks are awaited for a third
    /// of it.
    pub call_timeout: Duration,
}

impl Default for StoreOptions {
    /// Thirty seconds a call: a batch takes well below one, and a longer wait would look like a hang.
    fn default() -> Self {
        Self {
            cluster_id: String::new(),
            topic_ids: HashMap::new(),
            ask: None,
            call_timeout: Duration::from_secs(30),
        }
    }
}

/// A store on one connection. Every role opens its own.
pub struct SqlStore {
    runtime: Runtime,
    backend: Backend,
    options: StoreOptions,
    /// Partitions of a group that [`Store::positions`] found no row for: only these may be inserted.
    unborn: HashSet<(String, TopicPartition)>,
}

/// The closed set of databases: two adapters need no trait object.
enum Backend {
    Postgres(Box<Postgres>),
    Sqlite(Box<Sqlite>),
}

/// One partition's step as the database sees it.
#[derive(Debug)]
pub(crate) struct Step {
    pub topic: String,
    pub partition: i32,
    pub topic_id: String,
    pub from: i64,
    pub to: i64,
    pub books: String,
}

/// One write after checks and folding.
#[derive(Debug)]
pub(crate) struct Write<'a> {
    pub group: &'a str,
    pub cluster_id: &'a str,
    /// Steps of partitions that have a row, moved by compare-and-swap.
    pub moves: Vec<Step>,
    /// Steps of partitions that have none, inserted unless somebody else did.
    pub births: Vec<Step>,
    pub readings: &'a [ReadingRow],
    pub sessions: &'a [SessionRow],
    pub alerts: Vec<AlertRow>,
    pub twins: FoldedTwins<'a>,
}

/// A stored offset with the incarnation that it counts in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredOffset {
    /// The partition.
    pub partition: TopicPartition,
    /// The cluster that the offset counts in.
    pub cluster_id: String,
    /// The topic's id that the offset counts in.
    pub topic_id: String,
    /// The next offset to read.
    pub next: i64,
    /// The books' text.
    pub books: String,
}

impl SqlStore {
    /// Opens the database at `url` and brings its tables up to date under a lock, so that several roles may
    /// start at once. `sqlite:///absolute/path.db` and `sqlite:relative.db` make the file where it is
    /// missing (its directory must exist); `postgres://user@host/database` needs an existing database.
    ///
    /// # Errors
    /// [`Failure::Dependency`] when the database cannot be reached: try again with back-off.
    /// [`Failure::Stop`] when the URL cannot be used or the tables are newer than this program.
    pub fn open(url: &str, options: StoreOptions) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| error::dependency(format!("cannot start the database client: {e}")))?;
        let timeout = options.call_timeout;
        let backend = if url.starts_with("sqlite:") {
            let sqlite = runtime.block_on(Sqlite::open(url, timeout))?;
            Backend::Sqlite(Box::new(sqlite))
        } else if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            let postgres = runtime.block_on(Postgres::open(url, timeout))?;
            Backend::Postgres(Box::new(postgres))
        } else {
            // The URL may hold a password, so only its scheme is shown.
            let scheme = url.split(':').next().unwrap_or_default();
            return Err(Failure::Stop {
                code: error::URL,
                message: format!(
                    "unknown database scheme `{scheme}`; use sqlite:///absolute/path.db or \
                     postgres://user@host/database"
                ),
            });
        };
        Ok(Self { runtime, backend, options, unborn: HashSet::new() })
    }

    /// Makes the offset of a partition count in the present cluster and topic, from `next`, with new books
    /// in the volume `volume`. This is what `throughline groups adopt` does after a cluster or topic was
    /// replaced, or after an offset was moved by hand; a running writer of the partition is fenced by it.
    ///
    /// # Errors
    /// As [`Store::write`].
    pub fn adopt(
        &mut self,
        group: &str,
        partition: &TopicPartition,
        next: i64,
        volume: &str,
    ) -> Result<(), Failure> {
        let step = Step {
            topic: partition.topic.to_string(),
            partition: partition.partition,
            topic_id: topic_id(&self.options, &partition.topic)?,
            from: next,
            to: next,
            books: Books::open(volume).to_metadata(),
        };
        self.unborn.remove(&(group.to_owned(), partition.clone()));
        let cluster_id = self.options.cluster_id.as_str();
        match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.adopt(group, cluster_id, &step)),
            Backend::Sqlite(b) => self.runtime.block_on(b.adopt(group, cluster_id, &step)),
        }
    }

    /// Says whether a stored offset counts in the cluster and topic that the options name.
    pub fn is_of_here(&self, stored: &StoredOffset) -> bool {
        let id = self.options.topic_ids.get(&*stored.partition.topic).map(Uuid::to_string);
        stored.cluster_id == self.options.cluster_id && id.is_some_and(|id| id == stored.topic_id)
    }

    /// Returns every offset stored for a group, of whatever incarnation, by topic and partition.
    ///
    /// # Errors
    /// [`Failure::Dependency`] or [`Failure::Stop`].
    pub fn stored_offsets(&mut self, group: &str) -> Result<Vec<StoredOffset>, Failure> {
        match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.offsets(group)),
            Backend::Sqlite(b) => self.runtime.block_on(b.offsets(group)),
        }
    }

    /// Returns the twin of a device.
    ///
    /// # Errors
    /// [`Failure::Dependency`] or [`Failure::Stop`].
    pub fn twin(&mut self, site_id: &str, device_id: &str) -> Result<Option<TwinRow>, Failure> {
        match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.twin(site_id, device_id)),
            Backend::Sqlite(b) => self.runtime.block_on(b.twin(site_id, device_id)),
        }
    }

    /// Returns at most `limit` twins in the order of site and device, those after `after` (a site and a
    /// device, the cursor of pages), of one site or of all.
    ///
    /// # Errors
    /// [`Failure::Dependency`] or [`Failure::Stop`].
    pub fn twins(
        &mut self,
        site_id: Option<&str>,
        after: Option<(&str, &str)>,
        limit: u32,
    ) -> Result<Vec<TwinRow>, Failure> {
        // Ids are never empty, so a pair of empty strings lies before all of them.
        let after = after.unwrap_or_default();
        match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.twins(site_id, after, limit)),
            Backend::Sqlite(b) => self.runtime.block_on(b.twins(site_id, after, limit)),
        }
    }

    /// Returns the newest session event of a device by received_at.
    ///
    /// # Errors
    /// [`Failure::Dependency`] or [`Failure::Stop`].
    pub fn last_session(&mut self, site_id: &str, device_id: &str) -> Result<Option<SessionRow>, Failure> {
        match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.last_session(site_id, device_id)),
            Backend::Sqlite(b) => self.runtime.block_on(b.last_session(site_id, device_id)),
        }
    }

    /// Counts the rows of a table by reading it, which takes long where it is large.
    ///
    /// # Errors
    /// [`Failure::Dependency`] or [`Failure::Stop`].
    pub fn count(&mut self, table: Table) -> Result<u64, Failure> {
        let rows = match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.count(table)),
            Backend::Sqlite(b) => self.runtime.block_on(b.count(table)),
        }?;
        Ok(u64::try_from(rows).unwrap_or_default())
    }

    /// Asks the database for its version, for `throughline doctor`.
    ///
    /// # Errors
    /// [`Failure::Dependency`] or [`Failure::Stop`].
    pub fn version(&mut self) -> Result<String, Failure> {
        match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.version()),
            Backend::Sqlite(b) => self.runtime.block_on(b.version()),
        }
    }

    /// Splits the advances into moves of known offsets and births of new ones.
    fn steps(&self, group: &str, advances: &[Advance]) -> Result<(Vec<Step>, Vec<Step>), Failure> {
        let (mut moves, mut births) = (Vec::with_capacity(advances.len()), Vec::new());
        for advance in advances {
            let step = Step {
                topic: advance.partition.topic.to_string(),
                partition: advance.partition.partition,
                topic_id: topic_id(&self.options, &advance.partition.topic)?,
                from: advance.from,
                to: advance.to,
                books: advance.books.to_metadata(),
            };
            let unborn = !self.unborn.is_empty()
                && self.unborn.contains(&(group.to_owned(), advance.partition.clone()));
            if unborn { births.push(step) } else { moves.push(step) }
        }
        Ok((moves, births))
    }
}

impl Store for SqlStore {
    /// Returns the stored position of each partition; −1 with [`BooksFound::New`] where there is none.
    ///
    /// A loop asks at each activation, after a rebalance or a recovery, and that is when a topic that was
    /// deleted and made again, or another cluster under the same address, must be noticed: its offsets
    /// begin anew, and rows would be skipped or written twice.
    fn positions(&mut self, group: &str, partitions: &[TopicPartition]) -> Result<Vec<Position>, Failure> {
        incarnation::refresh(&mut self.options)?;
        let stored = self.stored_offsets(group)?;
        let mut positions = Vec::with_capacity(partitions.len());
        for partition in partitions {
            let topic_id = topic_id(&self.options, &partition.topic)?;
            let key = (group.to_owned(), partition.clone());
            let Some(offset) = stored.iter().find(|o| o.partition == *partition) else {
                self.unborn.insert(key);
                positions.push(Position { next: -1, books: BooksFound::New });
                continue;
            };
            self.unborn.remove(&key);
            if offset.cluster_id != self.options.cluster_id || offset.topic_id != topic_id {
                return Err(other_incarnation(group, offset, &self.options.cluster_id, &topic_id));
            }
            let books = match Books::from_metadata(&offset.books) {
                Ok(books) => BooksFound::Ours(books),
                Err(foreign) => BooksFound::Foreign(foreign.0),
            };
            positions.push(Position { next: offset.next, books });
        }
        Ok(positions)
    }

    /// Writes rows and moves offsets in one transaction whose first statement is the compare-and-swap.
    ///
    /// When the connection is lost during COMMIT nobody can say at once whether it happened. That is
    /// reported as [`Failure::Dependency`]; the retry then finds the offset either at `from` (it did not
    /// happen, and is done now) or elsewhere, which is [`Failure::Fenced`]: the loop reads the positions
    /// again and goes on from there, and nothing is written twice.
    fn write(&mut self, group: &str, rows: &Rows, advances: &[Advance]) -> Result<(), Failure> {
        if Sabotage::OffsetFirst.is_chosen() && !rows.is_empty() {
            self.write_in_one(group, &Rows::default(), advances)?;
            std::thread::sleep(SABOTAGE_PAUSE);
            let stay: Vec<_> = advances.iter().cloned().map(|a| Advance { from: a.to, ..a }).collect();
            return self.write_in_one(group, rows, &stay);
        }
        if Sabotage::SkipCompare.is_chosen() {
            let partitions: Vec<_> = advances.iter().map(|a| a.partition.clone()).collect();
            // It insists, so that a writer that came back late does not let go of its rows first.
            loop {
                let written = self.positions(group, &partitions).and_then(|found| {
                    let blind = advances.iter().cloned().zip(found);
                    let blind: Vec<_> = blind.map(|(a, found)| Advance { from: found.next, ..a }).collect();
                    self.write_in_one(group, rows, &blind)
                });
                match written {
                    Err(Failure::Fenced(_) | Failure::Dependency { .. }) => {
                        std::thread::sleep(SABOTAGE_PAUSE / 10)
                    }
                    written => return written,
                }
            }
        }
        self.write_in_one(group, rows, advances)
    }
}

impl SqlStore {
    fn write_in_one(&mut self, group: &str, rows: &Rows, advances: &[Advance]) -> Result<(), Failure> {
        if advances.is_empty() {
            if rows.is_empty() {
                return Ok(());
            }
            return Err(Failure::Stop {
                code: error::NO_OFFSET,
                message: format!("group `{group}` wrote {} rows without an offset", rows.len()),
            });
        }
        validate::validate(rows)?;
        let (moves, births) = self.steps(group, advances)?;
        let write = Write {
            group,
            cluster_id: &self.options.cluster_id,
            moves,
            births,
            readings: &rows.readings,
            sessions: &rows.sessions,
            alerts: fold_alerts(&rows.alerts),
            twins: fold_twins(&rows.twins),
        };
        match &mut self.backend {
            Backend::Postgres(b) => self.runtime.block_on(b.write(&write)),
            Backend::Sqlite(b) => self.runtime.block_on(b.write(&write)),
        }?;
        if !self.unborn.is_empty() {
            for advance in advances {
                self.unborn.remove(&(group.to_owned(), advance.partition.clone()));
            }
        }
        Ok(())
    }
}

/// The failure of a write that another writer was faster than.
pub(crate) fn fenced(write: &Write<'_>) -> Failure {
    let steps: Vec<_> = write
        .moves
        .iter()
        .chain(&write.births)
        .map(|s| format!("{}/{} from {} to {}", s.topic, s.partition, s.from, s.to))
        .collect();
    Failure::Fenced(format!(
        "the store's offsets of group `{}` are not where this writer left them ({})",
        write.group,
        steps.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_and_the_wait_for_a_lock_are_bounded_by_default() {
        let call = StoreOptions::default().call_timeout;
        assert_eq!((call, call / 3), (Duration::from_secs(30), Duration::from_secs(10)));
    }
}
