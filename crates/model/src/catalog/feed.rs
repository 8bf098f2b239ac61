//! Feeds: the ways into a topic. A feed says which MQTT messages it takes, how their payload is decoded,
//! and which expressions pick site, device, time, sequence and measurements.

use super::filter::Filter;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One `[[feed]]` of a topic file.
///
/// Expressions are CEL over these variables:
///
/// | variable | value |
/// |---|---|
/// | `payload` | the decoded payload, whole |
/// | `element` | the element that `each` picked; without `each` the payload, or each element of a list |
/// | `capture` | the captures of the filter, `capture.device` |
/// | `topic` | the MQTT topic |
/// | `login` | `login.client_id`, `login.user`, and `login.site` where the login is bound to one site |
///
/// `when` and `each` see the payload; every other expression is evaluated for each element. An expression
/// that fails dead-letters the message with the feed, the key and the error; an optional one that yields
/// null counts as absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedSpec {
    /// The feed's name, unique in the catalog; the stream of its messages unless they are native.
    pub name: String,
    /// Which MQTT topics it takes, see [`Filter`].
    pub filter: Filter,
    /// How bytes become a payload.
    pub decoder: Decoder,
    /// Takes the message only where this is true; else the next feed that matches is asked.
    #[serde(default)]
    pub when: Option<String>,
    /// A list expression: one message becomes one record an element (readings with their own times).
    #[serde(default)]
    pub each: Option<String>,
    /// The site, a string. Required but for native feeds: `capture.site`, `'home'`, `login.site`.
    #[serde(default)]
    pub site: Option<String>,
    /// The device within the site, a string; by default `capture.device`.
    #[serde(default)]
    pub device: Option<String>,
    /// The device's time: RFC 3339 or a local date and time as text, or Unix seconds, milliseconds,
    /// microseconds or nanoseconds, told apart by magnitude.
    #[serde(default)]
    pub time: Option<String>,
    /// The zone of times that carry none: an IANA name, `UTC`, or an offset such as `+02:00`. Required
    /// where `time` is given.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// Boot epoch of the sender, an integer from 0.
    #[serde(default)]
    pub epoch: Option<String>,
    /// Sequence number per device, stream and epoch, an integer from 0.
    #[serde(default)]
    pub seq: Option<String>,
    /// The measurements: a map from name to value (nested maps become dotted names), or a list of maps
    /// with the keys `name`, `value` and optionally `unit`. By default the element, flattened; a bare
    /// number, text or boolean is one measurement with the name that `measurement` gives.
    #[serde(default)]
    pub measurements: Option<String>,
    /// The name of the single measurement of a bare value, a string; by default `'value'`.
    #[serde(default)]
    pub measurement: Option<String>,
    /// A trace id from outside, 32 hexadecimal digits or a `traceparent`; anything else is ignored.
    #[serde(default)]
    pub trace_id: Option<String>,
    /// Who asked.
    #[serde(default)]
    pub request_id: Option<String>,
    /// What was intended.
    #[serde(default)]
    pub request_code: Option<String>,
    /// The result of the request.
    #[serde(default)]
    pub response_code: Option<String>,
    /// Reason code of the result.
    #[serde(default)]
    pub reason: Option<String>,
    /// Names of the columns of `csv`; without them the first line names them.
    #[serde(default)]
    pub columns: Vec<String>,
    /// What separates columns (`csv`, one ASCII character) or pairs (`key_value`); by default `,`.
    #[serde(default)]
    pub separator: Option<String>,
    /// The regular expression of `pattern`; its named groups become the payload's keys.
    #[serde(default)]
    pub pattern: Option<String>,
    /// The fields of `binary` in order, as `name:type` (`temperature:i16be`); types are u8, i8, u16, i16,
    /// u24, i24, u32, i32, u64, i64, f32, f64 with `be` or `le`, and `skip<n>` for n bytes.
    #[serde(default)]
    pub layout: Vec<String>,
    /// Units by measurement name; a unit that the message states itself wins.
    #[serde(default)]
    pub units: BTreeMap<String, String>,
    /// Measurements left out: exact names, or everything below one with `name.*`.
    #[serde(default)]
    pub exclude: Vec<String>,
}

/// How a payload's bytes become a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decoder {
    /// The native form: everything follows from `…/{site}/{device}/<stream>` and the payload's own keys;
    /// the feed has no expressions.
    Native,
    /// Any JSON.
    Json,
    /// A number as text, `21.5`; white space around it is allowed.
    Number,
    /// UTF-8 text as it is.
    Text,
    /// Lines of separated columns (RFC 4180): a list of maps.
    Csv,
    /// `a=1,b=2`: a map.
    KeyValue,
    /// Text taken apart by a regular expression: a map of its named groups.
    Pattern,
    /// Fixed binary fields: a map.
    Binary,
}

impl FeedSpec {
    /// Returns the expressions with the keys they stand under, for whoever checks or compiles them all.
    pub fn expressions(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("when", &self.when),
            ("each", &self.each),
            ("site", &self.site),
            ("device", &self.device),
            ("time", &self.time),
            ("epoch", &self.epoch),
            ("seq", &self.seq),
            ("measurements", &self.measurements),
            ("measurement", &self.measurement),
            ("trace_id", &self.trace_id),
            ("request_id", &self.request_id),
            ("request_code", &self.request_code),
            ("response_code", &self.response_code),
            ("reason", &self.reason),
        ]
        .into_iter()
        .filter_map(|(key, expression)| expression.as_deref().map(|e| (key, e)))
    }

    /// Says whether `name` is left out of the measurements.
    pub fn excludes(&self, name: &str) -> bool {
        self.exclude.iter().any(|pattern| match pattern.strip_suffix(".*") {
            Some(parent) => name.strip_prefix(parent).is_some_and(|rest| rest.starts_with('.')),
            None => pattern == name,
        })
    }
}

impl Serialize for Filter {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Filter {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
