//! A strict JSON reader (RFC 8259) that walks a text once and builds nothing.
//!
//! `serde_json` was measured beside it: its values cost an allocation a key, and its numbers lose integers
//! beyond 64 bits, which the native form keeps as text. A property test holds this reader to the same
//! answers as `serde_json`.

use std::borrow::Cow;
use std::fmt;

/// Nesting beyond this is refused: deeper payloads are mistakes or attacks on the stack.
pub const DEPTH_MAX: usize = 32;

/// Where and why a text is not the JSON that was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonFault {
    /// Byte offset in the text.
    pub at: usize,
    /// What was wrong.
    pub why: &'static str,
}

impl fmt::Display for JsonFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.why, self.at)
    }
}

type Read<T> = Result<T, JsonFault>;

/// A position in a JSON text.
#[derive(Clone)]
pub struct Json<'a> {
    text: &'a str,
    at: usize,
}

/// A scalar, or the beginning of something nested.
#[derive(Debug, PartialEq)]
pub enum Token<'a> {
    /// `{` was consumed; read it with [`Json::next_key`].
    Object,
    /// `[` was consumed; read it with [`Json::next_element`].
    Array,
    /// A string, decoded.
    Text(Cow<'a, str>),
    /// A number as it was written.
    Number(&'a str),
    /// `true` or `false`.
    Flag(bool),
    /// `null`.
    Null,
}

impl<'a> Json<'a> {
    /// Begins at the start of `text`.
    pub const fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// Returns the byte offset reached.
    pub const fn position(&self) -> usize {
        self.at
    }

    /// Returns the text from `start` to the offset reached.
    pub fn since(&self, start: usize) -> &'a str {
        &self.text[start..self.at]
    }

    /// Makes a fault at the offset reached.
    pub const fn fault(&self, why: &'static str) -> JsonFault {
        JsonFault { at: self.at, why }
    }

    /// Skips white space and returns the next byte without consuming it.
    pub fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while let Some(byte) = bytes.get(self.at) {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(*byte);
            }
            self.at += 1;
        }
        None
    }

    /// Reads the next value, or the opening of one.
    pub fn token(&mut self) -> Read<Token<'a>> {
        match self.peek() {
            Some(b'{') => {
                self.at += 1;
                Ok(Token::Object)
            }
            Some(b'[') => {
                self.at += 1;
                Ok(Token::Array)
            }
            Some(b'"') => self.text().map(Token::Text),
            Some(b't') => self.word("true").map(|()| Token::Flag(true)),
            Some(b'f') => self.word("false").map(|()| Token::Flag(false)),
            Some(b'n') => self.word("null").map(|()| Token::Null),
            Some(b'-' | b'0'..=b'9') => self.number().map(Token::Number),
            Some(_) => Err(self.fault("a value is expected")),
            None => Err(self.fault("the text ends where a value is expected")),
        }
    }

    /// Returns the next key of the object being read, or `None` after consuming its `}`. `first` is true
    /// before the first key and is then cleared.
    pub fn next_key(&mut self, first: &mut bool) -> Read<Option<Cow<'a, str>>> {
        if !self.next_item(first, b'}')? {
            return Ok(None);
        }
        if self.peek() != Some(b'"') {
            return Err(self.fault("a key in quotes is expected"));
        }
        let key = self.text()?;
        self.expect(b':', "`:` is expected")?;
        Ok(Some(key))
    }

    /// Says whether the array being read has another element; after the last its `]` is consumed.
    pub fn next_element(&mut self, first: &mut bool) -> Read<bool> {
        self.next_item(first, b']')
    }

    fn next_item(&mut self, first: &mut bool, close: u8) -> Read<bool> {
        let next = self.peek();
        if next == Some(close) && *first {
            self.at += 1;
            return Ok(false);
        }
        if !std::mem::take(first) {
            match next {
                Some(byte) if byte == close => {
                    self.at += 1;
                    return Ok(false);
                }
                Some(b',') => self.at += 1,
                _ => return Err(self.fault("`,` or the end of the object or array is expected")),
            }
        }
        Ok(true)
    }

    /// Skips one value of any kind.
    pub fn skip(&mut self) -> Read<()> {
        self.skip_nested(0)
    }

    fn skip_nested(&mut self, depth: usize) -> Read<()> {
        if depth > DEPTH_MAX {
            return Err(self.fault("the nesting is too deep"));
        }
        let mut first = true;
        match self.token()? {
            Token::Object => {
                while self.next_key(&mut first)?.is_some() {
                    self.skip_nested(depth + 1)?;
                }
            }
            Token::Array => {
                while self.next_element(&mut first)? {
                    self.skip_nested(depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Checks that nothing but white space is left.
    pub fn end(&mut self) -> Read<()> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.fault("something follows the value")),
        }
    }

    fn expect(&mut self, byte: u8, why: &'static str) -> Read<()> {
        if self.peek() != Some(byte) {
            return Err(self.fault(why));
        }
        self.at += 1;
        Ok(())
    }

    fn word(&mut self, word: &str) -> Read<()> {
        if !self.text[self.at..].starts_with(word) {
            return Err(self.fault("a value is expected"));
        }
        self.at += word.len();
        Ok(())
    }

    fn digits(&mut self) -> usize {
        let bytes = &self.text.as_bytes()[self.at..];
        let count = bytes.iter().take_while(|b| b.is_ascii_digit()).count();
        self.at += count;
        count
    }

    fn number(&mut self) -> Read<&'a str> {
        let bytes = self.text.as_bytes();
        let start = self.at;
        if bytes[self.at] == b'-' {
            self.at += 1;
        }
        let leading_zero = bytes.get(self.at) == Some(&b'0');
        let whole = self.digits();
        if whole == 0 || (leading_zero && whole > 1) {
            return Err(self.fault("this is not a number"));
        }
        if bytes.get(self.at) == Some(&b'.') {
            self.at += 1;
            if self.digits() == 0 {
                return Err(self.fault("digits are expected after the point"));
            }
        }
        if matches!(bytes.get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(bytes.get(self.at), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                return Err(self.fault("digits are expected in the exponent"));
            }
        }
        Ok(&self.text[start..self.at])
    }

    fn text(&mut self) -> Read<Cow<'a, str>> {
        let bytes = self.text.as_bytes();
        self.at += 1;
        let start = self.at;
        loop {
            match bytes.get(self.at) {
                Some(b'"') => {
                    let text = &self.text[start..self.at];
                    self.at += 1;
                    return Ok(Cow::Borrowed(text));
                }
                Some(b'\\') => break,
                Some(0..0x20) => return Err(self.fault("a control character stands in a string")),
                Some(_) => self.at += 1,
                None => return Err(self.fault("a string is not closed")),
            }
        }
        let mut owned = self.text[start..self.at].to_owned();
        loop {
            let run = self.at;
            while bytes.get(self.at).is_some_and(|b| !matches!(b, b'"' | b'\\' | 0..0x20)) {
                self.at += 1;
            }
            owned.push_str(&self.text[run..self.at]);
            match bytes.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Owned(owned));
                }
                Some(b'\\') => {
                    self.at += 1;
                    let c = self.escape()?;
                    owned.push(c);
                }
                Some(_) => return Err(self.fault("a control character stands in a string")),
                None => return Err(self.fault("a string is not closed")),
            }
        }
    }

    fn escape(&mut self) -> Read<char> {
        let Some(byte) = self.text.as_bytes().get(self.at).copied() else {
            return Err(self.fault("a string is not closed"));
        };
        self.at += 1;
        Ok(match byte {
            b'"' => '"',
            b'\\' => '\\',
            b'/' => '/',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => return self.unicode_escape(),
            _ => return Err(self.fault("this escape does not exist")),
        })
    }

    fn unicode_escape(&mut self) -> Read<char> {
        const LONE: &str = "half of a surrogate pair stands alone";
        let first = self.hex4()?;
        let code = match first {
            0xD800..=0xDBFF => {
                if !self.text[self.at..].starts_with("\\u") {
                    return Err(self.fault(LONE));
                }
                self.at += 2;
                let second = self.hex4()?;
                if !(0xDC00..=0xDFFF).contains(&second) {
                    return Err(self.fault(LONE));
                }
                0x1_0000 + ((first - 0xD800) << 10) + (second - 0xDC00)
            }
            code => code,
        };
        char::from_u32(code).ok_or_else(|| self.fault(LONE))
    }

    fn hex4(&mut self) -> Read<u32> {
        let digits = self.text.as_bytes().get(self.at..self.at + 4);
        let hex = digits.filter(|d| d.iter().all(u8::is_ascii_hexdigit));
        let Some(hex) = hex else { return Err(self.fault("four hexadecimal digits are expected")) };
        self.at += 4;
        let digit = |byte: &u8| char::from(*byte).to_digit(16).expect("checked to be hexadecimal");
        Ok(hex.iter().fold(0, |code, byte| code * 16 + digit(byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn accepts(text: &str) -> bool {
        let mut json = Json::new(text);
        json.skip().and_then(|()| json.end()).is_ok()
    }

    fn rebuild(json: &mut Json<'_>) -> Read<serde_json::Value> {
        let mut first = true;
        Ok(match json.token()? {
            Token::Object => {
                let mut map = serde_json::Map::new();
                while let Some(key) = json.next_key(&mut first)? {
                    let value = rebuild(json)?;
                    map.insert(key.into_owned(), value);
                }
                map.into()
            }
            Token::Array => {
                let mut list = Vec::new();
                while json.next_element(&mut first)? {
                    list.push(rebuild(json)?);
                }
                list.into()
            }
            Token::Text(text) => text.into_owned().into(),
            // serde_json's own reading of floats is not exact in every last digit.
            Token::Number(n) => match (n.parse::<i64>(), n.parse::<f64>()) {
                (Ok(integer), _) => integer.into(),
                (_, Ok(float)) => float.into(),
                _ => return Err(json.fault("number")),
            },
            Token::Flag(flag) => flag.into(),
            Token::Null => serde_json::Value::Null,
        })
    }

    fn value() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            (-1e300..1e300f64).prop_map(Into::into),
            ".*".prop_map(Into::into),
        ];
        leaf.prop_recursive(5, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(serde_json::Value::from),
                prop::collection::btree_map(".{0,5}", inner, 0..6)
                    .prop_map(|m| serde_json::Value::Object(m.into_iter().collect())),
            ]
        })
    }

    #[test]
    fn texts_that_are_not_json_are_refused_with_their_place() {
        for (text, at, why) in [
            ("", 0, "ends where a value"),
            ("{\"a\":1,}", 7, "a key in quotes"),
            ("[1,]", 3, "a value is expected"),
            ("01", 2, "not a number"),
            ("1.", 2, "after the point"),
            ("\"\\ud800x\"", 7, "surrogate"),
            ("\"a\nb\"", 2, "control character"),
            ("\"\\", 2, "not closed"),
            ("1 2", 2, "something follows"),
        ] {
            let mut json = Json::new(text);
            let fault = json.skip().and_then(|()| json.end()).expect_err(text);
            assert!(fault.at == at && fault.why.contains(why), "{text}: {fault}");
        }
        let deep = "[".repeat(DEPTH_MAX + 2) + &"]".repeat(DEPTH_MAX + 2);
        assert!(!accepts(&deep));
    }

    proptest! {
        #[test]
        fn what_serde_json_writes_reads_back_equal(v in value()) {
            let text = v.to_string();
            let mut json = Json::new(&text);
            let back = rebuild(&mut json).expect("valid JSON");
            prop_assert_eq!(back, v);
        }

        #[test]
        fn damaged_texts_are_accepted_and_refused_as_serde_json_does(
            v in value(), at in any::<prop::sample::Index>(), with in "[\\[\\]{}\",:0-9.eE+\\-\\\\u \\n]{0,3}"
        ) {
            let mut text = v.to_string();
            let mut cut = at.index(text.len());
            while !text.is_char_boundary(cut) { cut -= 1; }
            text.insert_str(cut, &with);
            // Raw values make serde_json check the grammar alone, not the range of numbers.
            let oracle = serde_json::from_str::<&serde_json::value::RawValue>(&text).is_ok();
            let ours = accepts(&text);
            let lone_surrogate = text.contains("\\u");
            prop_assert!(ours == oracle || lone_surrogate, "{}: ours {}, serde_json {}", text, ours, oracle);
        }
    }
}
