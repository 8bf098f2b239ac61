//! Whether a new schema may follow the earlier ones of its subject.

use apache_avro::Schema;
use apache_avro::error::CompatibilityError;
use apache_avro::schema_compatibility::{Compatibility, SchemaCompatibility};
use serde::{Deserialize, Serialize};
use std::error::Error;

/// Confluent's compatibility levels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Level {
    /// Anything may follow.
    None,
    /// New readers understand the last writer.
    Backward,
    /// New readers understand every earlier writer.
    BackwardTransitive,
    /// The last readers understand new writers.
    Forward,
    /// Every earlier reader understands new writers.
    ForwardTransitive,
    /// Both ways with the last.
    Full,
    /// Both ways with every earlier one: the rule of catalog topics, and so the default here.
    #[default]
    FullTransitive,
}

impl Level {
    fn backward(self) -> bool {
        matches!(self, Self::Backward | Self::BackwardTransitive | Self::Full | Self::FullTransitive)
    }

    fn forward(self) -> bool {
        matches!(self, Self::Forward | Self::ForwardTransitive | Self::Full | Self::FullTransitive)
    }

    fn transitive(self) -> bool {
        matches!(self, Self::BackwardTransitive | Self::ForwardTransitive | Self::FullTransitive)
    }
}

/// Returns one sentence for each earlier schema and direction that does not fit; empty means compatible.
/// `earlier` are version and schema, oldest first.
pub(super) fn complaints(level: Level, new: &Schema, earlier: &[(u32, Schema)]) -> Vec<String> {
    let compared = if level.transitive() { earlier } else { &earlier[earlier.len().saturating_sub(1)..] };
    let mut complaints = Vec::new();
    for (version, old) in compared {
        if level.backward()
            && let Some(reason) = cannot_read(old, new)
        {
            complaints.push(format!(
                "readers with the new schema cannot read records of version {version}: {reason}"
            ));
        }
        if level.forward()
            && let Some(reason) = cannot_read(new, old)
        {
            complaints.push(format!(
                "readers with version {version} cannot read records of the new schema: {reason}"
            ));
        }
    }
    complaints
}

/// Returns why some record of `writer` cannot be read with `reader`. What can be read only in part counts as
/// not readable, as in Avro's own implementation.
fn cannot_read(writer: &Schema, reader: &Schema) -> Option<String> {
    match SchemaCompatibility::can_read(writer, reader) {
        Ok(Compatibility::Full) => None,
        Ok(Compatibility::Partial) => Some(
            "the reader lacks a branch of a union or a symbol of an enumeration that the writer has"
                .to_owned(),
        ),
        Err(error) => Some(readable(&error)),
    }
}

/// Says where (a path of fields) and what, without the library's exclamations.
fn readable(error: &CompatibilityError) -> String {
    let mut path = Vec::new();
    let mut cause = error;
    while let CompatibilityError::FieldTypeMismatch(field, inner) = cause {
        path.push(field.as_str());
        cause = inner;
    }
    if let CompatibilityError::MissingDefaultValue(field) = cause {
        // The library quotes the field's debug form; its name is all that is needed.
        let name = field.split('"').nth(1).unwrap_or(field);
        path.push(name);
        return format!("the field `{}` has no default and the writer does not have it", path.join("."));
    }
    let what = match cause {
        CompatibilityError::WrongType { writer_schema_type, reader_schema_type } => {
            format!("the writer's type {writer_schema_type} cannot be read as {reader_schema_type}")
        }
        CompatibilityError::NameMismatch { writer_name, reader_name } => {
            format!("the writer's name {writer_name} is not the reader's {reader_name}")
        }
        CompatibilityError::MissingUnionElements | CompatibilityError::SchemaMismatchAllUnionElements => {
            "no branch of the union fits".to_owned()
        }
        other => {
            let text = other.to_string();
            let text = text.trim_start_matches("Incompatible schemata! ");
            match other.source() {
                Some(source) => format!("{text}: {source}"),
                None => text.to_owned(),
            }
        }
    };
    if path.is_empty() { what } else { format!("field `{}`: {what}", path.join(".")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(fields: &str) -> Schema {
        let text = format!(r#"{{"type":"record","name":"R","fields":[{fields}]}}"#);
        Schema::parse_str(&text).unwrap()
    }

    const A: &str = r#"{"name":"a","type":"long"}"#;

    #[test]
    fn a_nullable_field_with_a_default_may_be_added_and_removed() {
        let old = record(A);
        let new = record(&format!(r#"{A},{{"name":"b","type":["null","string"],"default":null}}"#));
        assert!(complaints(Level::FullTransitive, &new, &[(1, old.clone())]).is_empty());
        assert!(complaints(Level::FullTransitive, &old, &[(1, new)]).is_empty());
    }

    #[test]
    fn changes_that_break_somebody_are_explained() {
        let check = |fields: &str, expected: &[&str]| {
            assert_eq!(
                complaints(Level::FullTransitive, &record(fields), &[(1, record(A))]),
                expected,
                "{fields}"
            );
        };
        check(
            &format!(r#"{A},{{"name":"b","type":"string"}}"#),
            &[
                "readers with the new schema cannot read records of version 1: the field `b` has no default and the \
               writer does not have it",
            ],
        );
        check(
            r#"{"name":"c","type":["null","long"],"default":null}"#,
            &[
                "readers with version 1 cannot read records of the new schema: the field `a` has no default and the \
               writer does not have it",
            ],
        );
        check(
            r#"{"name":"a","type":"string"}"#,
            &[
                "readers with the new schema cannot read records of version 1: field `a`: the writer's type Long \
                 cannot be read as String",
                "readers with version 1 cannot read records of the new schema: field `a`: the writer's type String \
                 cannot be read as Long",
            ],
        );
        check(
            r#"{"name":"a","type":["null","long"]}"#,
            &[
                "readers with version 1 cannot read records of the new schema: the reader lacks a branch of a union \
               or a symbol of an enumeration that the writer has",
            ],
        );
    }

    #[test]
    fn levels_decide_direction_and_depth() {
        let with_b = record(&format!(r#"{A},{{"name":"b","type":"string"}}"#));
        let (v1, v2) = (record(A), record(&format!(r#"{A},{{"name":"b","type":"string","default":""}}"#)));
        let earlier = [(1, v1), (2, v2)];
        for (level, expected) in [
            (Level::None, 0),
            // Version 1 has no b at all; version 2 has it.
            (Level::Backward, 0),
            (Level::BackwardTransitive, 1),
            (Level::Forward, 0),
            (Level::ForwardTransitive, 0),
            (Level::Full, 0),
            (Level::FullTransitive, 1),
        ] {
            assert_eq!(complaints(level, &with_b, &earlier).len(), expected, "{level:?}");
        }
    }
}
