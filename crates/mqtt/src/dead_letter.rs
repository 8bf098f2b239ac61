//! The bridge's dead letters: the payload byte for byte, with what is needed to try it again.

use crate::feeds::{Publish, Reject};
use crate::transform::Scope;
use std::sync::Arc;
use throughline_model::dead_letter::header::{CODE, MESSAGE, STAGE as CONNECTOR};
use throughline_model::record::{Headers, Outbox};
use throughline_model::time::Timestamp;

/// The bridge's name where a stage's would stand.
pub const BRIDGE: &str = throughline_model::catalog::BRIDGE_GROUP;

/// Header: the MQTT topic.
pub const MQTT_TOPIC: &str = "tl-mqtt-topic";
/// Header: the MQTT client id.
pub const MQTT_CLIENT_ID: &str = "tl-mqtt-client-id";
/// Header: MQTT 5 user properties and content type, a JSON list of pairs.
pub const MQTT_PROPERTIES: &str = "tl-mqtt-properties";
/// Header: the user that had logged in.
pub const MQTT_USER: &str = "tl-mqtt-user";
/// Header: what the sender may publish as, JSON; absent where it may publish as any device. A replay keeps
/// to it.
pub const SCOPE: &str = "tl-mqtt-scope";
/// Header: the time of admission, RFC 3339.
pub const RECEIVED_AT: &str = "tl-received-at";

const TASK: &str = "__connect.errors.task.id";
const STAGE: &str = "__connect.errors.stage";
const CLASS: &str = "__connect.errors.class.name";

/// Appends a dead letter.
pub fn push(
    out: &mut Outbox,
    topic: &Arc<str>,
    publish: &Publish<'_>,
    feed: &str,
    instance: &str,
    reject: &Reject,
    scope: &Scope<'_>,
) {
    let received_at = publish.received_at.to_string();
    let properties = serde_json::to_string(publish.properties).unwrap_or_default();
    let mut headers: Vec<(&str, &[u8])> = vec![
        (MQTT_TOPIC, publish.topic.as_bytes()),
        (MQTT_CLIENT_ID, publish.client_id.as_bytes()),
        (MQTT_PROPERTIES, properties.as_bytes()),
        (RECEIVED_AT, received_at.as_bytes()),
        (CONNECTOR, BRIDGE.as_bytes()),
        (TASK, instance.as_bytes()),
        (STAGE, BRIDGE.as_bytes()),
        (CLASS, feed.as_bytes()),
        (CODE, reject.code.as_bytes()),
        (MESSAGE, reject.message.as_bytes()),
    ];
    let scope =
        scope.is_bound().then(|| serde_json::to_string(&(scope.sites, scope.devices)).unwrap_or_default());
    headers.extend(scope.as_deref().map(|scope| (SCOPE, scope.as_bytes())));
    headers.extend(publish.user.map(|user| (MQTT_USER, user.as_bytes())));
    out.push(topic, None, Some(publish.client_id.as_bytes()), Some(publish.payload), headers);
}

/// What the headers of a dead letter say about the message, owned.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of the publish")]
pub struct Remembered {
    pub topic: String,
    pub client_id: String,
    pub user: Option<String>,
    pub properties: Vec<(String, String)>,
    pub received_at: Option<Timestamp>,
    pub sites: Option<Vec<String>>,
    pub devices: Option<Vec<String>>,
}

impl Remembered {
    /// Reads the headers; `None` where the MQTT topic is missing, because then nothing can be tried again.
    pub fn read(headers: Headers<'_>) -> Option<Self> {
        let text = |name: &str| headers.last(name).map(|v| String::from_utf8_lossy(v).into_owned());
        let received_at = text(RECEIVED_AT).and_then(|t| t.parse::<jiff::Timestamp>().ok());
        let (sites, devices) = match headers.last(SCOPE) {
            // A scope that cannot be read permits nothing.
            Some(json) => serde_json::from_slice(json).unwrap_or((Some(Vec::new()), None)),
            None => (None, None),
        };
        Some(Self {
            sites,
            devices,
            topic: text(MQTT_TOPIC)?,
            client_id: text(MQTT_CLIENT_ID).unwrap_or_default(),
            user: text(MQTT_USER),
            properties: headers
                .last(MQTT_PROPERTIES)
                .and_then(|json| serde_json::from_slice(json).ok())
                .unwrap_or_default(),
            received_at: received_at.map(|t| Timestamp(t.as_microsecond())),
        })
    }
}
