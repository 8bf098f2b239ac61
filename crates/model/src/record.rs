//! Batches of Kafka records: one allocation a batch, none a record.

use crate::time::Timestamp;
use std::fmt;
use std::sync::Arc;

/// One partition of one topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPartition {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition's number, from 0.
    pub partition: i32,
}

impl TopicPartition {
    /// Names a partition.
    pub fn new(topic: impl Into<Arc<str>>, partition: i32) -> Self {
        Self { topic: topic.into(), partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u32,
    len: u32,
}

const ABSENT: Span = Span { start: u32::MAX, len: 0 };

#[derive(Clone, Copy, Debug)]
struct Entry {
    offset: i64,
    time: Timestamp,
    key: Span,
    value: Span,
    headers: Span,
}

/// Records of one partition in offset order, their bytes in one buffer.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Where the records come from.
    pub source: TopicPartition,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Batch {
    /// Makes an empty batch of `source`.
    pub fn new(source: TopicPartition) -> Self {
        Self { source, bytes: Vec::new(), entries: Vec::new() }
    }

    /// Appends a record. Offsets must rise; `time` is the broker's LogAppendTime.
    pub fn push<'h>(
        &mut self,
        offset: i64,
        time: Timestamp,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) {
        debug_assert!(self.entries.last().is_none_or(|last| last.offset < offset), "offsets rise");
        let key = append(&mut self.bytes, key);
        let value = append(&mut self.bytes, value);
        let headers = append_headers(&mut self.bytes, headers);
        self.entries.push(Entry { offset, time, key, value, headers });
    }

    /// Returns the number of records.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Says whether there is no record.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the bytes held, for bounds on memory.
    pub fn bytes_held(&self) -> usize {
        self.bytes.len() + self.entries.len() * size_of::<Entry>()
    }

    /// Returns the record at `index`.
    ///
    /// # Panics
    /// When `index` is not below [`Batch::len`].
    pub fn get(&self, index: usize) -> Record<'_> {
        let e = self.entries[index];
        Record {
            offset: e.offset,
            time: e.time,
            key: slice(&self.bytes, e.key),
            value: slice(&self.bytes, e.value),
            headers: Headers(slice(&self.bytes, e.headers).unwrap_or_default()),
        }
    }

    /// Iterates over the records in offset order.
    pub fn iter(&self) -> impl Iterator<Item = Record<'_>> {
        (0..self.len()).map(|i| self.get(i))
    }
}

/// One record, borrowed from its batch.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Its position in the partition.
    pub offset: i64,
    /// The broker's LogAppendTime.
    pub time: Timestamp,
    /// The key's bytes.
    pub key: Option<&'a [u8]>,
    /// The value's bytes; `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    /// The headers in the order they were written.
    pub headers: Headers<'a>,
}

impl<'a> Record<'a> {
    /// Returns the key as text, or `None` where it is absent or not UTF-8.
    pub fn key_str(&self) -> Option<&'a str> {
        self.key.and_then(|k| std::str::from_utf8(k).ok())
    }
}

/// Headers of a record: pairs of name and value; a name may repeat.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers<'a>(&'a [u8]);

impl<'a> Headers<'a> {
    /// Iterates over the pairs in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let name = take(&mut rest)?;
            let value = take(&mut rest)?;
            Some((std::str::from_utf8(name).unwrap_or_default(), value))
        })
    }

    /// Returns the last value under `name`, as Kafka's `lastHeader`.
    pub fn last(&self, name: &str) -> Option<&'a [u8]> {
        self.iter().filter(|(n, _)| *n == name).last().map(|(_, v)| v)
    }
}

/// Records to be written, in order, their bytes in one buffer that is reused.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    entries: Vec<(Arc<str>, Option<i32>, Entry)>,
}

/// One record to be written.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The topic's name.
    pub topic: &'a str,
    /// A fixed partition, or `None` to partition by key (`murmur2_random`, as Java clients).
    pub partition: Option<i32>,
    /// The key's bytes.
    pub key: Option<&'a [u8]>,
    /// The value's bytes; `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    /// Headers.
    pub headers: Headers<'a>,
}

impl Outbox {
    /// Appends a record.
    pub fn push<'h>(
        &mut self,
        topic: &Arc<str>,
        partition: Option<i32>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) {
        self.push_with(topic, partition, key, headers, |bytes| match value {
            Some(v) => {
                bytes.extend_from_slice(v);
                Ok::<bool, std::convert::Infallible>(true)
            }
            None => Ok(false),
        })
        .unwrap_or_else(|never| match never {});
    }

    /// Appends a record whose value `write` puts straight into the buffer; `write` returns whether there
    /// is a value at all (`false` makes a tombstone). On an error nothing is appended.
    ///
    /// # Errors
    /// What `write` returned.
    pub fn push_with<'h, E>(
        &mut self,
        topic: &Arc<str>,
        partition: Option<i32>,
        key: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
        write: impl FnOnce(&mut Vec<u8>) -> Result<bool, E>,
    ) -> Result<(), E> {
        let before = self.bytes.len();
        let key = append(&mut self.bytes, key);
        let start = self.bytes.len();
        let value = match write(&mut self.bytes) {
            Ok(true) => span(start, self.bytes.len() - start),
            Ok(false) => ABSENT,
            Err(e) => {
                self.bytes.truncate(before);
                return Err(e);
            }
        };
        let headers = append_headers(&mut self.bytes, headers);
        let entry = Entry { offset: 0, time: Timestamp(0), key, value, headers };
        self.entries.push((Arc::clone(topic), partition, entry));
        Ok(())
    }

    /// Returns the number of records.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Says whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the bytes held.
    pub fn bytes_held(&self) -> usize {
        self.bytes.len()
    }

    /// Takes records out: those for whose index `keep` says no. Their bytes stay until [`Outbox::clear`].
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let mut index = 0;
        self.entries.retain(|_| {
            index += 1;
            keep(index - 1)
        });
    }

    /// Forgets the records and keeps the buffers.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
    }

    /// Returns the record at `index`.
    ///
    /// # Panics
    /// When `index` is not below [`Outbox::len`].
    pub fn get(&self, index: usize) -> Outgoing<'_> {
        let (topic, partition, e) = &self.entries[index];
        Outgoing {
            topic,
            partition: *partition,
            key: slice(&self.bytes, e.key),
            value: slice(&self.bytes, e.value),
            headers: Headers(slice(&self.bytes, e.headers).unwrap_or_default()),
        }
    }

    /// Iterates over the records in the order they were pushed.
    pub fn iter(&self) -> impl Iterator<Item = Outgoing<'_>> {
        (0..self.len()).map(|i| self.get(i))
    }
}

fn span(start: usize, len: usize) -> Span {
    let narrow = |n: usize| u32::try_from(n).expect("a batch stays far below 4 GiB by its byte bound");
    Span { start: narrow(start), len: narrow(len) }
}

fn append(bytes: &mut Vec<u8>, part: Option<&[u8]>) -> Span {
    let Some(part) = part else { return ABSENT };
    let start = bytes.len();
    bytes.extend_from_slice(part);
    span(start, part.len())
}

fn append_headers<'h>(bytes: &mut Vec<u8>, headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> Span {
    let start = bytes.len();
    for (name, value) in headers {
        for part in [name.as_bytes(), value] {
            bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
            bytes.extend_from_slice(part);
        }
    }
    if bytes.len() == start { ABSENT } else { span(start, bytes.len() - start) }
}

fn slice(bytes: &[u8], s: Span) -> Option<&[u8]> {
    (s.start != u32::MAX).then(|| &bytes[s.start as usize..(s.start + s.len) as usize])
}

fn take<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, tail) = rest.split_first_chunk::<4>()?;
    let (part, tail) = tail.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    *rest = tail;
    Some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gives_back_what_was_pushed() {
        let mut batch = Batch::new(TopicPartition::new("t", 3));
        batch.push(7, Timestamp(1), Some(b"k"), None, [("a", b"1".as_slice()), ("a", b"2")]);
        batch.push(9, Timestamp(2), None, Some(b""), []);
        let first = batch.get(0);
        assert_eq!((first.offset, first.key, first.value), (7, Some(b"k".as_slice()), None));
        assert_eq!(first.headers.last("a"), Some(b"2".as_slice()));
        let second = batch.get(1);
        assert_eq!(
            (second.key, second.value, second.headers.iter().count()),
            (None, Some(b"".as_slice()), 0)
        );
    }

    #[test]
    fn a_failed_write_leaves_the_outbox_as_it_was() {
        let topic: Arc<str> = "t".into();
        let mut outbox = Outbox::default();
        outbox.push(&topic, None, Some(b"k"), Some(b"v"), []);
        let held = outbox.bytes_held();
        assert_eq!(outbox.push_with(&topic, None, Some(b"x"), [], |_| Err("no")), Err("no"));
        assert_eq!((outbox.len(), outbox.bytes_held()), (1, held));
        assert_eq!(outbox.get(0).value, Some(b"v".as_slice()));
    }
}
