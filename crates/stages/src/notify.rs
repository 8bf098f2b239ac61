//! `notify` (act): tells a webhook of every alert that is raised or cleared.
//!
//! The message id of the alert is the id of the delivery: the same for every repeat, by which the receiver
//! recognises one. Body: one JSON object, its fields named as the alert's, times in RFC 3339, values by name.
//!
//! Outcomes: *emitted* where the receiver took it, or where it was set aside in the retry topic (reason
//! `set_aside`); *expired* where the alert waited longer than the stage's age; *dead_lettered* with the code of
//! the codec, with `message_id_invalid` or `number_not_finite` where it has no id or no JSON, with `http_…`
//! where the receiver refuses it, or with `retries_exhausted`.

use crate::checks;
use crate::json::{Time, Value};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::time::Duration;
use throughline_model::envelope::{Alert, Enveloped, Measurement};
use throughline_model::outcome::Settled;
use throughline_model::stage::{Act, Delivery, Input, Kind, StageSpec, traceparent};
use throughline_model::topics::SERVICE_PLATFORM_ALERT_V1;
use uuid::Uuid;

/// The stage's name and consumer group.
pub const STAGE: &str = "notify";
/// How many answers wait for one commit: what was delivered and not committed is repeated after a kill.
const COMMIT_INTERVAL: Duration = Duration::from_millis(100);

/// The stage.
pub struct Notify {
    spec: StageSpec,
    age_max: Option<Duration>,
}

impl Notify {
    /// Makes the stage. An alert that has been in Kafka for longer than `age_max` is not told any more.
    pub fn new(age_max: Option<Duration>) -> Self {
        Self {
            spec: StageSpec {
                group: STAGE,
                kind: Kind::Act,
                inputs: vec![SERVICE_PLATFORM_ALERT_V1],
                tables: Vec::new(),
                changelog: None,
                commit_interval: COMMIT_INTERVAL,
            },
            age_max,
        }
    }
}

impl Act for Notify {
    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    fn request(&mut self, input: &Input<'_>) -> Result<Delivery, Settled> {
        let alert: Alert = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
        let id = Uuid::try_parse(&alert.message_id).map_err(|_| {
            let what = "its message_id is not a UUID, so the receiver could not recognise a repeat";
            refused(input, "message_id_invalid", what)
        })?;
        if alert.values.iter().any(|value| value.number.is_some_and(|n| !n.is_finite())) {
            return Err(refused(input, "number_not_finite", "one of its values is not a finite number"));
        }
        Ok(Delivery {
            id: id.to_string(),
            traceparent: traceparent(&alert.envelope()),
            body: serde_json::to_vec(&Notification::of(&alert)).expect("texts and finite numbers serialize"),
            expires_at: self.age_max.map(|age| input.record.time.plus(age)),
        })
    }
}

/// An alert as the receiver gets it.
#[derive(Serialize)]
struct Notification<'a> {
    message_id: &'a str,
    trace_id: &'a str,
    alert_id: &'a str,
    state: &'a str,
    severity: &'a str,
    summary: &'a str,
    rule_id: &'a str,
    rule_version: i64,
    site_id: &'a str,
    device_id: &'a str,
    raised_at: Time,
    cleared_at: Option<Time>,
    occurred_at: Time,
    received_at: Time,
    values: Values<'a>,
}

impl<'a> Notification<'a> {
    fn of(alert: &'a Alert) -> Self {
        Self {
            message_id: &alert.message_id,
            trace_id: &alert.trace_id,
            alert_id: &alert.alert_id,
            state: &alert.state,
            severity: &alert.severity,
            summary: &alert.summary,
            rule_id: &alert.rule_id,
            rule_version: alert.rule_version,
            site_id: &alert.site_id,
            device_id: &alert.device_id,
            raised_at: Time(alert.raised_at),
            cleared_at: alert.cleared_at.map(Time),
            occurred_at: Time(alert.occurred_at),
            received_at: Time(alert.received_at),
            values: Values(&alert.values),
        }
    }
}

/// Values by name, each with its unit where it has one: `{"temperature": {"value": 91, "unit": "°C"}}`. Of a name
/// that comes twice the last counts, as most readers of JSON have it; some refuse such an object.
struct Values<'a>(&'a [Measurement]);

#[derive(Serialize)]
struct Measured<'a> {
    value: Value<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<&'a str>,
}

impl Serialize for Values<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let last: BTreeMap<&str, usize> = self.0.iter().map(|m| &*m.name).zip(0..).collect();
        let mut map = to.serialize_map(Some(last.len()))?;
        for (_, m) in self.0.iter().enumerate().filter(|(index, m)| last[&*m.name] == *index) {
            let value = Value::of(m.number, m.text.as_deref(), m.flag);
            map.serialize_entry(&m.name, &Measured { value, unit: m.unit.as_deref() })?;
        }
        map.end()
    }
}

fn refused(input: &Input<'_>, code: &'static str, what: &str) -> Settled {
    let key = input.record.key_str().unwrap_or("that is not text");
    Settled::dead_lettered(code, format!("cannot tell of the alert of key `{key}`: {what}"))
}
