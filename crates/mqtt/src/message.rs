//! The record that a message becomes, borrowed: the fields of `DeviceMessage` without its strings.

use crate::values::Values;
use serde::Serialize;
use throughline_model::time::Timestamp;

/// `throughline_model::envelope::DeviceMessage`, written without owning anything. A test holds both to the
/// same bytes.
#[derive(Serialize)]
pub(crate) struct Message<'a> {
    pub message_id: &'a str,
    pub trace_id: &'a str,
    pub request_id: Option<&'a str>,
    pub request_code: Option<&'a str>,
    pub response_code: Option<&'a str>,
    pub reason: Option<&'a str>,
    pub identity: &'a str,
    pub site_id: &'a str,
    pub device_id: &'a str,
    pub agent_version: Option<&'a str>,
    pub config_version: Option<&'a str>,
    pub received_by: &'a str,
    pub stream: &'a str,
    pub epoch: Option<i64>,
    pub seq: Option<i64>,
    pub occurred_at: Timestamp,
    pub received_at: Timestamp,
    pub clock_offset: Option<i64>,
    pub flags: &'a [&'static str],
    pub measurements: &'a Values,
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Writes bytes as lower-case hexadecimal digits.
pub(crate) fn write_hex(bytes: &[u8], out: &mut String) {
    for byte in bytes {
        out.push(char::from(HEX[usize::from(byte >> 4)]));
        out.push(char::from(HEX[usize::from(byte & 15)]));
    }
}
