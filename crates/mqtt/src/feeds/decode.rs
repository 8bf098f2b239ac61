//! Decoders of feeds that are not native: bytes become the CEL value `payload`.

use super::Reject;
use cel::Value;
use cel::objects::{Key, Map};
use std::collections::HashMap;
use std::sync::Arc;
use throughline_model::catalog::{Decoder, FeedSpec};

/// One field of a binary layout.
#[derive(Clone, Debug, PartialEq)]
enum Field {
    Skip(usize),
    Number { name: String, bytes: usize, signed: bool, float: bool, little: bool },
}

/// A decoder with what it needs, checked when the feed is compiled.
#[derive(Debug)]
pub enum Decode {
    /// Any JSON.
    Json,
    /// A number as text.
    Number,
    /// UTF-8 text.
    Text,
    /// Separated columns.
    Csv {
        /// Names of the columns; empty: the first line names them.
        columns: Vec<String>,
        /// Separates columns.
        separator: char,
    },
    /// Pairs.
    KeyValue {
        /// Separates pairs.
        separator: String,
    },
    /// A regular expression with named groups.
    Pattern(regex::Regex),
    /// Fixed fields.
    Binary(Layout),
}

/// The fields of a binary payload.
#[derive(Debug)]
pub struct Layout(Vec<Field>);

impl Decode {
    /// Checks what the decoder of `spec` needs.
    ///
    /// # Errors
    /// Says which key is wrong and why.
    pub fn compile(spec: &FeedSpec) -> Result<Self, String> {
        let separator = spec.separator.as_deref().unwrap_or(",");
        Ok(match spec.decoder {
            Decoder::Native => return Err("the native decoder has no expressions".to_owned()),
            Decoder::Json => Self::Json,
            Decoder::Number => Self::Number,
            Decoder::Text => Self::Text,
            Decoder::Csv => {
                let mut chars = separator.chars();
                match (chars.next(), chars.next()) {
                    (Some(c), None) if c.is_ascii() && c != '"' => {
                        Self::Csv { columns: spec.columns.clone(), separator: c }
                    }
                    _ => return Err(format!("`separator` of csv is one ASCII character, not `{separator}`")),
                }
            }
            Decoder::KeyValue if separator.is_empty() => return Err("`separator` is empty".to_owned()),
            Decoder::KeyValue => Self::KeyValue { separator: separator.to_owned() },
            Decoder::Pattern => {
                let pattern = spec.pattern.as_deref().ok_or("`pattern` is missing")?;
                Self::Pattern(regex::Regex::new(pattern).map_err(|e| format!("`pattern`: {e}"))?)
            }
            Decoder::Binary => Self::Binary(Layout::parse(&spec.layout)?),
        })
    }

    /// Decodes a payload.
    ///
    /// # Errors
    /// [`Reject`] with a stable code.
    pub fn decode(&self, payload: &[u8]) -> Result<Value, Reject> {
        if let Self::Binary(layout) = self {
            return layout.decode(payload);
        }
        let text = std::str::from_utf8(payload)
            .map_err(|e| Reject::new("payload_not_utf8", format!("the payload is not UTF-8: {e}")))?;
        match self {
            Self::Json => match serde_json::from_str(text) {
                Ok(value) => Ok(from_json(&value)),
                Err(e) => Err(Reject::new("payload_not_json", format!("the payload is not JSON: {e}"))),
            },
            Self::Number => scalar_number(text),
            Self::Text => Ok(Value::from(text)),
            Self::Csv { columns, separator } => csv(text, columns, *separator),
            Self::KeyValue { separator } => key_value(text, separator),
            Self::Pattern(regex) => groups(text, regex),
            Self::Binary(_) => unreachable!("decoded above"),
        }
    }
}

/// Converts JSON; integers stay integers where 64 bits hold them.
pub fn from_json(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(flag) => Value::Bool(*flag),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::Int(i),
            (None, Some(u)) => Value::UInt(u),
            (None, None) => Value::Float(n.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(list) => Value::List(Arc::new(list.iter().map(from_json).collect())),
        serde_json::Value::Object(object) => map(object.iter().map(|(k, v)| (k.as_str(), from_json(v)))),
    }
}

/// Makes a CEL map with text keys.
pub fn map<'k>(pairs: impl IntoIterator<Item = (&'k str, Value)>) -> Value {
    let pairs = pairs.into_iter().map(|(k, v)| (Key::String(Arc::new(k.to_owned())), v));
    Value::Map(Map { map: Arc::new(pairs.collect::<HashMap<_, _>>()) })
}

fn scalar_number(text: &str) -> Result<Value, Reject> {
    let text = text.trim();
    if let Ok(integer) = text.parse::<i64>() {
        return Ok(Value::Int(integer));
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(Value::Float(number)),
        _ => {
            let shown: String = text.chars().take(64).collect();
            Err(Reject::new("payload_not_number", format!("the payload `{shown}` is not a number")))
        }
    }
}

/// Reads a cell: a number where it is one, else text.
fn cell(text: &str) -> Value {
    scalar_number(text).unwrap_or_else(|_| Value::from(text))
}

fn csv(text: &str, columns: &[String], separator: char) -> Result<Value, Reject> {
    let mut lines = csv_lines(text, separator)?.into_iter();
    let names = if columns.is_empty() {
        lines.next().ok_or_else(|| Reject::new("csv_empty", "the payload has no line of names".to_owned()))?
    } else {
        columns.to_vec()
    };
    let mut rows = Vec::new();
    for (number, line) in lines.enumerate() {
        if line.len() != names.len() {
            let message = format!("line {} has {} columns, not {}", number + 1, line.len(), names.len());
            return Err(Reject::new("csv_columns", message));
        }
        rows.push(map(names.iter().map(String::as_str).zip(line.iter().map(|c| cell(c)))));
    }
    Ok(Value::List(Arc::new(rows)))
}

/// Splits RFC 4180 text into lines of cells; empty lines are left out.
fn csv_lines(text: &str, separator: char) -> Result<Vec<Vec<String>>, Reject> {
    let mut lines = Vec::new();
    let mut line: Vec<String> = Vec::new();
    let mut field = String::new();
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' if quoted => quoted = false,
            _ if quoted => field.push(c),
            '"' if field.is_empty() => quoted = true,
            '\r' if chars.peek() == Some(&'\n') => {}
            '\n' => end_line(&mut lines, &mut line, &mut field),
            _ if c == separator => line.push(std::mem::take(&mut field)),
            _ => field.push(c),
        }
    }
    if quoted {
        return Err(Reject::new("csv_quote", "a quote is not closed".to_owned()));
    }
    end_line(&mut lines, &mut line, &mut field);
    Ok(lines)
}

fn end_line(lines: &mut Vec<Vec<String>>, line: &mut Vec<String>, field: &mut String) {
    if line.is_empty() && field.is_empty() {
        return;
    }
    line.push(std::mem::take(field));
    lines.push(std::mem::take(line));
}

fn key_value(text: &str, separator: &str) -> Result<Value, Reject> {
    let mut pairs = Vec::new();
    for pair in text.split(separator).map(str::trim).filter(|p| !p.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            let shown: String = pair.chars().take(64).collect();
            return Err(Reject::new("pair_invalid", format!("`{shown}` is not of the form key=value")));
        };
        pairs.push((key.trim(), cell(value.trim())));
    }
    Ok(map(pairs))
}

fn groups(text: &str, regex: &regex::Regex) -> Result<Value, Reject> {
    let captures = regex.captures(text).ok_or_else(|| {
        Reject::new("pattern_differs", format!("the payload does not match `{}`", regex.as_str()))
    })?;
    let named = regex.capture_names().flatten();
    Ok(map(named.filter_map(|name| captures.name(name).map(|m| (name, cell(m.as_str()))))))
}

impl Layout {
    fn parse(fields: &[String]) -> Result<Self, String> {
        if fields.is_empty() {
            return Err("`layout` is missing".to_owned());
        }
        fields.iter().map(|text| parse_field(text)).collect::<Result<_, _>>().map(Self)
    }

    fn decode(&self, payload: &[u8]) -> Result<Value, Reject> {
        let mut rest = payload;
        let mut pairs = Vec::new();
        for field in &self.0 {
            let width = match field {
                Field::Skip(n) => *n,
                Field::Number { bytes, .. } => *bytes,
            };
            let Some((head, tail)) = rest.split_at_checked(width) else {
                let message = format!("the payload of {} bytes is shorter than its layout", payload.len());
                return Err(Reject::new("binary_short", message));
            };
            if let Field::Number { name, signed, float, little, .. } = field {
                pairs.push((name.as_str(), binary_number(head, *signed, *float, *little)));
            }
            rest = tail;
        }
        if !rest.is_empty() {
            let message = format!("the payload is {} bytes longer than its layout", rest.len());
            return Err(Reject::new("binary_long", message));
        }
        Ok(map(pairs))
    }
}

fn parse_field(text: &str) -> Result<Field, String> {
    const KNOWN: &str = "u8, i8, u16, i16, u24, i24, u32, i32, u64, i64, f32, f64 with `be` or `le`";
    if let Some(n) = text.strip_prefix("skip") {
        return n.parse().map(Field::Skip).map_err(|_| format!("`{text}` is not of the form `skip4`"));
    }
    let (name, kind) =
        text.split_once(':').ok_or_else(|| format!("`{text}` is not of the form `name:type`"))?;
    let unknown = || format!("`{kind}` of `{name}` is not a type: {KNOWN}");
    let (width, little) = match kind.strip_suffix("le") {
        Some(width) => (width, true),
        None => (kind.strip_suffix("be").unwrap_or(kind), false),
    };
    let needs_order = !matches!(width, "u8" | "i8");
    if needs_order && width == kind {
        return Err(unknown());
    }
    let (sign, bits) = width.split_at_checked(1).ok_or_else(unknown)?;
    let (signed, float) = match sign {
        "u" => (false, false),
        "i" => (true, false),
        "f" => (true, true),
        _ => return Err(unknown()),
    };
    let bytes = match (float, bits) {
        (false, "8") => 1,
        (false, "16") => 2,
        (false, "24") => 3,
        (_, "32") => 4,
        (_, "64") => 8,
        _ => return Err(unknown()),
    };
    Ok(Field::Number { name: name.to_owned(), bytes, signed, float, little })
}

fn binary_number(bytes: &[u8], signed: bool, float: bool, little: bool) -> Value {
    let ordered: Vec<u8> = if little { bytes.iter().rev().copied().collect() } else { bytes.to_vec() };
    let raw = ordered.iter().fold(0u64, |n, byte| (n << 8) | u64::from(*byte));
    let unused_bits = 64 - 8 * bytes.len() as u32;
    match (float, bytes.len()) {
        (true, 4) => Value::Float(f64::from(f32::from_bits(raw as u32))),
        (true, _) => Value::Float(f64::from_bits(raw)),
        // Shifting up and back as a signed number extends the sign.
        (false, _) if signed => Value::Int(((raw << unused_bits) as i64) >> unused_bits),
        (false, _) => i64::try_from(raw).map_or(Value::UInt(raw), Value::Int),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(toml: &str) -> FeedSpec {
        toml::from_str(&format!("name='f'\nfilter='a/b'\n{toml}")).expect("a feed")
    }

    fn decoded(toml: &str, payload: &[u8]) -> String {
        let decode = Decode::compile(&spec(toml)).expect("compiles");
        match decode.decode(payload) {
            Ok(value) => value.json().expect("JSON").to_string(),
            Err(reject) => reject.code.to_owned(),
        }
    }

    #[test]
    fn each_decoder_reads_its_form_and_refuses_others_by_code() {
        for (toml, payload, expected) in [
            ("decoder='json'", b"{\"a\":[1,2.5]}".as_slice(), r#"{"a":[1,2.5]}"#),
            ("decoder='json'", b"{", "payload_not_json"),
            ("decoder='json'", b"\xff", "payload_not_utf8"),
            ("decoder='number'", b" 21.5\n", "21.5"),
            ("decoder='number'", b"NaN", "payload_not_number"),
            ("decoder='text'", b"ON", "\"ON\""),
            ("decoder='csv'", b"t,name\r\n1,\"a \"\"b\"\"\"\n", r#"[{"name":"a \"b\"","t":1}]"#),
            ("decoder='csv'\ncolumns=['a','b']\nseparator=';'", b"1;x", r#"[{"a":1,"b":"x"}]"#),
            ("decoder='csv'\ncolumns=['a','b']", b"1", "csv_columns"),
            ("decoder='csv'", b"a\n\"1", "csv_quote"),
            ("decoder='key_value'", b"t=21.5, mode=auto", r#"{"mode":"auto","t":21.5}"#),
            ("decoder='key_value'\nseparator=' '", b"t", "pair_invalid"),
            ("decoder='pattern'\npattern='^T(?<t>[0-9.]+)$'", b"T21.5", r#"{"t":21.5}"#),
            ("decoder='pattern'\npattern='^T(?<t>[0-9.]+)$'", b"x", "pattern_differs"),
            (
                "decoder='binary'\nlayout=['t:i16be','skip1','v:u16le']",
                b"\xff\xfe\x00\x01\x02",
                r#"{"t":-2,"v":513}"#,
            ),
            ("decoder='binary'\nlayout=['f:f32be']", b"\x41\xac\x00\x00", r#"{"f":21.5}"#),
            ("decoder='binary'\nlayout=['t:i24be']", b"\xff\xff", "binary_short"),
            ("decoder='binary'\nlayout=['t:u8']", b"\xff\xff", "binary_long"),
        ] {
            assert_eq!(decoded(toml, payload), expected, "{toml} on {payload:?}");
        }
    }

    #[test]
    fn what_a_decoder_needs_is_checked_when_the_feed_is_compiled() {
        for (toml, why) in [
            ("decoder='csv'\nseparator=',,'", "one ASCII character"),
            ("decoder='pattern'", "`pattern` is missing"),
            ("decoder='pattern'\npattern='('", "`pattern`"),
            ("decoder='binary'", "`layout` is missing"),
            ("decoder='binary'\nlayout=['t:i16']", "is not a type"),
            ("decoder='binary'\nlayout=['t:f24be']", "is not a type"),
        ] {
            let error = Decode::compile(&spec(toml)).expect_err(toml);
            assert!(error.contains(why), "{toml}: {error}");
        }
    }
}
