//! Resolves schema ids before a stage sees a record.

use crate::clock::{Backoff, elapsed};
use crate::config::LoopConfig;
use crate::ports::{Failure, SchemaSource};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::codec::{Codec, framed_id};
use throughline_model::record::Batch;
use throughline_model::time::Timestamp;

/// Garbage that happens to begin like a framed value names ids that do not exist. This many are
/// remembered; then the memory is cleared, which costs one question each to learn them again.
const ABSENT_MAX: usize = 4_096;

/// How long the registry must go on saying that an id does not exist until that is the data's fault. A
/// registry that has just started, or a replica that lags, says so of every id for a moment; a whole topic
/// would be dead-lettered for it. Meanwhile the partition waits as for a dependency.
const ABSENT_AFTER: Duration = Duration::from_secs(5);

/// How long an absent id is believed to be absent without asking: a schema may be registered late. Replays do
/// not rely on it: whoever asks for one has just mended the cause.
const ABSENT_FOR: Duration = Duration::from_secs(10);

/// The ids that the codec knows, those that the registry says do not exist, and the way to ask.
pub(crate) struct Schemas<Q> {
    source: Q,
    codec: Arc<Codec>,
    absent: HashMap<u32, Absence>,
    /// When the registry may be asked again after it could not be, or said that an id does not exist.
    pub(crate) backoff: Backoff,
}

/// What the registry said of an id that it does not know.
struct Absence {
    /// When it first said so.
    since: Timestamp,
    /// When it last said so.
    asked: Timestamp,
}

impl Absence {
    fn is_certain(&self) -> bool {
        elapsed(self.since, self.asked) >= ABSENT_AFTER
    }
}

impl<Q: SchemaSource> Schemas<Q> {
    pub(crate) fn new(source: Q, codec: Arc<Codec>, config: &LoopConfig) -> Self {
        let backoff = Backoff::new(config.retry_least, config.retry_most);
        Self { source, codec, absent: HashMap::new(), backoff }
    }

    /// Returns the codec.
    pub(crate) fn codec(&self) -> &Arc<Codec> {
        &self.codec
    }

    /// Says whether every schema id in `batch` is resolved. One that does not exist never is: whether that
    /// is still so only [`Schemas::resolve`] knows.
    pub(crate) fn are_known(&self, batch: &Batch) -> bool {
        ids(batch).all(|id| self.codec.knows(id))
    }

    /// Resolves every schema id in `batch`. An id of which the registry has said for 5 s that it does not
    /// exist, or whose schema is not Avro, is the data's fault: the stage will fail to decode the record
    /// and settle it so. For `replayed` records the registry is asked anew.
    ///
    /// # Errors
    /// [`Failure::Dependency`] while the registry cannot be asked, or until it is certain that an id does
    /// not exist; [`Schemas::backoff`] says when to try again.
    pub(crate) fn resolve(&mut self, batch: &Batch, replayed: bool, now: Timestamp) -> Result<(), Failure> {
        let mut uncertain = None;
        for id in ids(batch) {
            if !self.codec.knows(id) && !self.is_absent(id, replayed, now)? {
                uncertain.get_or_insert(id);
            }
        }
        let Some(id) = uncertain else {
            self.backoff.succeeded();
            return Ok(());
        };
        self.backoff.failed(now);
        let message = format!("it does not know schema id {id}, which may pass: asking again");
        Err(Failure::Dependency { dependency: "registry", message })
    }

    /// Asks for an id unless that was done just now. Returns whether it certainly does not exist; `false`
    /// while that is not certain, and `true` as well once its schema was added: it needs no waiting for.
    fn is_absent(&mut self, id: u32, replayed: bool, now: Timestamp) -> Result<bool, Failure> {
        if let Some(absence) = self.absent.get(&id)
            && (absence.asked == now
                || (absence.is_certain() && !replayed && elapsed(absence.asked, now) < ABSENT_FOR))
        {
            return Ok(absence.is_certain());
        }
        let answer = self.source.fetch(id).inspect_err(|_| {
            // What a registry said before it went away says nothing about the one that comes back.
            self.absent.clear();
            self.backoff.failed(now);
        })?;
        let since = match answer.map(|text| self.codec.add(id, &text)) {
            Some(Ok(())) => {
                self.absent.remove(&id);
                return Ok(true);
            }
            Some(Err(e)) => {
                tracing::warn!(schema_id = id, "cannot use a schema of the registry: {e}");
                now.minus(ABSENT_AFTER)
            }
            None => self.absent.get(&id).map_or(now, |absence| absence.since),
        };
        if self.absent.len() >= ABSENT_MAX {
            self.absent.clear();
        }
        let absence = Absence { since, asked: now };
        let is_certain = absence.is_certain();
        self.absent.insert(id, absence);
        Ok(is_certain)
    }
}

/// Iterates over the schema ids of a batch. Neighbours mostly share theirs, which then comes once: the
/// codec's lock is taken where the id changes.
fn ids(batch: &Batch) -> impl Iterator<Item = u32> {
    let mut last = None;
    batch.iter().filter_map(move |record| {
        let id = record.value.and_then(|value| framed_id(value).ok())?;
        (last.replace(id) != Some(id)).then_some(id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use throughline_model::record::TopicPartition;

    const TEXT: &str = r#"{"type":"record","name":"R","fields":[]}"#;

    /// A registry that answers every question from a script, the last line for ever.
    struct Scripted {
        answers: Vec<Result<Option<&'static str>, ()>>,
        asked: usize,
    }

    impl SchemaSource for Scripted {
        fn fetch(&mut self, _: u32) -> Result<Option<String>, Failure> {
            let answer = self.answers[self.asked.min(self.answers.len() - 1)];
            self.asked += 1;
            let away = |()| Failure::Dependency { dependency: "registry", message: "away".to_owned() };
            answer.map(|text| text.map(str::to_owned)).map_err(away)
        }
    }

    fn schemas(answers: &[Result<Option<&'static str>, ()>]) -> Schemas<Scripted> {
        let source = Scripted { answers: answers.to_vec(), asked: 0 };
        Schemas::new(source, Arc::new(Codec::default()), &LoopConfig::default())
    }

    fn batch(ids: &[u8]) -> Batch {
        let mut batch = Batch::new(TopicPartition::new("t", 0));
        for (offset, id) in (0..).zip(ids) {
            batch.push(offset, Timestamp(0), None, Some(&[0, 0, 0, 0, *id]), []);
        }
        batch
    }

    /// Resolves as the loops do, when the back-off says so; returns after how many milliseconds it was
    /// done.
    fn resolved_after(schemas: &mut Schemas<Scripted>, batch: &Batch, from_ms: i64) -> i64 {
        for ms in (from_ms..from_ms + 600_000).step_by(10) {
            let now = Timestamp::from_millis(ms);
            if schemas.backoff.is_due(now) && schemas.resolve(batch, false, now).is_ok() {
                return ms - from_ms;
            }
        }
        panic!("it is not resolved within ten minutes");
    }

    #[test]
    fn an_id_that_is_absent_for_a_moment_is_not_the_datas_fault() {
        let mut schemas = schemas(&[Ok(None), Ok(None), Ok(Some(TEXT))]);
        let waited = resolved_after(&mut schemas, &batch(&[7]), 0);
        assert!(waited < 1_000 && schemas.codec().knows(7), "{waited} ms");
        assert!(schemas.absent.is_empty() && schemas.are_known(&batch(&[7])));
    }

    #[test]
    fn an_id_that_stays_absent_is_certain_after_five_seconds_and_asked_for_again_after_ten() {
        let mut schemas = schemas(&[Ok(None)]);
        let waited = resolved_after(&mut schemas, &batch(&[7, 8, 7]), 0);
        assert!((5_000..15_000).contains(&waited), "all ids of a batch wait together: {waited} ms");
        let asked = schemas.source.asked;
        assert!(asked <= 20, "asked {asked} times, with back-off");
        assert_eq!(resolved_after(&mut schemas, &batch(&[7]), waited + 9_990), 0);
        assert_eq!(schemas.source.asked, asked, "it is remembered");
        assert_eq!(resolved_after(&mut schemas, &batch(&[7]), waited + 10_000), 0, "no waiting again");
        assert_eq!(schemas.source.asked, asked + 1);
        schemas.source.answers = vec![Ok(Some(TEXT))];
        assert_eq!(resolved_after(&mut schemas, &batch(&[7]), waited + 30_000), 0);
        assert!(schemas.codec().knows(7), "it was registered late");
        assert!(!schemas.are_known(&batch(&[8])), "only asking says whether that is still so");
    }

    #[test]
    fn a_replay_asks_anew_for_an_id_that_was_absent_just_now() {
        let mut schemas = schemas(&[Ok(None)]);
        let waited = resolved_after(&mut schemas, &batch(&[7]), 0);
        schemas.source.answers = vec![Ok(Some(TEXT))];
        let soon = Timestamp::from_millis(waited + 10);
        assert!(schemas.resolve(&batch(&[7]), false, soon).is_ok());
        assert!(!schemas.codec().knows(7), "it is believed to be absent");
        assert!(schemas.resolve(&batch(&[7]), true, soon).is_ok());
        assert!(schemas.codec().knows(7), "the replay found it registered");
    }

    #[test]
    fn what_was_said_before_an_outage_does_not_count() {
        let mut schemas =
            schemas(&[Ok(None), Err(()), Err(()), Err(()), Err(()), Err(()), Err(()), Ok(None)]);
        let waited = resolved_after(&mut schemas, &batch(&[7]), 0);
        assert!(waited >= 6_300 + 5_000, "{waited} ms");
    }

    #[test]
    fn ids_that_do_not_exist_are_remembered_up_to_the_bound() {
        let mut schemas = schemas(&[Ok(None)]);
        for id in 0..2 * ABSENT_MAX as u32 {
            let certain = schemas.is_absent(id, false, Timestamp(0));
            assert!(!certain.expect("the registry answers"));
            assert!(schemas.absent.len() <= ABSENT_MAX);
        }
        assert_eq!(schemas.source.asked, 2 * ABSENT_MAX);
    }

    #[test]
    fn a_schema_that_is_not_avro_is_the_datas_fault_at_once() {
        let mut schemas = schemas(&[Ok(Some("{}"))]);
        assert_eq!(resolved_after(&mut schemas, &batch(&[7]), 0), 0);
        assert!(!schemas.codec().knows(7));
    }
}
