//! The native payload: `{"epoch":1,"seq":42,"ts":"…","values":{…}}` or a list of such objects.

use super::Reject;
use super::clock;
use crate::json::{Json, Token};
use crate::values::Values;
use std::borrow::Cow;
use throughline_model::time::Timestamp;

/// The keys of one native object beside its values. Keys that are not known are ignored: devices add
/// fields of their own, and a firmware update must not turn its readings into dead letters.
#[derive(Debug, Default)]
pub struct Fields<'a> {
    /// `epoch`.
    pub epoch: Option<i64>,
    /// `seq`.
    pub seq: Option<i64>,
    /// `ts`.
    pub time: Option<Timestamp>,
    /// `clock_offset`, µs.
    pub clock_offset: Option<i64>,
    /// `trace_id`.
    pub trace_id: Option<Cow<'a, str>>,
    /// `request_id`.
    pub request_id: Option<Cow<'a, str>>,
    /// `request_code`.
    pub request_code: Option<Cow<'a, str>>,
    /// `response_code`.
    pub response_code: Option<Cow<'a, str>>,
    /// `reason`.
    pub reason: Option<Cow<'a, str>>,
    /// `agent_version`.
    pub agent_version: Option<Cow<'a, str>>,
    /// `config_version`.
    pub config_version: Option<Cow<'a, str>>,
    has_values: bool,
}

/// Reads the object that `json` stands before; `values` are cleared first and then hold its measurements.
/// `values_required` is false for streams in which a message without values means something.
///
/// # Errors
/// [`Reject`] says which key is wrong.
pub fn read_object<'a>(
    json: &mut Json<'a>,
    values_required: bool,
    values: &mut Values,
) -> Result<Fields<'a>, Reject> {
    values.clear();
    let mut fields = Fields::default();
    // A text that has ended is left to the reader, which says so.
    if json.peek().is_some_and(|byte| byte != b'{') {
        return Err(Reject::new("payload_not_object", format!("{} expected `{{`", at(json))));
    }
    json.token().map_err(Reject::json)?;
    let mut first = true;
    while let Some(key) = json.next_key(&mut first).map_err(Reject::json)? {
        match &*key {
            "values" => {
                if json.peek().is_some_and(|byte| byte != b'{') {
                    return Err(Reject::new("values_not_object", "`values` must be an object".to_owned()));
                }
                values.clear();
                values.flatten(json, 1).map_err(Reject::value)?;
                fields.has_values = true;
            }
            "epoch" => fields.epoch = counter(json, "epoch_invalid", "epoch")?,
            "seq" => fields.seq = counter(json, "seq_invalid", "seq")?,
            "ts" => fields.time = time(json)?,
            "clock_offset" => fields.clock_offset = integer(json, "clock_offset_invalid", "clock_offset")?,
            "trace_id" => fields.trace_id = text(json, "trace_id")?,
            "request_id" => fields.request_id = text(json, "request_id")?,
            "request_code" => fields.request_code = text(json, "request_code")?,
            "response_code" => fields.response_code = text(json, "response_code")?,
            "reason" => fields.reason = text(json, "reason")?,
            "agent_version" => fields.agent_version = text(json, "agent_version")?,
            "config_version" => fields.config_version = text(json, "config_version")?,
            _ => json.skip().map_err(Reject::json)?,
        }
    }
    if values_required && !fields.has_values {
        let message = "`values` is missing: measurements stand in it, `{\"values\":{\"temperature\":21.5}}`";
        return Err(Reject::new("values_missing", message.to_owned()));
    }
    Ok(fields)
}

fn at(json: &Json<'_>) -> String {
    format!("at byte {}:", json.position())
}

fn integer(json: &mut Json<'_>, code: &'static str, key: &str) -> Result<Option<i64>, Reject> {
    match json.token().map_err(Reject::json)? {
        Token::Null => Ok(None),
        Token::Number(written) => match written.parse() {
            Ok(n) => Ok(Some(n)),
            Err(_) => Err(Reject::new(code, format!("`{key}` is {written}, not an integer of 64 bits"))),
        },
        other => Err(Reject::new(code, format!("`{key}` must be an integer, not {}", kind(&other)))),
    }
}

fn counter(json: &mut Json<'_>, code: &'static str, key: &str) -> Result<Option<i64>, Reject> {
    match integer(json, code, key)? {
        Some(n) if n < 0 => Err(Reject::new(code, format!("`{key}` is {n}, below 0"))),
        n => Ok(n),
    }
}

fn time(json: &mut Json<'_>) -> Result<Option<Timestamp>, Reject> {
    let (time, written) = match json.token().map_err(Reject::json)? {
        Token::Null => return Ok(None),
        Token::Number(written) => (clock::from_json_number(written), Cow::Borrowed(written)),
        Token::Text(text) => (clock::from_text(&text, None), text),
        other => return Err(Reject::new("ts_invalid", format!("`ts` must be a time, not {}", kind(&other)))),
    };
    let shown: String = written.chars().take(64).collect();
    time.map(Some).ok_or_else(|| {
        Reject::new("ts_invalid", format!("`ts` is `{shown}`, neither RFC 3339 with a zone nor a Unix time"))
    })
}

fn text<'a>(json: &mut Json<'a>, key: &str) -> Result<Option<Cow<'a, str>>, Reject> {
    match json.token().map_err(Reject::json)? {
        Token::Null => Ok(None),
        Token::Text(text) => Ok(Some(text)),
        Token::Number(written) => Ok(Some(Cow::Borrowed(written))),
        other => Err(Reject::new("field_not_text", format!("`{key}` must be a text, not {}", kind(&other)))),
    }
}

fn kind(token: &Token<'_>) -> &'static str {
    match token {
        Token::Object => "an object",
        Token::Array => "a list",
        Token::Text(_) => "a text",
        Token::Number(_) => "a number",
        Token::Flag(_) => "a boolean",
        Token::Null => "null",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_payload_is_said_by_a_stable_code() {
        for (payload, code) in [
            (r#"{"values":{"t":1}}"#, ""),
            (r#"{"epoch":1,"seq":42,"ts":1769853600,"values":{},"firmware":{"x":[1]}}"#, ""),
            (r#"{"epoch":null,"seq":null,"ts":null,"values":{}}"#, ""),
            (r#"{"temperature":21}"#, "values_missing"),
            (r#"{"values":21}"#, "values_not_object"),
            (r#"{"epoch":-1,"values":{}}"#, "epoch_invalid"),
            (r#"{"seq":1.5,"values":{}}"#, "seq_invalid"),
            (r#"{"seq":9223372036854775808,"values":{}}"#, "seq_invalid"),
            (r#"{"ts":"soon","values":{}}"#, "ts_invalid"),
            (r#"{"ts":true,"values":{}}"#, "ts_invalid"),
            (r#"{"reason":[],"values":{}}"#, "field_not_text"),
            (r#"{"values":{"t":1e999}}"#, "number_out_of_range"),
            (r#"{"values":{"t":1}"#, "payload_not_json"),
            ("21.5", "payload_not_object"),
            ("", "payload_not_json"),
        ] {
            let mut values = Values::default();
            let read = read_object(&mut Json::new(payload), true, &mut values);
            assert_eq!(read.map_or_else(|r| r.code, |_| ""), code, "{payload}");
        }
    }
}
