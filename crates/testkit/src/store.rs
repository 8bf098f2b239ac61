//! A store in memory with compare-and-swap positions.

use crate::faults::{Faults, Point};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_model::rows::{AlertRow, ReadingRow, Rows, SessionRow, TwinRow};
use throughline_runtime::ports::{Advance, BooksFound, Failure, Position, Store};

/// What the store holds.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "the fields are the store's tables")]
pub struct StoredRows {
    pub readings: Vec<ReadingRow>,
    pub alerts: BTreeMap<String, AlertRow>,
    pub sessions: Vec<SessionRow>,
    pub twins: BTreeMap<(String, String), TwinRow>,
    /// Writes that were committed.
    pub writes: usize,
}

type Refuses = Box<dyn Fn(&ReadingRow) -> bool + Send>;

#[derive(Default)]
struct Inner {
    rows: StoredRows,
    positions: BTreeMap<(String, TopicPartition), (i64, Books)>,
    refuses: Option<Refuses>,
}

/// The store, shared by its clones.
#[derive(Clone)]
pub struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
    faults: Faults,
}

impl MemoryStore {
    /// Makes an empty store with the faults of a script.
    pub fn new(faults: &Faults) -> Self {
        Self { inner: Arc::default(), faults: faults.clone() }
    }

    /// Refuses a write with `sqlstate_22003` where `refuses` says so of one of its readings.
    pub fn refuse(&self, refuses: impl Fn(&ReadingRow) -> bool + Send + 'static) {
        self.inner.lock().refuses = Some(Box::new(refuses));
    }

    /// Returns what the store holds.
    pub fn rows(&self) -> StoredRows {
        self.inner.lock().rows.clone()
    }

    /// Returns a position with its books.
    pub fn position(&self, group: &str, partition: &TopicPartition) -> Option<(i64, Books)> {
        self.inner.lock().positions.get(&(group.to_owned(), partition.clone())).cloned()
    }

    /// Makes a store that holds what this one does now, as a backup is.
    pub fn backup(&self) -> Self {
        let inner = self.inner.lock();
        let (rows, positions) = (inner.rows.clone(), inner.positions.clone());
        Self {
            inner: Arc::new(Mutex::new(Inner { rows, positions, refuses: None })),
            faults: self.faults.clone(),
        }
    }

    /// Moves a position as another writer does.
    pub fn steal(&self, group: &str, partition: &TopicPartition, to: i64) {
        let mut inner = self.inner.lock();
        let held = inner.positions.entry((group.to_owned(), partition.clone())).or_default();
        held.0 = to;
        held.1 = Books::open("stolen");
    }
}

impl Store for MemoryStore {
    fn positions(&mut self, group: &str, partitions: &[TopicPartition]) -> Result<Vec<Position>, Failure> {
        self.faults.pass(Point::StorePositions)?;
        let inner = self.inner.lock();
        let position = |p: &TopicPartition| match inner.positions.get(&(group.to_owned(), p.clone())) {
            None => Position { next: -1, books: BooksFound::New },
            Some((next, books)) => Position { next: *next, books: BooksFound::Ours(books.clone()) },
        };
        Ok(partitions.iter().map(position).collect())
    }

    fn write(&mut self, group: &str, rows: &Rows, advances: &[Advance]) -> Result<(), Failure> {
        self.faults.pass(Point::StoreBefore)?;
        {
            let mut inner = self.inner.lock();
            for advance in advances {
                let key = (group.to_owned(), advance.partition.clone());
                let at = inner.positions.get(&key).map_or(-1, |(next, _)| *next);
                if at != advance.from {
                    let why = format!("{} is at {at}, not at {}", advance.partition, advance.from);
                    return Err(Failure::Fenced(why));
                }
            }
            let refused = |row| inner.refuses.as_ref().is_some_and(|refuses| refuses(row));
            if rows.readings.iter().any(refused) {
                let message = "a number is out of range".to_owned();
                return Err(Failure::Data { code: "sqlstate_22003".to_owned(), message });
            }
            for advance in advances {
                let key = (group.to_owned(), advance.partition.clone());
                inner.positions.insert(key, (advance.to, advance.books.clone()));
            }
            let stored = &mut inner.rows;
            stored.readings.extend(rows.readings.iter().cloned());
            stored.sessions.extend(rows.sessions.iter().cloned());
            stored.alerts.extend(rows.alerts.iter().map(|row| (row.alert_id.clone(), row.clone())));
            let twins = rows.twins.iter();
            stored.twins.extend(twins.map(|t| ((t.site_id.clone(), t.device_id.clone()), t.clone())));
            stored.writes += 1;
        }
        self.faults.pass(Point::StoreAfter)
    }
}
