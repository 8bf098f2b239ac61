//! How large a twin may grow, and how much a message would add to it.

use super::find;
use crate::envelope::{EnvelopeRef, Measurement, TwinField};

/// At most this many fields a side: a device that makes up names must not grow its twin without bound.
pub const FIELDS_MAX: usize = 1_024;

/// The longest name of a field in bytes.
pub const FIELD_NAME_BYTES_MAX: usize = 256;

/// The longest text of a field in bytes: longer ones are documents, which belong elsewhere.
pub const FIELD_TEXT_BYTES_MAX: usize = 64 * 1_024;

/// The longest unit of a field in bytes.
pub const FIELD_UNIT_BYTES_MAX: usize = 64;

/// What the reported fields may take in the twin's record. A twin is one record of Kafka: if one device
/// could make its own larger than its topic takes, its transaction could not be committed and the stage
/// would stop for every device. Together with twice [`DESIRED_BYTES_MAX`] this is 512 KiB; the runs of seq
/// take at most 62 KB a stream, so that a twin stays below 1,000,000 bytes, the smallest bound on its way
/// (a test holds this).
pub const REPORTED_BYTES_MAX: usize = 320 * 1_024;

/// What the desired fields may take in the twin's record, where those that are not met lie twice (delta).
pub const DESIRED_BYTES_MAX: usize = 96 * 1_024;

/// The longest text of the envelope that a twin takes over (request and trace id, versions of agent and
/// configuration, stream), in bytes. They are identifiers; the next message need not replace them.
pub const ENVELOPE_TEXT_BYTES_MAX: usize = 1_024;

/// What a field takes beside its texts at most: a number of 8 bytes, a flag, five integers of up to 10
/// bytes, and the lengths and union branches of texts and options.
const FIELD_FIXED_BYTES: usize = 88;

/// Returns the name of the first text of an envelope that is longer than [`ENVELOPE_TEXT_BYTES_MAX`].
pub fn long_text(envelope: &EnvelopeRef<'_>) -> Option<&'static str> {
    let texts = [
        ("request_id", envelope.request_id.unwrap_or_default()),
        ("trace_id", envelope.trace_id),
        ("stream", envelope.stream),
    ];
    texts.into_iter().find(|(_, text)| text.len() > ENVELOPE_TEXT_BYTES_MAX).map(|(name, _)| name)
}

/// What values would add to a side of the twin: fields, and bytes at most. What they would shorten is not
/// counted, so that the usual message, numbers under known names, costs no look at the whole side.
pub(super) struct Growth {
    pub(super) fields: usize,
    pub(super) bytes: usize,
}

impl Growth {
    pub(super) fn exceeds(&self, side: &[TwinField], bytes_max: usize) -> bool {
        self.bytes > 0 && self.bytes + side.iter().map(field_bytes).sum::<usize>() > bytes_max
    }
}

pub(super) fn growth<'m>(
    side: &[TwinField],
    values: impl IntoIterator<Item = &'m Measurement>,
    stream: &str,
) -> Growth {
    let mut growth = Growth { fields: 0, bytes: 0 };
    for value in values {
        let bytes = FIELD_FIXED_BYTES
            + value.name.len()
            + value.text.as_deref().map_or(0, str::len)
            + value.unit.as_deref().map_or(0, str::len)
            + stream.len();
        match find(side, &value.name) {
            Ok(at) => growth.bytes += bytes.saturating_sub(field_bytes(&side[at])),
            Err(_) => {
                growth.fields += 1;
                growth.bytes += bytes;
            }
        }
    }
    growth
}

/// Returns what a field takes in the twin's record at most.
fn field_bytes(field: &TwinField) -> usize {
    let texts = [&field.text, &field.unit, &field.stream];
    FIELD_FIXED_BYTES + field.name.len() + texts.into_iter().flatten().map(String::len).sum::<usize>()
}
