//! What a member asks about positions: those committed, and the bounds of its partitions.

use super::GroupSource;
use crate::bounds::{is_stale, list_offsets};
use crate::bystander;
use crate::config::{REQUEST_TIMEOUT, STABLE_TIMEOUT};
use crate::failure::{by_code, dependency, failure, ffi_failure};
use crate::message::bare_list;
use crate::stall::LOOK_WITHIN;
use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_kafka_ffi::{Entry, OffsetSpec, entries};
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_runtime::ports::{BooksFound, Failure, PipelineEvent, Position};

/// After this many questions in a row without an answer of use, and one more, the client is made anew: its
/// connection to the coordinator, or its idea of the leaders, may be lost for good.
const UNANSWERED_MAX: u32 = 2;

/// How often in a row Kafka gave no answer of use, by question: some may be answered while others are not.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    committed: u32,
    bounds: u32,
    ends: u32,
}

impl GroupSource {
    pub(super) fn ask_committed(&mut self, partitions: &[TopicPartition]) -> Result<Vec<Position>, Failure> {
        let consumer = Arc::clone(self.consumer()?);
        let deadline = Instant::now() + STABLE_TIMEOUT;
        let what = format!("cannot read the committed offsets of group `{}`", self.group);
        loop {
            let asked = consumer.committed_offsets(bare_list(partitions), REQUEST_TIMEOUT);
            let found = asked.map(|l| entries(&l));
            let unstable = Some(RDKafkaErrorCode::UnstableOffsetCommit);
            let wait = match &found {
                Ok(entries) => entries.iter().any(|e| e.error == unstable),
                Err(error) => error.rdkafka_error_code() == unstable,
            };
            if wait && Instant::now() < deadline {
                // An open transaction holds the offsets; it ends within its time-out.
                self.serve();
                self.wake.wait(Duration::from_millis(20));
                self.wake.reset();
                continue;
            }
            let entries = match found {
                Ok(entries) => entries,
                Err(error) => {
                    // The last handle would be closed by this thread.
                    drop(consumer);
                    return Err(self.not_committed(&what, &error));
                }
            };
            if let Some(code) = entries.iter().find_map(|e| e.error) {
                return Err(by_code(&what, code, &code.to_string()));
            }
            let position = |name: &TopicPartition| {
                let entry = entries.iter().find(|e| *e.topic == *name.topic && e.partition == name.partition);
                entry.map_or_else(|| position_of(-1, &[]), |e| position_of(e.offset, &e.metadata))
            };
            self.unanswered.committed = 0;
            return Ok(partitions.iter().map(position).collect());
        }
    }

    /// Sorts a failure to read committed offsets, and counts it.
    fn not_committed(&mut self, what: &str, error: &KafkaError) -> Failure {
        self.unanswered.committed += 1;
        if self.unanswered.committed > UNANSWERED_MAX {
            let answers = bystander::coordinator_answers(&self.config, &self.group);
            let why = format!("the group's coordinator does not serve this client: {error}");
            self.give_up_if(answers, &why);
        }
        match error.rdkafka_error_code() {
            // librdkafka itself asks again while they are unstable, and then says this.
            Some(RDKafkaErrorCode::OperationTimedOut) => dependency(format!(
                "{what}: no answer within {} s; where Kafka answers otherwise, a transaction that never ends \
                 holds them (KAFKA-20734 after a broker of Kafka 4.3.0 or 4.3.1 was killed)",
                REQUEST_TIMEOUT.as_secs()
            )),
            _ => failure(what, error),
        }
    }

    /// Returns the partitions with the position to begin at, −1 replaced by the earliest one.
    pub(super) fn resolved(
        &mut self,
        partitions: &[(TopicPartition, i64)],
    ) -> Result<Vec<(TopicPartition, i64)>, Failure> {
        let open = partitions.iter().filter(|(_, next)| *next < 0);
        let asked: Vec<(&str, i32)> = open.map(|(name, _)| (&*name.topic, name.partition)).collect();
        let what = "cannot ask for the bounds of the partitions to begin";
        let mut found = Vec::new();
        if !asked.is_empty() {
            let client = self.consumer()?.client();
            let answered = list_offsets(client, &asked, OffsetSpec::Earliest, false, REQUEST_TIMEOUT);
            found = answered.map_err(|e| ffi_failure(what, &e))?;
        }
        let mut begins = Vec::with_capacity(partitions.len());
        for (name, next) in partitions {
            let answer = found.iter().find(|e| *e.topic == *name.topic && e.partition == name.partition);
            let next = match answer {
                _ if *next >= 0 => *next,
                None => return Err(dependency(format!("{what}: no answer for {name}"))),
                Some(entry) => match entry.error {
                    Some(code) => {
                        if is_stale(code) {
                            self.unanswered.bounds += 1;
                            let why = format!("it does not find the leader of {name}: {code}");
                            self.give_up_after_many(self.unanswered.bounds, &asked, &why);
                        }
                        return Err(by_code(what, code, &format!("{name}: {code}")));
                    }
                    None => entry.offset,
                },
            };
            begins.push((name.clone(), next));
        }
        self.unanswered.bounds = 0;
        Ok(begins)
    }

    /// Compares what the partitions delivered with what they hold, and makes the consumer anew where one
    /// delivers nothing of it, or where the client finds no leaders, or no broker, to ask.
    pub(super) fn look_for_stalls(&mut self) {
        let delivering: Vec<_> =
            self.partitions.iter().filter(|p| p.delivers()).map(|p| (p.name.clone(), p.next)).collect();
        let found = match self.ends_of(&delivering) {
            Ok(found) => found,
            Err(_) if self.member.is_none() => return,
            Err(why) => {
                self.unanswered.ends += 1;
                let asked: Vec<_> = delivering.iter().map(|(p, _)| (&*p.topic, p.partition)).collect();
                return self.give_up_after_many(self.unanswered.ends, &asked, &why);
            }
        };
        self.unanswered.ends = 0;
        if std::mem::take(&mut self.away) {
            self.troubled = false;
            self.events.push_back(PipelineEvent::Available);
        }
        let ends = delivering.iter().filter_map(|(name, next)| {
            let of = |e: &&Entry| *e.topic == *name.topic && e.partition == name.partition;
            let end = found.iter().find(of).filter(|e| e.error.is_none())?.offset;
            Some((name.clone(), *next, end))
        });
        if let Some(name) = self.stalls.look(ends) {
            self.give_up(&format!("{name} delivers nothing of what it holds: the client lost its leader"));
        }
    }

    /// Asks for the ends of partitions; a member without any asks whether a broker answers.
    fn ends_of(&self, partitions: &[(TopicPartition, i64)]) -> Result<Vec<Entry>, String> {
        let consumer = self.consumer().map_err(|failure| failure.to_string())?;
        if partitions.is_empty() {
            let answered = consumer.fetch_metadata(self.topics.first().map(String::as_str), LOOK_WITHIN);
            return match answered {
                Ok(_) => Ok(Vec::new()),
                Err(error) => Err(format!("no broker answers it: {error}")),
            };
        }
        let asked: Vec<(&str, i32)> = partitions.iter().map(|(p, _)| (&*p.topic, p.partition)).collect();
        match list_offsets(consumer.client(), &asked, OffsetSpec::Latest, true, LOOK_WITHIN) {
            Ok(found) if found.iter().any(|e| e.error.is_some_and(is_stale)) => {
                Err("it does not find the leaders of its partitions".to_owned())
            }
            Ok(found) => Ok(found),
            Err(error) => Err(format!("its partitions do not answer: {}", error.message)),
        }
    }

    /// Makes the client anew where a question about partitions was not answered several times in a row, unless
    /// nobody gets an answer.
    fn give_up_after_many(&mut self, unanswered: u32, asked: &[(&str, i32)], why: &str) {
        if unanswered > UNANSWERED_MAX {
            let answers = bystander::partitions_answer(&self.config, asked);
            self.give_up_if(answers, why);
        }
    }

    /// Makes the client anew where Kafka `answers` others; else counting begins anew.
    fn give_up_if(&mut self, answers: bool, why: &str) {
        if answers {
            self.give_up(&format!("{why}, though Kafka answers others"));
        } else {
            self.unanswered = Unanswered::default();
        }
    }

    pub(super) fn earliest(&self, name: &TopicPartition) -> Result<i64, Failure> {
        self.end_of(name, OffsetSpec::Earliest)
    }

    pub(super) fn end_of(&self, name: &TopicPartition, spec: OffsetSpec) -> Result<i64, Failure> {
        let consumer = self.consumer()?;
        let asked = [(&*name.topic, name.partition)];
        let what = format!("cannot ask for the bounds of {name}");
        let found = list_offsets(consumer.client(), &asked, spec, false, REQUEST_TIMEOUT);
        let entry = found.map_err(|e| ffi_failure(&what, &e))?.into_iter().next();
        let entry = entry.ok_or_else(|| dependency(format!("{what}: no answer")))?;
        match entry.error {
            Some(code) => Err(by_code(&what, code, &code.to_string())),
            None => Ok(entry.offset),
        }
    }
}

fn position_of(offset: i64, metadata: &[u8]) -> Position {
    if offset < 0 {
        return Position { next: -1, books: BooksFound::New };
    }
    let text = String::from_utf8_lossy(metadata);
    let books = match Books::from_metadata(&text) {
        Ok(books) => BooksFound::Ours(books),
        Err(foreign) => BooksFound::Foreign(foreign.0),
    };
    Position { next: offset, books }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_metadata_is_ours_foreign_or_new() {
        let books = Books::open("v-1");
        assert_eq!(
            position_of(5, books.to_metadata().as_bytes()),
            Position { next: 5, books: BooksFound::Ours(books) }
        );
        for (offset, metadata, found) in [
            (-1001, b"".as_slice(), Position { next: -1, books: BooksFound::New }),
            (3, b"", Position { next: 3, books: BooksFound::Foreign(String::new()) }),
            (3, b"kcat", Position { next: 3, books: BooksFound::Foreign("kcat".to_owned()) }),
            (3, b"\xff", Position { next: 3, books: BooksFound::Foreign("\u{fffd}".to_owned()) }),
        ] {
            assert_eq!(position_of(offset, metadata), found, "{metadata:?}");
        }
    }
}
