//! Resolves schema ids before a stage sees a record.

use crate::clock::Backoff;
use crate::config::LoopConfig;
use crate::ports::{Failure, SchemaSource};
use std::collections::HashSet;
use std::sync::Arc;
use throughline_model::codec::{Codec, framed_id};
use throughline_model::record::Batch;
use throughline_model::time::Timestamp;

/// Garbage that happens to begin like a framed value names ids that do not exist. This many are
/// remembered; then the memory is cleared, which costs one question each to learn them again.
const ABSENT_MAX: usize = 4_096;

/// The ids that the codec knows, those that the registry says do not exist, and the way to ask.
pub(crate) struct Schemas<Q> {
    source: Q,
    codec: Arc<Codec>,
    absent: HashSet<u32>,
    /// When the registry may be asked again after it could not be.
    pub(crate) backoff: Backoff,
}

impl<Q: SchemaSource> Schemas<Q> {
    pub(crate) fn new(source: Q, codec: Arc<Codec>, config: &LoopConfig) -> Self {
        let backoff = Backoff::new(config.retry_least, config.retry_most);
        Self { source, codec, absent: HashSet::new(), backoff }
    }

    /// Returns the codec.
    pub(crate) fn codec(&self) -> &Arc<Codec> {
        &self.codec
    }

    /// Says whether every schema id in `batch` is resolved or known not to exist.
    pub(crate) fn are_known(&self, batch: &Batch) -> bool {
        self.first_unknown(batch, 0).is_none()
    }

    /// Resolves every schema id in `batch`. An id that the registry does not know, or whose schema is not
    /// Avro, is the data's fault: the stage will fail to decode the record and settle it so.
    ///
    /// # Errors
    /// [`Failure::Dependency`] while the registry cannot be asked; [`Schemas::backoff`] says when to try
    /// again.
    pub(crate) fn resolve(&mut self, batch: &Batch, now: Timestamp) -> Result<(), Failure> {
        let mut from = 0;
        while let Some((index, id)) = self.first_unknown(batch, from) {
            from = index;
            let answer = self.source.fetch(id).inspect_err(|_| self.backoff.failed(now))?;
            self.backoff.succeeded();
            let added = answer.map(|text| self.codec.add(id, &text));
            if let Some(Err(e)) = &added {
                tracing::warn!(schema_id = id, "cannot use a schema of the registry: {e}");
            }
            if !matches!(added, Some(Ok(()))) {
                if self.absent.len() == ABSENT_MAX {
                    self.absent.clear();
                }
                self.absent.insert(id);
            }
        }
        Ok(())
    }

    fn first_unknown(&self, batch: &Batch, from: usize) -> Option<(usize, u32)> {
        let mut last = None;
        for index in from..batch.len() {
            let Some(id) = batch.get(index).value.and_then(|v| framed_id(v).ok()) else { continue };
            // Neighbours mostly share their schema: the codec's lock is taken where the id changes.
            if last == Some(id) {
                continue;
            }
            if !self.codec.knows(id) && !self.absent.contains(&id) {
                return Some((index, id));
            }
            last = Some(id);
        }
        None
    }
}
