//! How values show in the JSON that people and other programs get.

use serde::{Serialize, Serializer};
use throughline_model::time::Timestamp;

/// RFC 3339 in UTC.
pub(crate) struct Time(pub(crate) Timestamp);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

/// A JSON number, text, boolean or null.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Value<'a> {
    Integer(i64),
    Number(f64),
    Text(&'a str),
    Flag(bool),
    Null,
}

impl<'a> Value<'a> {
    /// Takes whichever of the three there is.
    pub(crate) fn of(number: Option<f64>, text: Option<&'a str>, flag: Option<bool>) -> Self {
        match (number, text, flag) {
            (Some(n), ..) if is_integer(n) => Self::Integer(n as i64),
            (Some(n), ..) => Self::Number(n),
            (None, Some(text), _) => Self::Text(text),
            (None, None, Some(flag)) => Self::Flag(flag),
            (None, None, None) => Self::Null,
        }
    }
}

/// Says whether a number shows as `91` rather than `91.0`, as the device wrote it.
fn is_integer(n: f64) -> bool {
    n.fract() == 0.0 && n.abs() <= 9_007_199_254_740_992.0
}
