//! What a topic's Avro schema must have, and how one may differ from its predecessor within a major
//! version.
//!
//! Schemas are compared in a resolved form: names are full, `{"type": "string"}` is `"string"`; so a
//! registry that rewrites the text makes no difference.

use super::name::TopicName;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Fields of the envelope that every schema has, with their types.
const REQUIRED: [(&str, Wanted); 10] = [
    ("message_id", Wanted::Logical("string", "uuid")),
    ("trace_id", Wanted::Plain("string")),
    ("identity", Wanted::Plain("string")),
    ("site_id", Wanted::Plain("string")),
    ("device_id", Wanted::Plain("string")),
    ("received_by", Wanted::Plain("string")),
    ("stream", Wanted::Plain("string")),
    ("occurred_at", Wanted::Logical("long", "timestamp-micros")),
    ("received_at", Wanted::Logical("long", "timestamp-micros")),
    ("flags", Wanted::ArrayOf("string")),
];

/// Fields of the envelope that a schema may lack; where present they are nullable with default null.
const OPTIONAL: [(&str, &str); 9] = [
    ("request_id", "string"),
    ("request_code", "string"),
    ("response_code", "string"),
    ("reason", "string"),
    ("agent_version", "string"),
    ("config_version", "string"),
    ("epoch", "long"),
    ("seq", "long"),
    ("clock_offset", "long"),
];

#[derive(Clone, Copy)]
enum Wanted {
    Plain(&'static str),
    Logical(&'static str, &'static str),
    ArrayOf(&'static str),
}

impl Wanted {
    fn meets(self, found: &Type) -> bool {
        match self {
            Self::Plain(name) => *found == Type::plain(name),
            Self::Logical(name, logical) => {
                *found == Type::Primitive { name: name.into(), logical: Some(logical.into()) }
            }
            Self::ArrayOf(name) => *found == Type::Array(Box::new(Type::plain(name))),
        }
    }

    fn describe(self) -> String {
        match self {
            Self::Plain(name) => format!("`{name}`"),
            Self::Logical(name, logical) => format!("`{name}` with logicalType `{logical}`"),
            Self::ArrayOf(name) => format!("an array of `{name}`"),
        }
    }
}

/// An Avro type with names resolved.
#[derive(Clone, Debug, PartialEq)]
enum Type {
    Primitive {
        name: String,
        logical: Option<String>,
    },
    Array(Box<Type>),
    Map(Box<Type>),
    Union(Vec<Type>),
    Enum {
        name: String,
        symbols: Vec<Value>,
    },
    Fixed {
        name: String,
        size: Option<u64>,
        logical: Option<String>,
    },
    Record {
        name: String,
        fields: Vec<Field>,
    },
    /// A name declared before, or the record itself.
    Named(String),
}

#[derive(Clone, Debug, PartialEq)]
struct Field {
    name: String,
    of: Type,
    default: Option<Value>,
}

impl Type {
    fn plain(name: &str) -> Self {
        Self::Primitive { name: name.to_owned(), logical: None }
    }

    fn is_nullable(&self) -> bool {
        matches!(self, Self::Union(branches) if branches.first() == Some(&Self::plain("null")))
    }
}

/// Checks that `text` is a valid Avro record for `topic` with the envelope's fields.
///
/// # Errors
/// Every fault, as (byte offset within the text where it is known, what).
pub fn check(topic: &TopicName, text: &str) -> Result<(), Vec<(usize, String)>> {
    let json: Value = serde_json::from_str(text)
        .map_err(|e| vec![(offset(text, e.line(), e.column()), format!("the schema is not JSON: {e}"))])?;
    if let Err(e) = text.parse::<serde_avro_fast::Schema>() {
        return Err(vec![(0, format!("the schema is not Avro: {e}"))]);
    }
    let root = resolve(&json).map_err(|what| vec![(0, what)])?;
    let Type::Record { name, fields } = &root else {
        return Err(vec![(0, "the schema is not a record".to_owned())]);
    };
    let mut faults = Vec::new();
    let namespace = topic.avro_namespace();
    if name.rsplit_once('.').map(|(n, _)| n) != Some(namespace.as_str()) {
        faults.push((
            find(text, "namespace"),
            format!("the record `{name}` is not in the namespace `{namespace}` of topic `{topic}`"),
        ));
    }
    for (field, wanted) in REQUIRED {
        match fields.iter().find(|f| f.name == field) {
            None => faults
                .push((0, format!("the envelope's field `{field}` is missing: it is {}", wanted.describe()))),
            Some(found) if !wanted.meets(&found.of) => {
                faults.push((
                    find(text, field),
                    format!("the envelope's field `{field}` must be {}", wanted.describe()),
                ));
            }
            Some(_) => {}
        }
    }
    for (field, of) in OPTIONAL {
        let wanted = Type::Union(vec![Type::plain("null"), Type::plain(of)]);
        let Some(found) = fields.iter().find(|f| f.name == field) else { continue };
        if found.of != wanted || found.default != Some(Value::Null) {
            let what =
                format!("the envelope's field `{field}` must be [\"null\", \"{of}\"] with default null");
            faults.push((find(text, field), what));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// Returns the optional fields of the envelope that a schema lacks.
pub(crate) fn lacking(text: &str) -> Vec<&'static str> {
    let json: Value = serde_json::from_str(text).unwrap_or_default();
    let fields = json.get("fields").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let has = |name: &str| fields.iter().any(|f| f.get("name").and_then(Value::as_str) == Some(name));
    OPTIONAL.iter().map(|(name, _)| *name).filter(|name| !has(name)).collect()
}

/// What a newer schema has that an older one lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evolution {
    /// Dotted names of the fields that were added.
    pub added: Vec<String>,
    /// Whether anything differs at all, documentation included.
    pub differs: bool,
}

/// Compares a schema with its predecessor within a major version: only nullable fields with default null
/// may be added, at any depth; documentation may change.
///
/// # Errors
/// Every reason why readers or writers of the older schema would break.
pub fn compare(older: &str, newer: &str) -> Result<Evolution, Vec<String>> {
    let read = |text: &str, which: &str| -> Result<(Value, Type), Vec<String>> {
        let json: Value =
            serde_json::from_str(text).map_err(|e| vec![format!("the {which} schema is not JSON: {e}")])?;
        let resolved = resolve(&json).map_err(|e| vec![format!("the {which} schema is not Avro: {e}")])?;
        Ok((json, resolved))
    };
    let (older_json, older) = read(older, "registered")?;
    let (newer_json, newer) = read(newer, "new")?;
    let mut found = Differences::default();
    found.walk("", &older, &newer);
    if !found.breaking.is_empty() {
        return Err(found.breaking);
    }
    let differs = older != newer || docs(&older_json) != docs(&newer_json);
    Ok(Evolution { added: found.added, differs })
}

#[derive(Default)]
struct Differences {
    added: Vec<String>,
    breaking: Vec<String>,
}

impl Differences {
    fn walk(&mut self, path: &str, older: &Type, newer: &Type) {
        let here = if path.is_empty() { "the record" } else { path };
        match (older, newer) {
            (Type::Record { name: a, fields: old }, Type::Record { name: b, fields: new }) => {
                if a != b {
                    self.breaking.push(format!("{here}: its name changes from `{a}` to `{b}`"));
                }
                self.walk_fields(path, old, new);
            }
            (Type::Array(a), Type::Array(b)) => self.walk(&format!("{path}[]"), a, b),
            (Type::Map(a), Type::Map(b)) => self.walk(&format!("{path}{{}}"), a, b),
            (Type::Union(a), Type::Union(b)) if a.len() == b.len() => {
                a.iter().zip(b).for_each(|(a, b)| self.walk(path, a, b));
            }
            (a, b) if a == b => {}
            (a, b) => self.breaking.push(format!("{here}: its type changes from {} to {}", show(a), show(b))),
        }
    }

    fn walk_fields(&mut self, path: &str, old: &[Field], new: &[Field]) {
        let dotted = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        for before in old {
            let name = dotted(&before.name);
            match new.iter().find(|f| f.name == before.name) {
                None => self.breaking.push(format!("{name}: the field is removed")),
                Some(after) => {
                    self.walk(&name, &before.of, &after.of);
                    if before.default != after.default {
                        self.breaking.push(format!("{name}: its default changes"));
                    }
                }
            }
        }
        for after in new.iter().filter(|f| old.iter().all(|o| o.name != f.name)) {
            let name = dotted(&after.name);
            if after.of.is_nullable() && after.default == Some(Value::Null) {
                self.added.push(name);
            } else {
                self.breaking.push(format!(
                    "{name}: a field may be added only as [\"null\", …] with default null, this one is {}",
                    show(&after.of)
                ));
            }
        }
    }
}

fn show(of: &Type) -> String {
    match of {
        Type::Primitive { name, logical: None } => name.clone(),
        Type::Primitive { name, logical: Some(logical) } => format!("{name} ({logical})"),
        Type::Array(items) => format!("array of {}", show(items)),
        Type::Map(values) => format!("map of {}", show(values)),
        Type::Union(branches) => format!("[{}]", branches.iter().map(show).collect::<Vec<_>>().join(", ")),
        Type::Enum { name, .. } => format!("enum {name}"),
        Type::Fixed { name, .. } => format!("fixed {name}"),
        Type::Record { name, .. } | Type::Named(name) => name.clone(),
    }
}

fn resolve(json: &Value) -> Result<Type, String> {
    resolve_in(json, "", 0)
}

/// Depth that no schema of ours comes near; deeper input is refused before it exhausts the stack.
const DEPTH_MAX: usize = 64;

fn resolve_in(json: &Value, namespace: &str, depth: usize) -> Result<Type, String> {
    if depth > DEPTH_MAX {
        return Err(format!("it nests deeper than {DEPTH_MAX}"));
    }
    match json {
        Value::String(name) => Ok(named(name, namespace)),
        Value::Array(branches) => {
            let branches: Result<Vec<Type>, String> =
                branches.iter().map(|b| resolve_in(b, namespace, depth + 1)).collect();
            Ok(Type::Union(branches?))
        }
        Value::Object(object) => resolve_object(object, namespace, depth),
        other => Err(format!("{other} is not a type")),
    }
}

fn resolve_object(object: &Map<String, Value>, namespace: &str, depth: usize) -> Result<Type, String> {
    let text = |key: &str| object.get(key).and_then(Value::as_str);
    let logical = text("logicalType").map(str::to_owned);
    let kind = match object.get("type") {
        Some(Value::String(kind)) => kind.as_str(),
        Some(inner) => return resolve_in(inner, namespace, depth + 1),
        None => return Err("a type has no `type`".to_owned()),
    };
    let full_name = || -> Result<(String, String), String> {
        let name = text("name").ok_or_else(|| format!("a {kind} has no name"))?;
        let full = match (name.contains('.'), text("namespace").unwrap_or(namespace)) {
            (true, _) => name.to_owned(),
            (false, "") => name.to_owned(),
            (false, namespace) => format!("{namespace}.{name}"),
        };
        let inner = full.rsplit_once('.').map_or_else(String::new, |(n, _)| n.to_owned());
        Ok((full, inner))
    };
    let part = |key: &str| -> Result<Box<Type>, String> {
        let part = object.get(key).ok_or_else(|| format!("a type has no `{key}`"))?;
        Ok(Box::new(resolve_in(part, namespace, depth + 1)?))
    };
    match kind {
        "array" => Ok(Type::Array(part("items")?)),
        "map" => Ok(Type::Map(part("values")?)),
        "enum" => {
            let symbols = object.get("symbols").and_then(Value::as_array).cloned().unwrap_or_default();
            Ok(Type::Enum { name: full_name()?.0, symbols })
        }
        "fixed" => {
            let size = object.get("size").and_then(Value::as_u64);
            Ok(Type::Fixed { name: full_name()?.0, size, logical })
        }
        "record" => {
            let (name, inner) = full_name()?;
            let fields = object.get("fields").and_then(Value::as_array).ok_or("a record has no fields")?;
            let fields: Result<Vec<Field>, String> =
                fields.iter().map(|f| resolve_field(f, &inner, depth)).collect();
            Ok(Type::Record { name, fields: fields? })
        }
        primitive => match named(primitive, namespace) {
            Type::Primitive { name, .. } => Ok(Type::Primitive { name, logical }),
            other => Ok(other),
        },
    }
}

fn resolve_field(json: &Value, namespace: &str, depth: usize) -> Result<Field, String> {
    let name = json.get("name").and_then(Value::as_str).ok_or("a field has no name")?;
    let of = json.get("type").ok_or_else(|| format!("the field `{name}` has no type"))?;
    Ok(Field {
        name: name.to_owned(),
        of: resolve_in(of, namespace, depth + 1)?,
        default: json.get("default").cloned(),
    })
}

fn named(name: &str, namespace: &str) -> Type {
    match name {
        "null" | "boolean" | "int" | "long" | "float" | "double" | "bytes" | "string" => Type::plain(name),
        _ if name.contains('.') || namespace.is_empty() => Type::Named(name.to_owned()),
        _ => Type::Named(format!("{namespace}.{name}")),
    }
}

/// Collects the documentation by place, because a change of it is worth a new version too.
fn docs(json: &Value) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    collect_docs("", json, &mut out);
    out
}

fn collect_docs(path: &str, json: &Value, out: &mut BTreeMap<String, String>) {
    match json {
        Value::Object(object) => {
            let name = object.get("name").and_then(Value::as_str).unwrap_or_default();
            let path = format!("{path}/{name}");
            if let Some(doc) = object.get("doc").and_then(Value::as_str) {
                out.insert(path.clone(), doc.to_owned());
            }
            for key in ["type", "items", "values", "fields"] {
                if let Some(inner) = object.get(key) {
                    collect_docs(&path, inner, out);
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect_docs(path, item, out)),
        _ => {}
    }
}

fn find(text: &str, name: &str) -> usize {
    text.find(&format!("\"{name}\"")).unwrap_or(0)
}

fn offset(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (before + column.saturating_sub(1)).min(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(fields: &str) -> String {
        format!(r#"{{"type":"record","name":"R","namespace":"throughline.device","fields":[{fields}]}}"#)
    }

    #[test]
    fn only_nullable_fields_may_be_added() {
        let base = record(r#"{"name":"a","type":"string"}"#);
        for (newer, expected) in [
            (record(r#"{"name":"a","type":{"type":"string"}}"#), Ok(vec![])),
            (
                record(r#"{"name":"a","type":"string"},{"name":"b","type":["null","long"],"default":null}"#),
                Ok(vec!["b"]),
            ),
            (
                record(r#"{"name":"a","type":"string"},{"name":"b","type":"long"}"#),
                Err("b: a field may be added only as"),
            ),
            (
                record(r#"{"name":"a","type":"string"},{"name":"b","type":"long","default":0}"#),
                Err("b: a field may be added only as"),
            ),
            (record(r#"{"name":"a","type":"long"}"#), Err("a: its type changes from string to long")),
            (record(""), Err("a: the field is removed")),
            (base.replace("\"R\"", "\"S\""), Err("its name changes")),
        ] {
            match (compare(&base, &newer), expected) {
                (Ok(found), Ok(added)) => assert_eq!(found.added, added, "{newer}"),
                (Err(reasons), Err(expected)) => {
                    assert!(reasons.iter().any(|r| r.contains(expected)), "{newer}: {reasons:?}");
                }
                (found, expected) => panic!("{newer}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn what_a_registry_rewrites_is_no_difference_and_documentation_is_one() {
        let ours = record(
            r#"{"name":"l","type":{"type":"array","items":{"type":"record","name":"M","namespace":"throughline.device","doc":"one","fields":[]}}},
               {"name":"k","type":{"type":"array","items":"throughline.device.M"}}"#,
        );
        let theirs = record(
            r#"{"name":"l","type":{"type":"array","items":{"type":"record","name":"M","doc":"one","fields":[]}}},{"name":"k","type":{"type":"array","items":"M"}}"#,
        );
        assert_eq!(compare(&ours, &theirs), Ok(Evolution::default()));
        let documented = theirs.replace("one", "two");
        assert_eq!(compare(&ours, &documented), Ok(Evolution { added: vec![], differs: true }));
    }
}
