//! What stages check of a message before they take it. Bounds are those that every later reader can bear.

use std::collections::HashSet;
use throughline_model::codec::CodecError;
use throughline_model::envelope::{EnvelopeRef, Measurement};
use throughline_model::ids::check_name;
use throughline_model::outcome::Settled;
use throughline_model::record::Record;
use throughline_model::time::TimeBounds;
use throughline_model::twin::{
    ENVELOPE_TEXT_BYTES_MAX, FIELD_NAME_BYTES_MAX, FIELD_TEXT_BYTES_MAX, FIELD_UNIT_BYTES_MAX, FIELDS_MAX,
    long_text, name_is_valid,
};

/// At most this many measurements a message; a twin holds as many fields.
pub const MEASUREMENTS_MAX: usize = FIELDS_MAX;
/// The longest text of a measurement in bytes: as long as a twin's field.
pub const TEXT_BYTES_MAX: usize = FIELD_TEXT_BYTES_MAX;
/// The longest unit in bytes.
pub const UNIT_BYTES_MAX: usize = FIELD_UNIT_BYTES_MAX;

/// Up to this many names are compared each with each, which is cheaper than hashing them.
const NAMES_COMPARED_MAX: usize = 24;

/// What is wrong with a message: a stable code and a sentence without the message's name.
pub type Fault = (&'static str, String);

/// One measurement, borrowed from any of its forms.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are those of a measurement, documented there")]
pub struct ValueRef<'a> {
    pub name: &'a str,
    pub number: Option<f64>,
    pub text: Option<&'a str>,
    pub flag: Option<bool>,
    pub unit: Option<&'a str>,
}

impl<'a> From<&'a Measurement> for ValueRef<'a> {
    fn from(m: &'a Measurement) -> Self {
        Self {
            name: &m.name,
            number: m.number,
            text: m.text.as_deref(),
            flag: m.flag,
            unit: m.unit.as_deref(),
        }
    }
}

/// Settles a record whose value does not read.
pub fn undecodable(record: &Record<'_>, error: &CodecError) -> Settled {
    let key = record.key_str().unwrap_or("that is not text");
    Settled::dead_lettered(error.code(), format!("cannot read the record of key `{key}`: {error}"))
}

/// Returns the record's key where it is the name of the device that the message is about: state is kept
/// and partitions are chosen by it.
///
/// # Errors
/// The settlement of the record: `key_mismatch` or `device_invalid`.
pub fn device_key<'r>(record: &Record<'r>, message: &EnvelopeRef<'_>) -> Result<&'r str, Settled> {
    let (site, device) = (message.site_id, message.device_id);
    let key = record.key_str().unwrap_or_default();
    if key.split_once('/') != Some((site, device)) {
        let what = format!("the record's key is `{key}`, but the message is about `{site}/{device}`");
        return Err(Settled::dead_lettered("key_mismatch", what));
    }
    match check_name("site", site).and_then(|()| check_name("device", device)) {
        Ok(()) => Ok(key),
        Err(e) => Err(Settled::dead_lettered("device_invalid", e.to_string())),
    }
}

/// Checks that the device's own time, where it gave one, is near the time of arrival.
///
/// # Errors
/// `time_out_of_range`.
pub fn time(message: &EnvelopeRef<'_>, bounds: TimeBounds) -> Result<(), Fault> {
    if !message.has_own_time() || bounds.accept(message.occurred_at, message.received_at) {
        return Ok(());
    }
    let what = format!(
        "its time {} is more than {} days before or {} minutes after its arrival at {}",
        message.occurred_at,
        bounds.past.as_secs() / 86_400,
        bounds.future.as_secs() / 60,
        message.received_at
    );
    Err(("time_out_of_range", what))
}

/// Checks the texts of an envelope that current state takes over, and `more` of them by name: a state must
/// fit into a record of Kafka, whatever its device writes into its messages.
///
/// # Errors
/// `text_too_long`.
pub fn envelope_texts(message: &EnvelopeRef<'_>, more: &[(&'static str, Option<&str>)]) -> Result<(), Fault> {
    let is_long = |text: &Option<&str>| text.is_some_and(|text| text.len() > ENVELOPE_TEXT_BYTES_MAX);
    let long = long_text(message).or_else(|| more.iter().find(|(_, t)| is_long(t)).map(|(name, _)| *name));
    match long {
        None => Ok(()),
        Some(name) => {
            Err(("text_too_long", format!("its {name} has more than {ENVELOPE_TEXT_BYTES_MAX} bytes")))
        }
    }
}

/// Checks measurements: their number, names that are valid and differ, one finite value each, texts that
/// every store can hold.
///
/// # Errors
/// The first [`Fault`], by measurement.
pub fn measurements<'a>(values: impl ExactSizeIterator<Item = ValueRef<'a>> + Clone) -> Result<(), Fault> {
    if values.len() > MEASUREMENTS_MAX {
        let what = format!("it has {} measurements, more than {MEASUREMENTS_MAX}", values.len());
        return Err(("too_many_measurements", what));
    }
    for value in values.clone() {
        measurement(value)?;
    }
    if let Some(name) = repeated_name(values) {
        return Err(("name_repeated", format!("measurement `{name}` occurs twice")));
    }
    Ok(())
}

fn measurement(value: ValueRef<'_>) -> Result<(), Fault> {
    let name = value.name;
    if !name_is_valid(name) {
        let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
        let what = format!(
            "measurement `{shown}`: a name has 1 to {FIELD_NAME_BYTES_MAX} bytes and no control character"
        );
        return Err(("name_invalid", what));
    }
    let given = usize::from(value.number.is_some())
        + usize::from(value.text.is_some())
        + usize::from(value.flag.is_some());
    if given > 1 {
        let what = format!("measurement `{name}` has more than one of number, text and flag");
        return Err(("value_ambiguous", what));
    }
    if value.number.is_some_and(|n| !n.is_finite()) {
        return Err(("number_not_finite", format!("measurement `{name}` is not a finite number")));
    }
    text(name, "text", value.text, TEXT_BYTES_MAX)?;
    text(name, "unit", value.unit, UNIT_BYTES_MAX)
}

fn text(name: &str, what: &str, text: Option<&str>, bytes_max: usize) -> Result<(), Fault> {
    let Some(text) = text else { return Ok(()) };
    if text.len() > bytes_max {
        let what =
            format!("the {what} of measurement `{name}` has {} bytes, more than {bytes_max}", text.len());
        return Err(("text_too_long", what));
    }
    if text.as_bytes().contains(&0) {
        return Err(("nul_in_text", format!("the {what} of measurement `{name}` contains NUL")));
    }
    Ok(())
}

fn repeated_name<'a>(values: impl ExactSizeIterator<Item = ValueRef<'a>> + Clone) -> Option<&'a str> {
    if values.len() <= NAMES_COMPARED_MAX {
        let mut rest = values;
        while let Some(value) = rest.next() {
            if rest.clone().any(|other| other.name == value.name) {
                return Some(value.name);
            }
        }
        return None;
    }
    let mut seen = HashSet::with_capacity(values.len());
    values.map(|v| v.name).find(|name| !seen.insert(*name))
}
