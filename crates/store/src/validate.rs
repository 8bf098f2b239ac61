//! Checks of rows before anything is sent, so that both stores refuse the same rows.
//!
//! PostgreSQL cannot hold NUL in text, SQLite reads NaN back as NULL, and both have limits of length that
//! differ: a row that only one of them takes would make the stores differ.

use throughline_model::rows::{AlertRow, ReadingRow, Rows, SessionRow, TwinRow};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::Failure;
use uuid::Uuid;

/// Longest identifier in bytes. Keys are in B-trees, whose entries PostgreSQL bounds at about 2,700 bytes;
/// the longest key has two identifiers.
pub const ID_BYTES_MAX: usize = 512;
/// Longest text in bytes: well above Kafka's default bound of a record, well below SQLite's of a value.
pub const TEXT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Times in microseconds that both stores hold and print: years 1 to 9999.
const TIME_RANGE: std::ops::RangeInclusive<i64> = -62_135_596_800_000_000..=253_402_300_799_999_999;

/// Checks every row.
///
/// # Errors
/// [`Failure::Data`] that names table, row and column, never the value.
pub fn validate(rows: &Rows) -> Result<(), Failure> {
    check_all("reading", &rows.readings, reading)?;
    check_all("alert", &rows.alerts, alert)?;
    check_all("session", &rows.sessions, session)?;
    check_all("twin", &rows.twins, twin)
}

/// A column and the code of what is wrong with it.
type Fault = (&'static str, &'static str);

fn check_all<R>(table: &str, rows: &[R], check: impl Fn(&R) -> Result<(), Fault>) -> Result<(), Failure> {
    for (index, row) in rows.iter().enumerate() {
        check(row).map_err(|(column, code)| Failure::Data {
            code: code.to_owned(),
            message: format!("row {index} of `{table}` cannot be stored: column `{column}`"),
        })?;
    }
    Ok(())
}

fn reading(row: &ReadingRow) -> Result<(), Fault> {
    id("site_id", &row.site_id)?;
    id("device_id", &row.device_id)?;
    id("name", &row.name)?;
    if row.number.is_some_and(f64::is_nan) {
        return Err(("number", "not_a_number"));
    }
    optional_text("text", row.text.as_deref())?;
    optional_text("unit", row.unit.as_deref())?;
    time("occurred_at", row.occurred_at)?;
    time("received_at", row.received_at)?;
    message_id(&row.message_id)?;
    id("trace_id", &row.trace_id)?;
    id("stream", &row.stream)
}

fn alert(row: &AlertRow) -> Result<(), Fault> {
    id("alert_id", &row.alert_id)?;
    id("rule_id", &row.rule_id)?;
    id("site_id", &row.site_id)?;
    id("device_id", &row.device_id)?;
    id("severity", &row.severity)?;
    id("state", &row.state)?;
    time("raised_at", row.raised_at)?;
    time("cleared_at", row.cleared_at.unwrap_or_default())?;
    text("summary", &row.summary)?;
    message_id(&row.message_id)?;
    id("trace_id", &row.trace_id)?;
    time("received_at", row.received_at)
}

fn session(row: &SessionRow) -> Result<(), Fault> {
    id("site_id", &row.site_id)?;
    id("device_id", &row.device_id)?;
    // MQTT allows client ids of 65,535 bytes; they are in no index.
    text("client_id", &row.client_id)?;
    id("event", &row.event)?;
    optional_text("cause", row.cause.as_deref())?;
    id("protocol", &row.protocol)?;
    time("occurred_at", row.occurred_at)?;
    time("received_at", row.received_at)?;
    message_id(&row.message_id)?;
    id("trace_id", &row.trace_id)
}

fn twin(row: &TwinRow) -> Result<(), Fault> {
    id("site_id", &row.site_id)?;
    id("device_id", &row.device_id)?;
    if row.is_removal() {
        return Ok(());
    }
    id("presence", &row.presence)?;
    time("last_seen_at", row.last_seen_at)?;
    text("document", &row.document)?;
    message_id(&row.message_id)?;
    id("trace_id", &row.trace_id)
}

fn bounded(column: &'static str, value: &str, bytes_max: usize) -> Result<(), Fault> {
    if value.len() > bytes_max {
        return Err((column, "text_too_long"));
    }
    if value.as_bytes().contains(&0) {
        return Err((column, "nul_in_text"));
    }
    Ok(())
}

fn id(column: &'static str, value: &str) -> Result<(), Fault> {
    bounded(column, value, ID_BYTES_MAX)
}

fn text(column: &'static str, value: &str) -> Result<(), Fault> {
    bounded(column, value, TEXT_BYTES_MAX)
}

fn optional_text(column: &'static str, value: Option<&str>) -> Result<(), Fault> {
    value.map_or(Ok(()), |v| text(column, v))
}

fn time(column: &'static str, value: Timestamp) -> Result<(), Fault> {
    if TIME_RANGE.contains(&value.0) { Ok(()) } else { Err((column, "time_out_of_range")) }
}

/// SQLite keeps the text, so that only the form PostgreSQL prints (36 characters, lower case) reads back
/// equal from both.
fn message_id(value: &str) -> Result<(), Fault> {
    let canonical = value.len() == 36 && !value.bytes().any(|b| b.is_ascii_uppercase());
    if canonical && Uuid::try_parse(value).is_ok() { Ok(()) } else { Err(("message_id", "not_a_uuid")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> ReadingRow {
        ReadingRow { message_id: Uuid::from_u128(7).to_string(), ..ReadingRow::default() }
    }

    #[test]
    fn rows_that_one_store_could_not_hold_are_refused_for_both() {
        let faults: &[(&str, ReadingRow)] = &[
            ("nul_in_text", ReadingRow { text: Some("a\0b".into()), ..good() }),
            ("nul_in_text", ReadingRow { site_id: "\0".into(), ..good() }),
            ("not_a_number", ReadingRow { number: Some(f64::NAN), ..good() }),
            ("text_too_long", ReadingRow { name: "n".repeat(ID_BYTES_MAX + 1), ..good() }),
            ("time_out_of_range", ReadingRow { occurred_at: Timestamp(i64::MAX), ..good() }),
            ("time_out_of_range", ReadingRow { received_at: Timestamp(i64::MIN), ..good() }),
            ("not_a_uuid", ReadingRow { message_id: "x".repeat(36), ..good() }),
            ("not_a_uuid", ReadingRow { message_id: Uuid::from_u128(7).simple().to_string(), ..good() }),
        ];
        for (expected, row) in faults {
            let rows = Rows { readings: vec![good(), row.clone()], ..Rows::default() };
            match validate(&rows) {
                Err(Failure::Data { code, message }) => {
                    assert_eq!(code, *expected);
                    assert!(message.contains("row 1 of `reading`"), "{message}");
                }
                other => panic!("{expected}: {other:?}"),
            }
        }
        let fine = ReadingRow { number: Some(f64::INFINITY), text: Some("ü".into()), ..good() };
        assert!(validate(&Rows { readings: vec![fine], ..Rows::default() }).is_ok());
    }
}
