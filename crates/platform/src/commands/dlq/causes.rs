//! Letters counted by cause, for `dlq list` and `dlq parking`.

use super::selector::{Fates, Found};
use std::collections::BTreeMap;
use throughline_model::dead_letter::{Fate, header, parse_letters};
use throughline_model::record::Record;
use throughline_model::time::Timestamp;

/// Causes that are told apart. Codes, schema ids and rules come from bytes that anybody may have written, so there
/// may be as many as letters; nobody reads more than this, and it is some 100 MiB at most.
pub const CAUSES_MAX: usize = 10_000;
/// Bytes that are kept of a text.
const TEXT_BYTES_MAX: usize = 1_024;

/// What letters are grouped by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cause {
    /// The topic of the letters.
    pub topic: String,
    /// The stage that refused them.
    pub stage: String,
    /// Why.
    pub code: String,
    /// The schema that their values are framed with.
    pub schema_id: Option<u32>,
    /// The rule that made the record, with its version.
    pub rule: Option<String>,
}

/// The letters of one cause.
pub struct Group {
    /// How many there are, by what was decided about them.
    pub fates: Fates,
    /// Time of the oldest.
    pub first: Timestamp,
    /// Time of the newest.
    pub last: Timestamp,
    /// The newest open letter, or the newest.
    pub example: String,
    example_is_open: bool,
    /// What was wrong with it.
    pub message: String,
}

/// Counts of letters by cause.
#[derive(Default)]
pub struct Causes {
    /// At most [`CAUSES_MAX`] of them, those met first.
    pub groups: BTreeMap<Cause, Group>,
    /// Letters of further causes.
    pub letters_left_out: u64,
}

impl Causes {
    /// Counts a letter.
    pub fn count(&mut self, found: &Found<'_>) {
        let cause = cause(found);
        if self.groups.len() >= CAUSES_MAX && !self.groups.contains_key(&cause) {
            self.letters_left_out += 1;
            return;
        }
        let time = found.record.time;
        let group = self.groups.entry(cause).or_insert_with(|| Group {
            fates: Fates::default(),
            first: time,
            last: time,
            example: String::new(),
            example_is_open: false,
            message: String::new(),
        });
        group.fates.count(found.fate);
        group.first = group.first.min(time);
        group.last = group.last.max(time);
        let is_open = found.fate == Fate::Open;
        if is_open || !group.example_is_open {
            group.example = format!("{}/{}", found.letter.partition, found.letter.offset);
            group.example_is_open = is_open;
            group.message = beginning(&found.record, header::MESSAGE);
        }
    }
}

/// Returns the cause of a letter.
pub fn cause(found: &Found<'_>) -> Cause {
    let stated = beginning(&found.record, header::STAGE);
    let owner = parse_letters(found.topic).map(|(_, group)| group.to_owned()).unwrap_or_default();
    Cause {
        topic: found.topic.to_owned(),
        stage: if stated.is_empty() { owner } else { stated },
        code: beginning(&found.record, header::CODE),
        schema_id: found.letter.schema_id,
        rule: Some(beginning(&found.record, header::RULE)).filter(|rule| !rule.is_empty()),
    }
}

/// Returns the beginning of a header as text, empty where it is missing.
fn beginning(record: &Record<'_>, header: &str) -> String {
    let bytes = record.headers.last(header).unwrap_or_default();
    String::from_utf8_lossy(&bytes[..bytes.len().min(TEXT_BYTES_MAX)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use throughline_model::dead_letter::Letter;
    use throughline_model::record::{Batch, TopicPartition};

    const TOPIC: &str = "device.telemetry.v1.bridge-dlt";

    fn count(causes: &mut Causes, offset: i64, code: &str, fate: Fate) {
        let mut batch = Batch::new(TopicPartition::new(TOPIC, 0));
        batch.push(offset, Timestamp(offset), None, Some(b"x"), [(header::CODE, code.as_bytes())]);
        let record = batch.get(0);
        let letter = Letter::of(0, &record);
        causes.count(&Found { topic: TOPIC, letter, record, fate, request: None });
    }

    #[test]
    fn causes_are_bounded_in_number_and_size_and_what_is_left_out_is_counted() {
        let mut causes = Causes::default();
        let more = 5;
        for number in 0..CAUSES_MAX + more {
            count(&mut causes, number as i64, &format!("code_{number}"), Fate::Open);
        }
        count(&mut causes, 20_000, "code_0", Fate::Dropped);
        assert_eq!((causes.groups.len(), causes.letters_left_out), (CAUSES_MAX, more as u64));
        let first = causes.groups.iter().find(|(cause, _)| cause.code == "code_0").expect("it came first").1;
        assert_eq!(
            (first.fates.of(Fate::Open), first.fates.of(Fate::Dropped)),
            (1, 1),
            "it goes on counting"
        );
        assert_eq!((first.last, first.example.as_str()), (Timestamp(20_000), "0/0"), "the open one");

        let mut causes = Causes::default();
        count(&mut causes, 0, &"x".repeat(100_000), Fate::Open);
        assert_eq!(causes.groups.keys().next().expect("one").code.len(), TEXT_BYTES_MAX);
    }
}
