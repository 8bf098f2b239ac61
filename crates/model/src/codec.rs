//! Values on the wire: Avro in Confluent framing (0x00, big-endian u32 schema id, datum).
//!
//! The wire format is Confluent's ("Schema Registry, wire format"); the datum is Avro 1.12 binary. The
//! work is done by `serde_avro_fast`; property tests prove it equal to apache-avro's generic reader and
//! writer.

use crate::prune::Pruned;
use serde::{Deserialize, Serialize};
use serde_avro_fast::Schema;
use serde_avro_fast::schema::{RegularType, SchemaError, SchemaKey, SchemaMut, SchemaNode};
use serde_avro_fast::ser::SerializerConfig;
use std::collections::HashMap;
use std::sync::{Arc, RwLock};

/// Why a value could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The record is a tombstone where a value is needed.
    #[error("the value is absent")]
    Absent,
    /// The bytes are not in Confluent framing.
    #[error(
        "the value is not in Confluent framing: it has {len} bytes and starts with {first:?}, not with 0x00 and a schema id"
    )]
    NotFramed {
        /// Length of the value.
        len: usize,
        /// Its first byte.
        first: Option<u8>,
    },
    /// The schema id is not known here; the runtime resolves ids before a stage sees the record.
    #[error("schema id {0} is not known to the registry")]
    UnknownSchema(u32),
    /// The topic has no schema bound.
    #[error("topic `{0}` has no schema bound: `throughline topics apply` registers it")]
    UnboundTopic(String),
    /// The datum does not fit its schema or the reader's type.
    #[error("the value does not read under schema id {id}: {why}")]
    Datum {
        /// Schema id of the value.
        id: u32,
        /// What the reader said.
        why: String,
    },
    /// The value does not fit the schema of the topic.
    #[error("a value for topic `{topic}` does not fit its schema: {why}")]
    Encode {
        /// The topic.
        topic: String,
        /// What the writer said.
        why: String,
    },
    /// A schema text is not Avro.
    #[error("the schema of `{what}` is not valid Avro: {why}")]
    Schema {
        /// The topic or id.
        what: String,
        /// What the parser said.
        why: String,
    },
}

impl CodecError {
    /// Returns the stable reason code for outcomes and dead letters.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Absent => "value_absent",
            Self::NotFramed { .. } => "not_framed",
            Self::UnknownSchema(_) => "unknown_schema",
            Self::UnboundTopic(_) => "unbound_topic",
            Self::Datum { .. } => "datum_invalid",
            Self::Encode { .. } => "encode_failed",
            Self::Schema { .. } => "schema_invalid",
        }
    }
}

struct Bound {
    id: u32,
    schema: Arc<Schema>,
    /// Optional fields of the envelope that the schema, an older one, does not have.
    lacks: Arc<[&'static str]>,
}

/// The schemas known to a process: by id for reading, by topic for writing. Cheap to share; reading takes
/// a read lock once a record, writing once a record.
#[derive(Default)]
pub struct Codec {
    by_id: RwLock<HashMap<u32, Arc<Schema>>>,
    by_topic: RwLock<HashMap<String, Bound>>,
}

impl Codec {
    /// Binds `topic` to the schema that the registry knows as `id`; values written from now on carry it.
    ///
    /// # Errors
    /// [`CodecError::Schema`] when the text is not Avro.
    pub fn bind(&self, topic: &str, id: u32, schema_json: &str) -> Result<(), CodecError> {
        let schema = parse(topic, schema_json)?;
        self.by_id.write().expect("no writer panics").insert(id, Arc::clone(&schema));
        let bound = Bound { id, schema, lacks: crate::catalog::schema::lacking(schema_json).into() };
        self.by_topic.write().expect("no writer panics").insert(topic.to_owned(), bound);
        Ok(())
    }

    /// Adds a schema that a foreign or newer producer wrote under.
    ///
    /// # Errors
    /// [`CodecError::Schema`] when the text is not Avro.
    pub fn add(&self, id: u32, schema_json: &str) -> Result<(), CodecError> {
        let schema = parse(&format!("schema id {id}"), schema_json)?;
        self.by_id.write().expect("no writer panics").insert(id, schema);
        Ok(())
    }

    /// Says whether values under `id` can be read.
    pub fn knows(&self, id: u32) -> bool {
        self.by_id.read().expect("no writer panics").contains_key(&id)
    }

    /// Returns the schema id that values of `topic` are written under.
    pub fn id_of(&self, topic: &str) -> Option<u32> {
        self.by_topic.read().expect("no writer panics").get(topic).map(|b| b.id)
    }

    /// Reads a framed value. `T` takes fields by name and may borrow from `value`.
    ///
    /// # Errors
    /// Any [`CodecError`] but `Encode` and `UnboundTopic`; all of them are the data's fault.
    pub fn decode<'a, T: Deserialize<'a>>(&self, value: Option<&'a [u8]>) -> Result<T, CodecError> {
        let value = value.ok_or(CodecError::Absent)?;
        let id = framed_id(value)?;
        let schema = self.by_id.read().expect("no writer panics").get(&id).cloned();
        let schema = schema.ok_or(CodecError::UnknownSchema(id))?;
        serde_avro_fast::from_datum_slice(&value[5..], &schema)
            .map_err(|e| CodecError::Datum { id, why: e.to_string() })
    }

    /// Appends the framed value of a record for `topic`.
    ///
    /// # Errors
    /// [`CodecError::UnboundTopic`] or [`CodecError::Encode`]; `out` may then hold a partial value.
    pub fn encode<T: Serialize>(&self, topic: &str, value: &T, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let (id, schema, lacks) = {
            let bound = self.by_topic.read().expect("no writer panics");
            let bound = bound.get(topic).ok_or_else(|| CodecError::UnboundTopic(topic.to_owned()))?;
            (bound.id, Arc::clone(&bound.schema), Arc::clone(&bound.lacks))
        };
        out.push(0);
        out.extend_from_slice(&id.to_be_bytes());
        let mut config = SerializerConfig::new(&schema);
        let written = if lacks.is_empty() {
            serde_avro_fast::to_datum(value, out, &mut config)
        } else {
            serde_avro_fast::to_datum(&Pruned { value, lacks: &lacks }, out, &mut config)
        };
        written.map(|_| ()).map_err(|e| CodecError::Encode { topic: topic.to_owned(), why: e.to_string() })
    }
}

/// Returns the schema id of a framed value.
///
/// # Errors
/// [`CodecError::NotFramed`].
pub fn framed_id(value: &[u8]) -> Result<u32, CodecError> {
    match value {
        [0, a, b, c, d, ..] => Ok(u32::from_be_bytes([*a, *b, *c, *d])),
        _ => Err(CodecError::NotFramed { len: value.len(), first: value.first().copied() }),
    }
}

fn parse(what: &str, json: &str) -> Result<Arc<Schema>, CodecError> {
    let refuse = |why: String| CodecError::Schema { what: what.to_owned(), why };
    let schema: SchemaMut = json.parse().map_err(|e: SchemaError| refuse(e.to_string()))?;
    if let Some(what) = schema.nodes().iter().find_map(|node| endless(&schema, node)) {
        return Err(refuse(what.to_owned()));
    }
    schema.freeze().map(Arc::new).map_err(|e| refuse(e.to_string()))
}

/// Says why reading under a type might not end: a few bytes would announce a billion items of no bytes each,
/// and records of nothing but two records of the same kind, and so on, are read twice as long at each level.
fn endless(schema: &SchemaMut, node: &SchemaNode) -> Option<&'static str> {
    // Records of empty records are refused themselves, so this need not look into them.
    let is_empty = |key: SchemaKey| match schema.get(key).map(|node| &node.type_) {
        Some(RegularType::Null) => true,
        Some(RegularType::Fixed(fixed)) => fixed.size == 0,
        Some(RegularType::Record(record)) => record.fields.is_empty(),
        _ => false,
    };
    match &node.type_ {
        RegularType::Array(array) if is_empty(array.items) => Some("the items of an array have no bytes"),
        RegularType::Record(record) if !record.fields.is_empty() => record
            .fields
            .iter()
            .all(|field| is_empty(field.type_))
            .then_some("the fields of a record have no bytes"),
        _ => None,
    }
}
