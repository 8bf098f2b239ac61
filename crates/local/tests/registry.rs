//! One suite for every implementation of Confluent's registry API that the platform is used with: the
//! embedded one over a real Kafka, and a real Apicurio.

#![cfg(feature = "managed")]
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a failed unwrap is a failed test; downloads are shown"
)]

use serde_json::{Value, json};
use throughline_kafka::KafkaConfig;
use throughline_local::apicurio::ManagedApicurio;
use throughline_local::kafka::{KafkaOptions, ManagedKafka};
use throughline_local::registry::EmbeddedRegistry;
use throughline_local::scratch_dir;

const MEDIA_TYPE: &str = "application/vnd.schemaregistry.v1+json";
const LOOPBACK: std::net::SocketAddr =
    std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A registry under test.
struct Registry {
    agent: ureq::Agent,
    base: String,
}

impl Registry {
    fn new(base: String) -> Self {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        Self { agent, base }
    }

    fn get(&self, path: &str) -> (u16, Value) {
        read(self.agent.get(format!("{}{path}", self.base)).call().unwrap())
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.agent.post(format!("{}{path}", self.base)).content_type(MEDIA_TYPE);
        read(request.send(body.to_string()).unwrap())
    }

    fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.agent.put(format!("{}{path}", self.base)).content_type(MEDIA_TYPE);
        read(request.send(body.to_string()).unwrap())
    }

    fn register(&self, subject: &str, schema: &Value) -> (u16, Value) {
        self.post(&format!("/subjects/{subject}/versions"), &request(schema))
    }
}

fn read(mut answer: ureq::http::Response<ureq::Body>) -> (u16, Value) {
    let text = answer.body_mut().read_to_string().unwrap();
    (answer.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

fn request(schema: &Value) -> Value {
    json!({ "schema": schema.to_string() })
}

fn record(fields: &[(&str, Value)]) -> Value {
    let fields: Vec<Value> = fields
        .iter()
        .map(|(name, kind)| match kind {
            Value::Array(_) => json!({ "name": name, "type": kind, "default": null }),
            _ => json!({ "name": name, "type": kind }),
        })
        .collect();
    json!({ "type": "record", "name": "Reading", "namespace": "throughline.test", "fields": fields })
}

/// What the platform relies on, from an empty registry on. Returns the ids of the two registered schemas.
fn conforms(registry: &Registry) -> (u64, u64) {
    assert_eq!(registry.get("/subjects"), (200, json!([])));
    let level = json!({ "compatibility": "FULL_TRANSITIVE" });
    assert_eq!(registry.put("/config", &level), (200, level));
    assert_eq!(registry.get("/config").1["compatibilityLevel"], "FULL_TRANSITIVE");

    let v1 = record(&[("a", json!("long"))]);
    let v2 = record(&[("a", json!("long")), ("b", json!(["null", "string"]))]);
    let breaking = record(&[("a", json!("long")), ("c", json!("string"))]);
    let (status, answer) = registry.register("one-value", &v1);
    assert_eq!(status, 200, "{answer}");
    let first = answer["id"].as_u64().unwrap();
    assert_eq!(registry.register("one-value", &v1), (200, answer.clone()), "the same schema, the same id");
    let (status, answer) = registry.register("one-value", &v2);
    assert_eq!(status, 200, "{answer}");
    let second = answer["id"].as_u64().unwrap();
    assert_ne!(first, second);
    assert_eq!(registry.register("two-value", &v1).1["id"], first, "ids are global");

    let (status, answer) = registry.register("one-value", &breaking);
    assert_eq!((status, &answer["error_code"]), (409, &json!(409)), "{answer}");
    for (schema, expected) in [(&v2, true), (&breaking, false)] {
        let path = "/compatibility/subjects/one-value/versions/latest?verbose=true";
        let (status, answer) = registry.post(path, &request(schema));
        assert_eq!((status, &answer["is_compatible"]), (200, &json!(expected)), "{answer}");
    }
    let invalid = json!({ "schema": "{\"type\":\"nonsense" });
    let (status, answer) = registry.post("/subjects/one-value/versions", &invalid);
    assert_eq!((status, &answer["error_code"]), (422, &json!(42201)), "{answer}");

    assert_eq!(registry.get("/subjects/one-value/versions"), (200, json!([1, 2])));
    let (_, latest) = registry.get("/subjects/one-value/versions/latest");
    assert_eq!(
        (&latest["version"], &latest["id"], &latest["subject"]),
        (&json!(2), &json!(second), &json!("one-value"))
    );
    assert_eq!(schema_of(&latest), v2);
    assert_eq!(schema_of(&registry.get(&format!("/schemas/ids/{first}")).1), v1);
    let (_, found) = registry.post("/subjects/one-value", &request(&v1));
    assert_eq!((&found["version"], &found["id"]), (&json!(1), &json!(first)));
    let (_, subjects) = registry.get("/subjects");
    assert_eq!(subjects, json!(["one-value", "two-value"]));

    for (path, code) in [
        ("/subjects/unknown/versions", 40401),
        ("/subjects/unknown/versions/latest", 40401),
        ("/subjects/one-value/versions/7", 40402),
        ("/schemas/ids/4711", 40403),
    ] {
        let (status, answer) = registry.get(path);
        assert_eq!((status, &answer["error_code"]), (404, &json!(code)), "{path}: {answer}");
    }
    let (status, answer) = registry.post("/subjects/one-value", &request(&breaking));
    assert_eq!((status, &answer["error_code"]), (404, &json!(40403)), "{answer}");
    (first, second)
}

fn schema_of(answer: &Value) -> Value {
    serde_json::from_str(answer["schema"].as_str().unwrap()).unwrap()
}

fn start_kafka(dir: &std::path::Path) -> ManagedKafka {
    ManagedKafka::start(KafkaOptions::new(dir), &mut |line| eprintln!("{line}")).unwrap()
}

#[test]
fn apicurio_conforms() {
    let dir = scratch_dir().unwrap();
    let apicurio = ManagedApicurio::start(dir.path(), &mut |line| eprintln!("{line}")).unwrap();
    conforms(&Registry::new(apicurio.url()));
    apicurio.stop().unwrap();
}

#[test]
fn the_embedded_registry_conforms_and_finds_its_state_again() {
    let dir = scratch_dir().unwrap();
    let kafka = start_kafka(dir.path());
    let config = KafkaConfig::new(kafka.bootstrap());
    let embedded = EmbeddedRegistry::start(LOOPBACK, &config).unwrap();
    let registry = Registry::new(embedded.url());
    let (first, second) = conforms(&registry);

    let (_, answer) = registry.post(
        "/compatibility/subjects/one-value/versions/latest?verbose=True",
        &request(&record(&[("a", json!("long")), ("c", json!("string"))])),
    );
    let expected = "readers with the new schema cannot read records of version 2: the field `c` has no default and \
                    the writer does not have it";
    assert_eq!(answer["messages"][0], expected, "reasons are readable");
    let (status, answer) =
        read(registry.agent.delete(format!("{}/subjects/one-value", registry.base)).call().unwrap());
    assert_eq!((status, &answer["error_code"]), (422, &json!(42205)));
    assert_eq!(registry.get("/config/one-value").1["error_code"], 40408);
    assert_eq!(registry.put("/config/one-value", &json!({ "compatibility": "NONE" })).0, 200);
    assert_eq!(registry.put("/config", &json!({ "compatibility": "SOMETIMES" })).1["error_code"], 42203);
    drop(embedded);

    let again = EmbeddedRegistry::start(LOOPBACK, &config).unwrap();
    let registry = Registry::new(again.url());
    assert_eq!(registry.get("/subjects/one-value/versions").1, json!([1, 2]));
    assert_eq!(registry.get("/config/one-value").1["compatibilityLevel"], "NONE");
    let other = record(&[("z", json!("double"))]);
    assert_eq!(registry.register("three-value", &other).1["id"], second + 1, "ids go on");
    assert_eq!(schema_of(&registry.get(&format!("/schemas/ids/{first}")).1), record(&[("a", json!("long"))]));
}

#[test]
fn a_registration_is_refused_while_kafka_is_away_and_reads_go_on() {
    let dir = scratch_dir().unwrap();
    let mut kafka = start_kafka(dir.path());
    let embedded = EmbeddedRegistry::start(LOOPBACK, &KafkaConfig::new(kafka.bootstrap())).unwrap();
    let registry = Registry::new(embedded.url());
    let schema = record(&[("a", json!("long"))]);
    let id = registry.register("one-value", &schema).1["id"].as_u64().unwrap();
    kafka.fault(throughline_local::child::Fault::Kill);
    assert_eq!(schema_of(&registry.get(&format!("/schemas/ids/{id}")).1), schema);
    let (status, answer) = registry.register("two-value", &schema);
    assert_eq!((status, &answer["error_code"]), (500, &json!(50001)), "{answer}");
    assert_eq!(
        registry.get("/subjects").1,
        json!(["one-value"]),
        "nothing is shown that Kafka does not have"
    );
    kafka.restart().unwrap();
    let (status, answer) = registry.register("two-value", &schema);
    assert_eq!((status, &answer["id"]), (200, &json!(id)), "{answer}");
}
