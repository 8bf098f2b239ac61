//! Records of the `_schemas` topic, as Confluent's registry writes them.
//!
//! Source: `io.confluent.kafka.schemaregistry.storage` (`SchemaKey`, `SchemaValue`, `ConfigKey`,
//! `ConfigValue`). The order of the fields in a key matters: compaction compares bytes.

use super::compatibility::Level;
use serde::{Deserialize, Serialize};

/// A key; other kinds (`MODE`, `NOOP`, `DELETE_SUBJECT` …) exist and are left alone.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "keytype", rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Key {
    Schema {
        subject: String,
        version: u32,
        magic: u8,
    },
    Config {
        subject: Option<String>,
        magic: u8,
    },
    #[serde(other)]
    Unknown,
}

impl Key {
    pub(super) fn schema(subject: &str, version: u32) -> Self {
        Self::Schema { subject: subject.to_owned(), version, magic: 1 }
    }

    pub(super) fn config(subject: Option<&str>) -> Self {
        Self::Config { subject: subject.map(str::to_owned), magic: 0 }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers always serialise")
    }
}

/// The value under a schema key.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SchemaValue {
    pub(super) subject: String,
    pub(super) version: u32,
    pub(super) id: u32,
    pub(super) schema: String,
    #[serde(default)]
    pub(super) deleted: bool,
}

/// The value under a configuration key.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ConfigValue {
    pub(super) compatibility_level: Level,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_bytes_of_confluent() {
        for (key, expected) in [
            (Key::schema("t-value", 3), r#"{"keytype":"SCHEMA","subject":"t-value","version":3,"magic":1}"#),
            (Key::config(None), r#"{"keytype":"CONFIG","subject":null,"magic":0}"#),
            (Key::config(Some("t")), r#"{"keytype":"CONFIG","subject":"t","magic":0}"#),
        ] {
            assert_eq!(String::from_utf8(key.to_bytes()).unwrap(), expected);
            assert_eq!(serde_json::from_str::<Key>(expected).unwrap(), key);
        }
        let noop = r#"{"keytype":"NOOP","magic":0}"#;
        assert_eq!(serde_json::from_str::<Key>(noop).unwrap(), Key::Unknown);
    }
}
