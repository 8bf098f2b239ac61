//! Measurements on their way into a record: one text buffer and spans, reused from message to message.

use crate::json::{DEPTH_MAX, Json, JsonFault, Token};
use serde::ser::{Serialize, SerializeSeq, SerializeStruct, Serializer};
use std::collections::BTreeMap;

/// The names and texts of one record together: what Kafka takes of a record by default. The name of a nested
/// value repeats the names above it, so that a short payload could otherwise ask for any amount of memory: a
/// key of half of it above a list of ones has names of a quarter of its square.
pub const TEXT_BYTES_MAX: usize = 1 << 20;

/// Integers of a larger magnitude do not survive as a double.
pub const EXACT_INTEGER_MAX: u64 = 1 << 53;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    start: u32,
    end: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scalar {
    Number(f64),
    Text(Span),
    Flag(bool),
    Null,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Item {
    name: Span,
    scalar: Scalar,
    unit: Option<Span>,
}

/// The measurements of one record.
#[derive(Debug, Default)]
pub struct Values {
    text: String,
    items: Vec<Item>,
    path: String,
    big_integer: bool,
    too_large: bool,
}

/// A value that cannot be a measurement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueFault {
    /// The text is not JSON.
    #[error("the payload is not JSON: {0}")]
    Json(JsonFault),
    /// A number that no double can hold.
    #[error("the number of `{0}` is beyond the range of a double")]
    OutOfRange(String),
    /// Nesting beyond [`DEPTH_MAX`].
    #[error("`{0}` is nested more than 32 levels deep")]
    TooDeep(String),
}

impl ValueFault {
    /// Returns the stable reason code.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Json(_) => "payload_not_json",
            Self::OutOfRange(_) => "number_out_of_range",
            Self::TooDeep(_) => "payload_too_deep",
        }
    }
}

impl From<JsonFault> for ValueFault {
    fn from(fault: JsonFault) -> Self {
        Self::Json(fault)
    }
}

impl Values {
    /// Forgets the measurements and keeps the buffers.
    pub fn clear(&mut self) {
        self.text.clear();
        self.items.clear();
        self.path.clear();
        self.big_integer = false;
        self.too_large = false;
    }

    /// Says whether the measurements have more than [`TEXT_BYTES_MAX`] of text; those beyond it were left
    /// out, so the record must not be written.
    pub const fn is_too_large(&self) -> bool {
        self.too_large
    }

    /// Says whether an integer beyond 2^53 was kept as text.
    pub const fn has_big_integer(&self) -> bool {
        self.big_integer
    }

    fn span(&mut self, text: &str) -> Span {
        let start = self.text.len() as u32;
        self.text.push_str(text);
        Span { start, end: self.text.len() as u32 }
    }

    fn get(&self, span: Span) -> &str {
        &self.text[span.start as usize..span.end as usize]
    }

    fn push(&mut self, scalar: Scalar) {
        if self.text.len() + self.path.len() > TEXT_BYTES_MAX {
            self.too_large = true;
            return;
        }
        let start = self.text.len() as u32;
        self.text.push_str(&self.path);
        let name = Span { start, end: self.text.len() as u32 };
        self.items.push(Item { name, scalar, unit: None });
    }

    /// Goes one level down: names pushed from now on begin with `name` and a dot. Returns what
    /// [`Values::leave`] needs.
    pub fn enter(&mut self, name: &str) -> usize {
        let before = self.path.len();
        if before > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        before
    }

    /// Goes up again.
    pub fn leave(&mut self, before: usize) {
        self.path.truncate(before);
    }

    /// Adds a number under the current name.
    ///
    /// # Errors
    /// [`ValueFault::OutOfRange`] when it is not finite.
    pub fn push_number(&mut self, number: f64) -> Result<(), ValueFault> {
        if !number.is_finite() {
            return Err(ValueFault::OutOfRange(self.path.clone()));
        }
        self.push(Scalar::Number(number));
        Ok(())
    }

    /// Adds an integer under the current name; beyond 2^53 as text.
    pub fn push_integer(&mut self, integer: i128) {
        if integer.unsigned_abs() > u128::from(EXACT_INTEGER_MAX) {
            self.big_integer = true;
            self.push_text(&integer.to_string());
        } else {
            self.push(Scalar::Number(integer as f64));
        }
    }

    /// Adds a text under the current name.
    pub fn push_text(&mut self, text: &str) {
        if self.text.len() + text.len() > TEXT_BYTES_MAX {
            self.too_large = true;
            return;
        }
        let span = self.span(text);
        self.push(Scalar::Text(span));
    }

    /// Adds a boolean under the current name.
    pub fn push_flag(&mut self, flag: bool) {
        self.push(Scalar::Flag(flag));
    }

    /// Adds a null under the current name.
    pub fn push_null(&mut self) {
        self.push(Scalar::Null);
    }

    /// Gives the measurement pushed last a unit.
    pub fn set_unit(&mut self, unit: &str) {
        let span = self.span(unit);
        if let Some(last) = self.items.last_mut() {
            last.unit = Some(span);
        }
    }

    /// Gives every measurement without a unit the one under its name.
    pub fn add_units(&mut self, units: &BTreeMap<String, String>) {
        for index in 0..self.items.len() {
            let item = self.items[index];
            if item.unit.is_some() {
                continue;
            }
            if let Some(unit) = units.get(self.get(item.name)) {
                self.items[index].unit = Some(self.span(unit));
            }
        }
    }

    /// Keeps only the measurements whose name `keep` accepts.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        let text = &self.text;
        self.items.retain(|item| keep(&text[item.name.start as usize..item.name.end as usize]));
    }

    /// Adds the value that `json` stands before, nested ones with dotted names, elements of lists with
    /// their index as name.
    ///
    /// # Errors
    /// Any [`ValueFault`]; what was added before it stays.
    pub fn flatten(&mut self, json: &mut Json<'_>, depth: usize) -> Result<(), ValueFault> {
        if depth > DEPTH_MAX {
            return Err(ValueFault::TooDeep(self.path.clone()));
        }
        let mut first = true;
        match json.token()? {
            Token::Object => {
                while let Some(key) = json.next_key(&mut first)? {
                    let before = self.enter(&key);
                    self.flatten(json, depth + 1)?;
                    self.leave(before);
                }
            }
            Token::Array => {
                let mut index = 0u32;
                while json.next_element(&mut first)? {
                    let before = self.enter(&index.to_string());
                    self.flatten(json, depth + 1)?;
                    self.leave(before);
                    index += 1;
                }
            }
            Token::Text(text) => self.push_text(&text),
            Token::Number(number) => self.push_json_number(number)?,
            Token::Flag(flag) => self.push_flag(flag),
            Token::Null => self.push_null(),
        }
        Ok(())
    }

    fn push_json_number(&mut self, written: &str) -> Result<(), ValueFault> {
        let is_integer = !written.bytes().any(|b| matches!(b, b'.' | b'e' | b'E'));
        if is_integer {
            match written.parse::<i64>() {
                Ok(n) if n.unsigned_abs() <= EXACT_INTEGER_MAX => self.push(Scalar::Number(n as f64)),
                _ => {
                    self.big_integer = true;
                    self.push_text(written);
                }
            }
            return Ok(());
        }
        // JSON's grammar of numbers is a subset of what `f64` parses.
        let number = written.parse::<f64>().unwrap_or(f64::INFINITY);
        self.push_number(number)
    }
}

struct Written<'a>(&'a Values, &'a Item);

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(values, item) = self;
        let (number, text, flag) = match item.scalar {
            Scalar::Number(n) => (Some(n), None, None),
            Scalar::Text(span) => (None, Some(values.get(span)), None),
            Scalar::Flag(flag) => (None, None, Some(flag)),
            Scalar::Null => (None, None, None),
        };
        let mut record = serializer.serialize_struct("Measurement", 5)?;
        record.serialize_field("name", values.get(item.name))?;
        record.serialize_field("number", &number)?;
        record.serialize_field("text", &text)?;
        record.serialize_field("flag", &flag)?;
        record.serialize_field("unit", &item.unit.map(|u| values.get(u)))?;
        record.end()
    }
}

impl Serialize for Values {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.items.len()))?;
        for item in &self.items {
            list.serialize_element(&Written(self, item))?;
        }
        list.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flattened(text: &str) -> String {
        let mut values = Values::default();
        if let Err(fault) = values.flatten(&mut Json::new(text), 0) {
            return fault.code().to_owned();
        }
        serde_json::to_string(&values).expect("serialises")
    }

    #[test]
    fn json_becomes_flat_named_values() {
        let number = |n: &str, v: &str| {
            format!(r#"{{"name":"{n}","number":{v},"text":null,"flag":null,"unit":null}}"#)
        };
        let text = |n: &str, v: &str| {
            format!(r#"{{"name":"{n}","number":null,"text":"{v}","flag":null,"unit":null}}"#)
        };
        for (json, expected) in [
            (
                r#"{"a":{"b":1.5},"c":[2,3]}"#,
                [number("a.b", "1.5"), number("c.0", "2.0"), number("c.1", "3.0")].join(","),
            ),
            (r#"{"n":9007199254740992}"#, number("n", "9007199254740992.0")),
            (r#"{"n":9007199254740993}"#, text("n", "9007199254740993")),
            (r#"{"n":-99999999999999999999999}"#, text("n", "-99999999999999999999999")),
            (
                r#"{"on":true}"#,
                r#"{"name":"on","number":null,"text":null,"flag":true,"unit":null}"#.to_owned(),
            ),
            (r#"{"x":null}"#, r#"{"name":"x","number":null,"text":null,"flag":null,"unit":null}"#.to_owned()),
        ] {
            assert_eq!(flattened(json), format!("[{expected}]"), "{json}");
        }
        assert_eq!(flattened(r#"{"x":1e999}"#), "number_out_of_range");
    }

    #[test]
    fn names_that_repeat_a_long_one_are_bounded() {
        let json = format!(r#"{{"{}":[{}1]}}"#, "k".repeat(100_000), "1,".repeat(50_000));
        let mut values = Values::default();
        values.flatten(&mut Json::new(&json), 0).expect("JSON");
        assert!(values.is_too_large());
        assert!(values.text.len() <= TEXT_BYTES_MAX, "{} bytes", values.text.len());
        values.clear();
        values.flatten(&mut Json::new(r#"{"t":1}"#), 0).expect("JSON");
        assert!(!values.is_too_large());
    }
}
