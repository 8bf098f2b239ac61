//! The closed vocabulary of codes that dead letters carry, for whoever names one in a file.

use crate::strict_toml::suggestion;

/// Every code of the bridge and of the stages, in alphabetical order; the tidy test compares them with the
/// code. What a database refuses is named after its own code: `sqlstate_22003`, `sqlite_275`.
pub const CODES: &[&str] = &[
    "alert_state_invalid",
    "binary_long",
    "binary_short",
    "clock_offset_invalid",
    "csv_columns",
    "csv_empty",
    "csv_quote",
    "datum_invalid",
    "device_invalid",
    "encode_failed",
    "epoch_invalid",
    "event_unknown",
    "feed_expression",
    "feed_expression_type",
    "field_not_text",
    "key_mismatch",
    "message_id_invalid",
    "name_invalid",
    "name_repeated",
    "no_measurements",
    "not_a_number",
    "not_a_uuid",
    "not_framed",
    "nul_in_text",
    "number_not_finite",
    "number_out_of_range",
    "pair_invalid",
    "pattern_differs",
    "payload_empty",
    "payload_not_json",
    "payload_not_number",
    "payload_not_object",
    "payload_not_utf8",
    "payload_too_deep",
    "record_refused",
    "records_too_large",
    "replay_without_topic",
    "schema_invalid",
    "seq_invalid",
    "site_invalid",
    "text_too_long",
    "time_out_of_range",
    "too_many_fields",
    "too_many_measurements",
    "topic_unmatched",
    "trace_id_invalid",
    "ts_invalid",
    "twin_too_large",
    "unbound_topic",
    "unexpected_topic",
    "unknown_schema",
    "value_absent",
    "value_ambiguous",
    "values_missing",
    "values_not_object",
    "values_too_large",
];

/// What a database refuses is named after its own code.
const OF_DATABASES: [&str; 2] = ["sqlstate_", "sqlite_"];

/// Says what is wrong with a code that a person wrote.
pub fn code_fault(code: &str) -> Option<String> {
    let is_of_database = OF_DATABASES.iter().any(|prefix| {
        let own = code.strip_prefix(prefix);
        own.is_some_and(|own| !own.is_empty() && own.bytes().all(|b| b.is_ascii_alphanumeric()))
    });
    if is_of_database || CODES.contains(&code) {
        return None;
    }
    let hint = suggestion(code, CODES.iter().copied());
    Some(format!("no dead letter has the code `{code}`{hint} (`throughline dlq list` shows those there are)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_in_order_and_a_slip_is_suggested() {
        assert!(CODES.windows(2).all(|pair| pair[0] < pair[1]));
        for code in ["unknown_schema", "sqlstate_22003", "sqlite_275"] {
            assert_eq!(code_fault(code), None);
        }
        let slip = code_fault("unknown_shema").expect("it is none");
        assert!(slip.contains("did you mean `unknown_schema`?"), "{slip}");
        assert!(code_fault("sqlstate_").is_some());
    }
}
