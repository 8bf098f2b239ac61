//! The tables of a decide stage: compacted topics that every member reads whole before any input and then
//! follows.

use crate::clock::elapsed;
use crate::ports::{Failure, SchemaSource, TableReader};
use crate::schemas::Schemas;
use crate::signals::Signals;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use throughline_model::outcome::Outcome;
use throughline_model::record::Batch;
use throughline_model::stage::{Decide, Input};
use throughline_model::time::Timestamp;

/// How often the tables are asked for changes; a rule applied takes effect within this time.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// How far the tables were read.
#[derive(Default)]
pub(crate) struct Tables {
    complete: bool,
    followed_at: Option<Timestamp>,
    /// Batches behind one whose schema is not resolved yet, in order.
    backlog: VecDeque<Batch>,
    /// The next offset of each partition after what the stage has taken, for the status page.
    taken: BTreeMap<String, i64>,
}

impl Tables {
    /// Says whether the tables were read to the end they had when the stage began.
    pub(crate) fn are_complete(&self) -> bool {
        self.complete
    }

    /// Passes what is new in the tables to the stage, at most every 100 ms.
    ///
    /// # Errors
    /// [`Failure::Dependency`]; the next call may pass again what this one passed.
    pub(crate) fn follow<D: Decide, R: TableReader, Q: SchemaSource>(
        &mut self,
        stage: &mut D,
        reader: &mut R,
        schemas: &mut Schemas<Q>,
        signals: &Signals,
        now: Timestamp,
    ) -> Result<(), Failure> {
        let early = self.followed_at.is_some_and(|at| elapsed(at, now) < FOLLOW_INTERVAL);
        if self.complete && early && self.backlog.is_empty() {
            return Ok(());
        }
        // What waits for a schema comes first: whatever followed it would only pile up behind it.
        self.take_backlog(stage, schemas, signals, now)?;
        for topic in stage.spec().tables.clone() {
            reader.follow(topic, &mut |batch| {
                if self.backlog.is_empty() && schemas.are_known(batch) {
                    apply(stage, batch, schemas, signals);
                    note_taken(&mut self.taken, batch, signals);
                } else {
                    self.backlog.push_back(batch.clone());
                }
            })?;
        }
        self.followed_at = Some(now);
        self.take_backlog(stage, schemas, signals, now)?;
        self.complete = true;
        Ok(())
    }

    fn take_backlog<D: Decide, Q: SchemaSource>(
        &mut self,
        stage: &mut D,
        schemas: &mut Schemas<Q>,
        signals: &Signals,
        now: Timestamp,
    ) -> Result<(), Failure> {
        while let Some(batch) = self.backlog.front() {
            schemas.resolve(batch, false, now)?;
            apply(stage, batch, schemas, signals);
            note_taken(&mut self.taken, batch, signals);
            self.backlog.pop_front();
        }
        Ok(())
    }
}

/// Says in the status how far the tables are in force here, so that whoever changed one can wait for it.
fn note_taken(taken: &mut BTreeMap<String, i64>, batch: &Batch, signals: &Signals) {
    if let Some(last) = batch.iter().last() {
        taken.insert(batch.source.to_string(), last.offset + 1);
        signals.tables(taken);
    }
}

/// Hands a batch over. A record that the stage cannot take is logged and counted, not dead-lettered: every
/// member reads it again at every start, and the record stays where it is.
fn apply<D: Decide, Q: SchemaSource>(stage: &mut D, batch: &Batch, schemas: &Schemas<Q>, signals: &Signals) {
    for record in batch.iter() {
        let input = Input {
            topic: &batch.source.topic,
            replayed: false,
            partition: batch.source.partition,
            record,
            codec: schemas.codec(),
        };
        let settled = stage.table(&input);
        signals.table_record(&batch.source.topic, settled.outcome, &settled.reason);
        if settled.outcome == Outcome::DeadLettered {
            tracing::error!(
                stage = stage.spec().group,
                partition = %batch.source,
                offset = record.offset,
                code = &*settled.reason,
                "a record of a table was not taken: {}",
                settled.message.as_deref().unwrap_or_default()
            );
        }
    }
}
