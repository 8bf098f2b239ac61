//! PostgreSQL's binary COPY format, for the types that the tables have.
//!
//! The format is that of the manual, page COPY, section "Binary Format": a signature, tuples of
//! length-prefixed fields in the types' send format, a trailer. Numbers are big-endian.

use throughline_model::rows::{ReadingRow, SessionRow};
use throughline_model::time::Timestamp;
use uuid::Uuid;

/// Signature, flags, and length of the header extension.
const HEADER: &[u8; 19] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const TRAILER: [u8; 2] = (-1_i16).to_be_bytes();
/// Microseconds from 1970-01-01 to 2000-01-01, where PostgreSQL's clock begins.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// A buffer of tuples, reused from chunk to chunk.
#[derive(Debug, Default)]
pub(crate) struct CopyBuffer {
    bytes: Vec<u8>,
}

impl CopyBuffer {
    /// Begins a stream.
    pub(crate) fn begin(&mut self) {
        self.bytes.clear();
        self.bytes.extend_from_slice(HEADER);
    }

    /// Ends a stream.
    pub(crate) fn end(&mut self) {
        self.bytes.extend_from_slice(&TRAILER);
    }

    /// Returns what is to be sent.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets what was sent and keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
    }

    fn tuple(&mut self, fields: i16) {
        self.bytes.extend_from_slice(&fields.to_be_bytes());
    }

    fn field<const N: usize>(&mut self, value: [u8; N]) {
        self.bytes.extend_from_slice(&(N as i32).to_be_bytes());
        self.bytes.extend_from_slice(&value);
    }

    fn null(&mut self) {
        self.bytes.extend_from_slice(&(-1_i32).to_be_bytes());
    }

    fn text(&mut self, value: &str) {
        let length = i32::try_from(value.len()).expect("texts are bounded to 16 MiB before they come here");
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
    }

    fn optional_text(&mut self, value: Option<&str>) {
        match value {
            Some(v) => self.text(v),
            None => self.null(),
        }
    }

    fn optional_long(&mut self, value: Option<i64>) {
        match value {
            Some(v) => self.field(v.to_be_bytes()),
            None => self.null(),
        }
    }

    fn time(&mut self, value: Timestamp) {
        self.field((value.0 - POSTGRES_EPOCH_US).to_be_bytes());
    }

    fn uuid(&mut self, value: &str) {
        let id = Uuid::try_parse(value).expect("message ids are parsed before they come here");
        self.field(id.into_bytes());
    }
}

/// A row that is written with COPY.
pub(crate) trait CopyRow {
    /// The statement that begins the stream, with the columns in the order of [`CopyRow::encode`].
    const STATEMENT: &'static str;

    /// Appends the row, which must have passed the checks of `validate`.
    fn encode(&self, buffer: &mut CopyBuffer);

    /// The column that decides about the partition.
    fn received_at(&self) -> Timestamp;
}

impl CopyRow for ReadingRow {
    const STATEMENT: &'static str = "COPY reading (site_id, device_id, epoch, seq, name, number, text, flag, \
         unit, occurred_at, received_at, message_id, trace_id, stream) FROM STDIN (FORMAT binary)";

    fn encode(&self, buffer: &mut CopyBuffer) {
        buffer.tuple(14);
        buffer.text(&self.site_id);
        buffer.text(&self.device_id);
        buffer.optional_long(self.epoch);
        buffer.optional_long(self.seq);
        buffer.text(&self.name);
        match self.number {
            Some(v) => buffer.field(v.to_be_bytes()),
            None => buffer.null(),
        }
        buffer.optional_text(self.text.as_deref());
        match self.flag {
            Some(v) => buffer.field([u8::from(v)]),
            None => buffer.null(),
        }
        buffer.optional_text(self.unit.as_deref());
        buffer.time(self.occurred_at);
        buffer.time(self.received_at);
        buffer.uuid(&self.message_id);
        buffer.text(&self.trace_id);
        buffer.text(&self.stream);
    }

    fn received_at(&self) -> Timestamp {
        self.received_at
    }
}

impl CopyRow for SessionRow {
    const STATEMENT: &'static str = "COPY session (site_id, device_id, client_id, event, cause, protocol, \
         session_generation, occurred_at, received_at, message_id, trace_id) FROM STDIN (FORMAT binary)";

    fn encode(&self, buffer: &mut CopyBuffer) {
        buffer.tuple(11);
        buffer.text(&self.site_id);
        buffer.text(&self.device_id);
        buffer.text(&self.client_id);
        buffer.text(&self.event);
        buffer.optional_text(self.cause.as_deref());
        buffer.text(&self.protocol);
        buffer.field(self.session_generation.to_be_bytes());
        buffer.time(self.occurred_at);
        buffer.time(self.received_at);
        buffer.uuid(&self.message_id);
        buffer.text(&self.trace_id);
    }

    fn received_at(&self) -> Timestamp {
        self.received_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_the_bytes_that_the_manual_describes() {
        let row = SessionRow {
            site_id: "s".into(),
            session_generation: 258,
            occurred_at: Timestamp(POSTGRES_EPOCH_US + 1),
            message_id: Uuid::from_u128(1).to_string(),
            ..SessionRow::default()
        };
        let mut buffer = CopyBuffer::default();
        buffer.begin();
        row.encode(&mut buffer);
        buffer.end();
        let mut expected = b"PGCOPY\n\xff\r\n\0".to_vec();
        expected.extend([0; 8]);
        expected.extend([0, 11]);
        expected.extend([0, 0, 0, 1, b's']);
        expected.extend([0; 12]); // device_id, client_id, event: empty
        expected.extend([0xff; 4]); // cause: NULL
        expected.extend([0; 4]); // protocol: empty
        expected.extend([0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 1, 2]);
        expected.extend([0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]);
        expected.extend([0, 0, 0, 8]);
        expected.extend((-POSTGRES_EPOCH_US).to_be_bytes());
        expected.extend([0, 0, 0, 16]);
        expected.extend(1_u128.to_be_bytes());
        expected.extend([0; 4]); // trace_id: empty
        expected.extend([0xff, 0xff]);
        assert_eq!(buffer.bytes(), expected);
    }
}
