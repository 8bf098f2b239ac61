//! TOML that people write: any fault is reported with file, line and column, and a misspelt key with the
//! key that was probably meant.

use serde::de::DeserializeOwned;
use std::ops::Range;
use toml::de::{DeTable, DeValue};

/// A fault in a file that a person wrote: where it is and what is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{file}:{line}:{column}: {what}")]
pub struct FileError {
    /// The file as it was named to the reader.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong and, where it is known, what helps.
    pub what: String,
}

impl FileError {
    /// Places a fault at a byte offset of `text`; an offset behind the end is the end.
    pub fn at(file: &str, text: &str, offset: usize, what: impl Into<String>) -> Self {
        let (line, column) = line_and_column(text, offset);
        // One fault is one line, whatever the reader beneath wrote.
        let what: String = what.into();
        let what =
            what.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>();
        Self { file: file.to_owned(), line, column, what: what.join("; ") }
    }

    /// Places a fault at the value under `path`, or at the innermost table on the way that exists: keys by
    /// name, elements of arrays by number (`["feed", "2", "site"]`).
    pub fn under(file: &str, text: &str, path: &[&str], what: impl Into<String>) -> Self {
        Self::at(file, text, span_of(text, path).start, what)
    }
}

/// Reads a file's text as `T`, whose types should carry `#[serde(deny_unknown_fields)]`.
///
/// # Errors
/// [`FileError`] with the position of the first fault: the text is not TOML, a key is unknown (the nearest
/// known one is suggested and all are named), missing, or of the wrong type.
pub fn parse<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, FileError> {
    parse_with(file, text, |message| message.to_owned())
}

/// Reads a file's text that may hold secrets: as [`parse`], but a fault repeats no text of a value.
///
/// # Errors
/// As [`parse`].
pub fn parse_secret<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, FileError> {
    parse_with(file, text, without_value)
}

fn parse_with<T: DeserializeOwned>(
    file: &str,
    text: &str,
    reword: impl Fn(&str) -> String,
) -> Result<T, FileError> {
    toml::from_str(text).map_err(|e| {
        let offset = e.span().map_or(0, |span| span.start);
        FileError::at(file, text, offset, explain(&reword(e.message())))
    })
}

/// Takes the value out of serde's message. It stands before the last word of what was expected.
fn without_value(message: &str) -> String {
    let expected = |what: &str| message.rfind(what).map_or("", |at| &message[at..]);
    for (begin, what) in [
        ("invalid type: string ", ", expected "),
        ("invalid value: string ", ", expected "),
        ("unknown variant `", "`, expected "),
    ] {
        if message.starts_with(begin) {
            let rest = expected(what);
            return format!("{}{rest}", begin.trim_end());
        }
    }
    message.to_owned()
}

/// Returns the known name nearest to `name`, or `None` where nothing is near enough to be a slip.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase();
    let score = |k: &str| {
        let k = k.to_lowercase();
        let is_part = name.len() >= 4 && (k.contains(&name) || name.contains(&k) && k.len() >= 4);
        strsim::jaro_winkler(&name, &k).max(if is_part { 0.8 } else { 0.0 })
    };
    known
        .into_iter()
        .map(|k| (score(k), k))
        .filter(|(score, _)| *score >= 0.75)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, k)| k)
}

/// Returns ``; did you mean `x`?`` or, where nothing is near, nothing.
pub fn suggestion<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, known).map(|k| format!("; did you mean `{k}`?")).unwrap_or_default()
}

/// Rewrites serde's messages about names into ours. Other messages already say what was expected.
fn explain(message: &str) -> String {
    let names = quoted(message);
    let unknown = |what: &str| {
        let (name, known) = names.split_first().expect("serde quotes the unknown name");
        let hint = suggestion(name, known.iter().copied());
        let list = known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
        let list = if known.is_empty() { "none".to_owned() } else { list };
        // A value that may be a secret has no name here.
        let shown = if name.is_empty() { String::new() } else { format!(" `{name}`") };
        format!("unknown {what}{shown}{hint} (known: {list})")
    };
    if message.starts_with("unknown field `") {
        unknown("key")
    } else if message.starts_with("unknown variant `") {
        unknown("value")
    } else if message.starts_with("missing field `") {
        format!("the key `{}` is missing", names[0])
    } else if message.starts_with("duplicate key") || message.starts_with("duplicate field") {
        format!("{message}: every key may be given once")
    } else {
        message.to_owned()
    }
}

/// Returns the texts between backticks. A name with a backtick in it is cut short, never misread: TOML's
/// bare keys have none and quoted ones are unknown in any case.
fn quoted(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = &text[..end];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn span_of(text: &str, path: &[&str]) -> Range<usize> {
    let Ok(root) = DeTable::parse(text) else { return 0..0 };
    let mut span = 0..0;
    let Some((first, rest)) = path.split_first() else { return span };
    let Some((key, mut value)) = root.get_ref().get_key_value(*first) else { return span };
    span = if rest.is_empty() { value.span() } else { key.span() };
    for (at, step) in rest.iter().enumerate() {
        let is_last = at + 1 == rest.len();
        let next = match value.get_ref() {
            DeValue::Table(table) => {
                table.get_key_value(*step).map(|(k, v)| (if is_last { v.span() } else { k.span() }, v))
            }
            DeValue::Array(array) => {
                step.parse().ok().and_then(|i: usize| array.get(i)).map(|v| (v.span(), v))
            }
            _ => None,
        };
        let Some((next_span, next_value)) = next else { return span };
        (span, value) = (next_span, next_value);
    }
    span
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only the errors of reading it are tested")]
    struct Sample {
        name: String,
        partitions: u32,
        #[serde(default)]
        cleanup: Option<Cleanup>,
        #[serde(default)]
        part: Vec<Part>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Cleanup {
        Delete,
        Compact,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only the errors of reading it are tested")]
    struct Part {
        filter: String,
    }

    #[test]
    fn every_fault_has_a_position_and_a_remedy() {
        for (text, expected) in [
            (
                "name = 'a'\npartitons = 3\n",
                "t.toml:2:1: unknown key `partitons`; did you mean `partitions`? (known: `name`, `partitions`, `cleanup`, `part`)",
            ),
            ("name = 'a'\n", "t.toml:1:1: the key `partitions` is missing"),
            ("name = 'a'\npartitions = 'six'\n", "t.toml:2:14: invalid type: string \"six\", expected u32"),
            (
                "name = 'a'\npartitions = 1\ncleanup = 'compacted'",
                "t.toml:3:11: unknown value `compacted`; did you mean `compact`? (known: `delete`, `compact`)",
            ),
            (
                "name = 'a'\npartitions = 1\n[[part]]\n  filtre = 'x'\n",
                "t.toml:4:3: unknown key `filtre`; did you mean `filter`? (known: `filter`)",
            ),
            ("name = 'ä' x", "t.toml:1:12: unexpected key or value, expected newline, `#`"),
        ] {
            let error = parse::<Sample>("t.toml", text).expect_err(text);
            assert_eq!(error.to_string(), expected, "{text}");
        }
    }

    #[test]
    fn a_fault_in_a_file_with_secrets_repeats_no_value() {
        for (text, expected) in [
            (
                "name = 'a'\npartitions = 's3cret, expected s3cret'\n",
                "2:14: invalid type: string, expected u32",
            ),
            ("part = 's3cret'", "1:8: invalid type: string, expected a sequence"),
            ("cleanup = 's3`cret'", "1:11: unknown value (known: `delete`, `compact`)"),
            (
                "partitons = 's3cret'",
                "1:1: unknown key `partitons`; did you mean `partitions`? (known: `name`, `partitions`, `cleanup`, `part`)",
            ),
        ] {
            let error = parse_secret::<Sample>("t.toml", text).expect_err(text);
            assert_eq!(error.to_string(), format!("t.toml:{expected}"), "{text}");
        }
    }

    #[test]
    fn a_fault_found_later_is_placed_at_its_value() {
        let text = "name = 'a'\n\n[[feed]]\nsite = 'x'\n[[feed]]\nfilter = 'f'\nsite = 'y'\n";
        let at = |path: &[&str]| {
            let e = FileError::under("f", text, path, "w");
            (e.line, e.column)
        };
        assert_eq!(at(&["name"]), (1, 8));
        assert_eq!(at(&["feed", "1", "site"]), (7, 8));
        assert_eq!(at(&["feed", "1", "time"]).0, 5, "a missing key is placed at its table");
        assert_eq!(at(&["nothing"]), (1, 1));
    }

    #[test]
    fn only_a_slip_is_suggested() {
        assert_eq!(nearest("retenton", ["retention", "partitions"]), Some("retention"));
        assert_eq!(nearest("xyz", ["retention", "partitions"]), None);
    }
}
