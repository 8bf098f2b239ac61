//! What the registry knows. Pure: changes are planned here, written by somebody else, and applied when they
//! come back as records, in the same way as at the start.

use super::compatibility::{Level, complaints};
use super::records::{ConfigValue, Key, SchemaValue};
use apache_avro::Schema;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};

/// Schemas by id, and versions by subject.
#[derive(Debug, Default)]
pub struct State {
    /// Text by id, as it was registered.
    schemas: BTreeMap<u32, String>,
    /// Id by canonical text: equal schemas have one id in all subjects.
    ids: HashMap<String, u32>,
    /// Id by version by subject.
    subjects: BTreeMap<String, BTreeMap<u32, u32>>,
    level: Level,
    levels: BTreeMap<String, Level>,
}

/// One version of a subject.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Version<'a> {
    /// The subject's name.
    pub subject: &'a str,
    /// The version's number, from 1.
    pub version: u32,
    /// The schema's id.
    pub id: u32,
    /// The schema's text.
    pub schema: &'a str,
}

/// What a change comes to.
#[derive(Debug)]
pub struct Plan {
    /// Key and value to be written, or `None` where nothing changes.
    pub record: Option<(Vec<u8>, Vec<u8>)>,
    /// The answer once they are.
    pub written: Written,
}

/// The answer to a change.
#[derive(Debug, PartialEq, Eq)]
pub enum Written {
    /// The id of the registered schema.
    Id(u32),
    /// The level that is now in force.
    Level(Level),
}

/// An error as Confluent's API spells it: HTTP status, code, message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// Confluent's code.
    pub code: u32,
    /// What went wrong.
    pub message: String,
}

impl ApiError {
    pub(super) fn new(status: u16, code: u32, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    pub(super) fn no_subject(subject: &str) -> Self {
        Self::new(404, 40401, format!("Subject '{subject}' not found."))
    }

    fn no_version(version: &str) -> Self {
        Self::new(404, 40402, format!("Version {version} not found."))
    }

    fn no_schema(what: &str) -> Self {
        Self::new(404, 40403, format!("Schema {what}not found"))
    }

    fn invalid_schema(reason: &str) -> Self {
        Self::new(422, 42201, format!("Invalid schema: {reason}"))
    }

    pub(super) fn store(reason: &str) -> Self {
        Self::new(500, 50001, format!("Error in the backend data store: {reason}"))
    }
}

impl State {
    /// Takes over one record of the topic. What is not understood (other kinds of keys, references to other
    /// schema types) is left out with a warning: the topic may have been another registry's.
    pub fn apply(&mut self, key: &[u8], value: Option<&[u8]>) {
        let applied = match serde_json::from_slice(key) {
            Ok(Key::Schema { subject, version, .. }) => self.apply_schema(&subject, version, value),
            Ok(Key::Config { subject, .. }) => self.apply_config(subject, value),
            Ok(Key::Unknown) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = applied {
            tracing::warn!(%error, "a record of the registry's topic is not understood and left out");
        }
    }

    fn apply_schema(&mut self, subject: &str, version: u32, value: Option<&[u8]>) -> serde_json::Result<()> {
        let value: Option<SchemaValue> = value.map(serde_json::from_slice).transpose()?;
        if let Some(SchemaValue { id, schema, deleted, .. }) = &value {
            let text = canonical(&serde_json::from_str(schema)?);
            // Values in Kafka carry the id: it never comes to mean another schema.
            let known = self.schemas.get(id).map(|known| serde_json::from_str(known)).transpose()?;
            let is_another = known.is_some_and(|known| canonical(&known) != text);
            if is_another && !deleted {
                return Err(serde::de::Error::custom(format!("another schema has the id {id}")));
            }
            if !is_another {
                self.ids.entry(text).or_insert(*id);
                self.schemas.insert(*id, schema.clone());
            }
        }
        match value.filter(|value| !value.deleted) {
            Some(value) => {
                self.subjects.entry(subject.to_owned()).or_default().insert(version, value.id);
            }
            None => {
                if let Some(versions) = self.subjects.get_mut(subject) {
                    versions.remove(&version);
                }
                self.subjects.retain(|_, versions| !versions.is_empty());
            }
        }
        Ok(())
    }

    fn apply_config(&mut self, subject: Option<String>, value: Option<&[u8]>) -> serde_json::Result<()> {
        let level =
            value.map(serde_json::from_slice::<ConfigValue>).transpose()?.map(|v| v.compatibility_level);
        match (subject, level) {
            (None, level) => self.level = level.unwrap_or_default(),
            (Some(subject), Some(level)) => {
                self.levels.insert(subject, level);
            }
            (Some(subject), None) => {
                self.levels.remove(&subject);
            }
        }
        Ok(())
    }

    /// Plans the registration of a schema under a subject.
    pub fn plan_register(&self, subject: &str, text: &str) -> Result<Plan, ApiError> {
        let (schema, canonical) = parse(text)?;
        let known_id = self.ids.get(&canonical).copied();
        let versions = self.subjects.get(subject);
        if let Some(id) = known_id
            && versions.is_some_and(|versions| versions.values().any(|known| *known == id))
        {
            return Ok(Plan { record: None, written: Written::Id(id) });
        }
        let complaints = complaints(self.level_of(subject), &schema, &self.parsed_versions(subject)?);
        if !complaints.is_empty() {
            let details = complaints.join("; ");
            let message = format!(
                "Schema being registered is incompatible with an earlier schema for subject \"{subject}\", details: \
                 [{details}]"
            );
            return Err(ApiError::new(409, 409, message));
        }
        let used_up =
            || ApiError::store("the largest number is in use: the topic holds what no registry wrote");
        let next_id = || self.schemas.last_key_value().map_or(Some(1), |(last, _)| last.checked_add(1));
        let id = known_id.or_else(next_id).ok_or_else(used_up)?;
        let latest = versions.and_then(|versions| versions.last_key_value());
        let version = latest.map_or(Some(1), |(last, _)| last.checked_add(1)).ok_or_else(used_up)?;
        let value =
            SchemaValue { subject: subject.to_owned(), version, id, schema: text.to_owned(), deleted: false };
        let value = serde_json::to_vec(&value).expect("strings and numbers always serialise");
        Ok(Plan { record: Some((Key::schema(subject, version).to_bytes(), value)), written: Written::Id(id) })
    }

    /// Plans a new level of a subject, or of all that have none of their own.
    pub fn plan_level(subject: Option<&str>, level: Level) -> Plan {
        let value = serde_json::to_vec(&ConfigValue { compatibility_level: level });
        let value = value.expect("an enumeration always serialises");
        Plan { record: Some((Key::config(subject).to_bytes(), value)), written: Written::Level(level) }
    }

    /// Compares a schema with versions of a subject: one of them, or those that the level asks for. Returns
    /// complaints; empty means compatible.
    pub fn check(&self, subject: &str, version: Option<&str>, text: &str) -> Result<Vec<String>, ApiError> {
        let (schema, _) = parse(text)?;
        let earlier = match version {
            Some(version) => {
                let found = self.version(subject, version)?;
                vec![(found.version, parse(found.schema)?.0)]
            }
            None => self.parsed_versions(subject)?,
        };
        Ok(complaints(self.level_of(subject), &schema, &earlier))
    }

    /// Finds the version of a subject that has this schema.
    pub fn lookup(&self, subject: &str, text: &str) -> Result<Version<'_>, ApiError> {
        let (subject, versions) = self.subject(subject)?;
        let (_, canonical) = parse(text)?;
        let id = self.ids.get(&canonical).copied();
        let found = versions.iter().find(|(_, known)| Some(**known) == id);
        let (version, id) = found.ok_or_else(|| ApiError::no_schema(""))?;
        Ok(Version { subject, version: *version, id: *id, schema: &self.schemas[id] })
    }

    /// Returns a version of a subject by its number, or `latest` (also spelled −1).
    pub fn version(&self, subject: &str, version: &str) -> Result<Version<'_>, ApiError> {
        let (subject, versions) = self.subject(subject)?;
        let found = if version == "latest" || version == "-1" {
            versions.last_key_value()
        } else {
            let number: i32 = version.parse().ok().filter(|number| *number > 0).ok_or_else(|| {
                let message = format!(
                    "The specified version '{version}' is not a valid version id. Allowed values are between [1, 2^31-1] \
                     and the string \"latest\""
                );
                ApiError::new(422, 42202, message)
            })?;
            versions.get_key_value(&number.unsigned_abs())
        };
        let (version, id) = found.ok_or_else(|| ApiError::no_version(version))?;
        Ok(Version { subject, version: *version, id: *id, schema: &self.schemas[id] })
    }

    /// Returns the version numbers of a subject.
    pub fn versions(&self, subject: &str) -> Result<Vec<u32>, ApiError> {
        Ok(self.subject(subject)?.1.keys().copied().collect())
    }

    /// Returns the text of a schema.
    pub fn schema(&self, id: &str) -> Result<&str, ApiError> {
        let found = id.parse().ok().and_then(|number: u32| self.schemas.get(&number));
        found.map(String::as_str).ok_or_else(|| ApiError::no_schema(&format!("{id} ")))
    }

    /// Returns the subjects and versions that use a schema.
    pub fn users_of(&self, id: &str) -> Result<Vec<(&str, u32)>, ApiError> {
        self.schema(id)?;
        let number: Option<u32> = id.parse().ok();
        let all =
            self.subjects.iter().flat_map(|(subject, versions)| versions.iter().map(move |v| (subject, v)));
        Ok(all
            .filter(|(_, (_, id))| Some(**id) == number)
            .map(|(s, (version, _))| (s.as_str(), *version))
            .collect())
    }

    /// Returns all subjects in alphabetical order.
    pub fn subjects(&self) -> Vec<&str> {
        self.subjects.keys().map(String::as_str).collect()
    }

    /// Returns the level for all subjects without one of their own.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Returns the level that a subject has of its own.
    pub fn own_level(&self, subject: &str) -> Option<Level> {
        self.levels.get(subject).copied()
    }

    /// Returns the level in force for a subject.
    pub fn level_of(&self, subject: &str) -> Level {
        self.own_level(subject).unwrap_or(self.level)
    }

    fn subject(&self, subject: &str) -> Result<(&str, &BTreeMap<u32, u32>), ApiError> {
        let found = self.subjects.get_key_value(subject);
        let (name, versions) = found.ok_or_else(|| ApiError::no_subject(subject))?;
        Ok((name, versions))
    }

    fn parsed_versions(&self, subject: &str) -> Result<Vec<(u32, Schema)>, ApiError> {
        let versions = self.subjects.get(subject).into_iter().flatten();
        versions.map(|(version, id)| Ok((*version, parse(&self.schemas[id])?.0))).collect()
    }
}

/// Parses a schema; also returns the text by which schemas are compared.
fn parse(text: &str) -> Result<(Schema, String), ApiError> {
    let schema = Schema::parse_str(text).map_err(|error| ApiError::invalid_schema(&error.to_string()))?;
    let value = serde_json::from_str(text).map_err(|error| ApiError::invalid_schema(&error.to_string()))?;
    Ok((schema, canonical(&value)))
}

/// Spells a schema so that white space and the order of attributes make no difference; everything else does,
/// documentation included, as with Confluent.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let sorted: BTreeMap<_, _> = members.iter().collect();
            let members: Vec<_> =
                sorted.iter().map(|(key, value)| format!("{key:?}:{}", canonical(value))).collect();
            format!("{{{}}}", members.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: &str = r#"{"type":"record","name":"R","fields":[{"name":"a","type":"long"}]}"#;
    const A_SPACED: &str =
        r#"{ "name": "R", "type": "record", "fields": [ {"type": "long", "name": "a"} ] }"#;
    const AB: &str = r#"{"type":"record","name":"R","fields":[{"name":"a","type":"long"},{"name":"b","type":["null","long"],"default":null}]}"#;

    fn register(state: &mut State, subject: &str, text: &str) -> Result<u32, ApiError> {
        let plan = state.plan_register(subject, text)?;
        if let Some((key, value)) = plan.record {
            state.apply(&key, Some(&value));
        }
        match plan.written {
            Written::Id(id) => Ok(id),
            Written::Level(level) => panic!("a registration returned the level {level:?}"),
        }
    }

    #[test]
    fn equal_schemas_have_one_id_in_all_subjects() {
        let mut state = State::default();
        assert_eq!(register(&mut state, "s", A), Ok(1));
        assert_eq!(register(&mut state, "s", A_SPACED), Ok(1));
        assert_eq!(register(&mut state, "t", A_SPACED), Ok(1));
        assert_eq!(register(&mut state, "s", AB), Ok(2));
        assert_eq!(state.versions("s"), Ok(vec![1, 2]));
        assert_eq!(state.users_of("1"), Ok(vec![("s", 1), ("t", 1)]));
        assert_eq!(state.lookup("s", AB).unwrap().version, 2);
    }

    #[test]
    fn the_records_of_the_topic_restore_the_state() {
        let mut state = State::default();
        let mut records = Vec::new();
        for (subject, text) in [("s", A), ("t", AB), ("s", AB)] {
            let (key, value) = state.plan_register(subject, text).unwrap().record.unwrap();
            state.apply(&key, Some(&value));
            records.push((key, value));
        }
        let (key, value) = State::plan_level(Some("t"), Level::None).record.unwrap();
        records.push((key, value));
        let mut restored = State::default();
        for (key, value) in &records {
            restored.apply(key, Some(value));
        }
        assert_eq!(restored.subjects(), ["s", "t"]);
        assert_eq!(restored.version("s", "latest").unwrap(), state.version("s", "2").unwrap());
        assert_eq!(restored.own_level("t"), Some(Level::None));
        restored.apply(&records[3].0, None);
        assert_eq!(restored.level_of("t"), Level::FullTransitive);
    }

    #[test]
    fn what_another_registry_wrote_does_no_harm() {
        let mut state = State::default();
        register(&mut state, "s", A).unwrap();
        for (key, value) in [
            (r#"{"keytype":"NOOP","magic":0}"#, None),
            (
                r#"{"keytype":"DELETE_SUBJECT","subject":"s","magic":0}"#,
                Some(r#"{"subject":"s","version":1}"#),
            ),
            (r#"{"keytype":"SCHEMA","subject":"s","version":9,"magic":1}"#, Some("no json")),
            ("no json", Some("{}")),
        ] {
            state.apply(key.as_bytes(), value.map(str::as_bytes));
        }
        assert_eq!(state.versions("s"), Ok(vec![1]));
        let gone = r#"{"subject":"s","version":1,"id":1,"schema":"\"long\"","deleted":true}"#;
        state.apply(&Key::schema("s", 1).to_bytes(), Some(gone.as_bytes()));
        assert_eq!(state.versions("s"), Err(ApiError::no_subject("s")));
    }

    #[test]
    fn an_id_never_comes_to_mean_another_schema() {
        let mut state = State::default();
        register(&mut state, "s", A).unwrap();
        let other = r#"{"subject":"t","version":1,"id":1,"schema":"\"long\""}"#;
        state.apply(&Key::schema("t", 1).to_bytes(), Some(other.as_bytes()));
        assert_eq!(state.schema("1"), Ok(A));
        assert_eq!(state.versions("t"), Err(ApiError::no_subject("t")));
        assert_eq!(register(&mut state, "t", "\"long\""), Ok(2));
    }

    #[test]
    fn the_largest_id_of_another_registry_leaves_none_and_overflows_nothing() {
        let mut state = State::default();
        let key = Key::schema("s", u32::MAX).to_bytes();
        let value = format!(r#"{{"subject":"s","version":1,"id":{},"schema":"\"long\""}}"#, u32::MAX);
        state.apply(&key, Some(value.as_bytes()));
        assert_eq!(state.plan_register("t", A).map(drop).unwrap_err().code, 50001);
    }

    proptest! {
        #[test]
        fn records_of_any_form_are_taken_or_left_out(
            key in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..60),
                "\\{\"keytype\":\"(SCHEMA|CONFIG|MODE)\",\"subject\":(null|\"s\"),\"version\":-?[0-9]{1,11},\"magic\":[01]\\}"
                    .prop_map(String::into_bytes),
            ],
            value in prop::option::of(prop_oneof![
                prop::collection::vec(any::<u8>(), 0..60),
                "\\{\"subject\":\"s\",\"version\":1,\"id\":[0-9]{1,10},\"schema\":\"[\\[{a-z]{0,8}\"\\}".prop_map(String::into_bytes),
                "\\{\"compatibilityLevel\":\"(NONE|FULL|[A-Z]{4})\"\\}".prop_map(String::into_bytes),
            ]),
        ) {
            let mut state = State::default();
            state.apply(&key, value.as_deref());
            let _ = (state.versions("s"), state.lookup("s", A), state.plan_register("s", A).is_ok());
        }
    }

    #[test]
    fn errors_have_the_codes_of_confluent() {
        let mut state = State::default();
        register(&mut state, "s", A).unwrap();
        let code = |error: Result<(), ApiError>| error.unwrap_err().code;
        assert_eq!(code(state.version("x", "1").map(drop)), 40401);
        assert_eq!(code(state.version("s", "2").map(drop)), 40402);
        assert_eq!(code(state.lookup("s", AB).map(drop)), 40403);
        assert_eq!(code(state.schema("7").map(drop)), 40403);
        assert_eq!(code(state.plan_register("s", "{").map(drop)), 42201);
        assert_eq!(code(state.version("s", "first").map(drop)), 42202);
        assert_eq!(
            code(state.plan_register("s", r#"{"type":"record","name":"R","fields":[]}"#).map(drop)),
            409
        );
    }
}
