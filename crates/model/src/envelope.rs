//! The records of the catalog: the envelope's fields, flat, then each subject's own.
//!
//! Serde names are Avro field names; the schemas in `topics/` declare the same fields. A reader takes
//! fields by name, so a record written under an older or newer schema of the same major version reads.

use crate::ids::{DeviceKey, TraceId};
use crate::time::{TimeBounds, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// `identity` of a message that carries both epoch and seq: a redelivery is recognised.
pub const IDENTITY_SEQUENCE: &str = "sequence";
/// `identity` of a message without them: a redelivery cannot be recognised.
pub const IDENTITY_NONE: &str = "none";

/// Flags of an envelope: marks that later readers need, none of which rejects a message.
pub mod flag {
    /// The device restarted under an epoch that it had used before.
    pub const EPOCH_REUSED: &str = "epoch_reused";
    /// The seq lies at or below the floor of the runs that are remembered: repeats are not recognised.
    pub const BELOW_FLOOR: &str = "below_floor";
    /// An integer beyond 2^53 was kept as text.
    pub const BIG_INTEGER: &str = "big_integer";
    /// The device gave no time; `occurred_at` is the time of arrival.
    pub const NO_TS: &str = "no_ts";
    /// The message is the replay of a dead letter.
    pub const REPLAYED: &str = "replayed";
}

/// Declares a record: the envelope's fields, then the record's own.
macro_rules! record {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        pub struct $name {
            /// Time-ordered UUID in its 36-character form; the same for a redelivery.
            pub message_id: String,
            /// W3C trace id, 32 hexadecimal digits.
            pub trace_id: String,
            /// Who asked: user, device, rule or third party.
            #[serde(default)]
            pub request_id: Option<String>,
            /// What was intended.
            #[serde(default)]
            pub request_code: Option<String>,
            /// The result of the request: success, failure, ignored, rejected, expired.
            #[serde(default)]
            pub response_code: Option<String>,
            /// Reason code of the result.
            #[serde(default)]
            pub reason: Option<String>,
            /// `sequence` or `none`.
            pub identity: String,
            /// The site; empty where a record is about no device.
            pub site_id: String,
            /// The device's name within the site; empty where a record is about no device.
            pub device_id: String,
            /// Version of the agent that sent it.
            #[serde(default)]
            pub agent_version: Option<String>,
            /// Version of the configuration it ran.
            #[serde(default)]
            pub config_version: Option<String>,
            /// The instance that admitted the message.
            pub received_by: String,
            /// What seq counts within: the last segment of a native topic, else the feed's name.
            pub stream: String,
            /// Boot epoch of the sender.
            #[serde(default)]
            pub epoch: Option<i64>,
            /// Sequence number per device, stream and epoch.
            #[serde(default)]
            pub seq: Option<i64>,
            /// Device clock, µs UTC; the time of arrival (flag `no_ts`) where the device gave none.
            pub occurred_at: Timestamp,
            /// Platform clock at admission, µs UTC.
            pub received_at: Timestamp,
            /// The sender's estimated clock offset in µs.
            #[serde(default)]
            pub clock_offset: Option<i64>,
            /// Marks, see [`flag`].
            #[serde(default)]
            pub flags: Vec<String>,
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl Enveloped for $name {
            fn envelope(&self) -> EnvelopeRef<'_> {
                EnvelopeRef {
                    message_id: &self.message_id,
                    trace_id: &self.trace_id,
                    request_id: self.request_id.as_deref(),
                    identity: &self.identity,
                    site_id: &self.site_id,
                    device_id: &self.device_id,
                    stream: &self.stream,
                    epoch: self.epoch,
                    seq: self.seq,
                    occurred_at: self.occurred_at,
                    received_at: self.received_at,
                    flags: &self.flags,
                }
            }

            fn derived_from(parent: &dyn Enveloped, stage: &str, output_key: &str) -> Self {
                let parent = parent.envelope();
                Self {
                    message_id: crate::ids::derived_message_id(parent.message_uuid(), stage, output_key).to_string(),
                    trace_id: parent.trace_id.to_owned(),
                    request_id: parent.request_id.map(str::to_owned),
                    identity: parent.identity.to_owned(),
                    site_id: parent.site_id.to_owned(),
                    device_id: parent.device_id.to_owned(),
                    received_by: stage.to_owned(),
                    stream: parent.stream.to_owned(),
                    epoch: parent.epoch,
                    seq: parent.seq,
                    occurred_at: parent.occurred_at,
                    received_at: parent.received_at,
                    flags: parent.flags.to_vec(),
                    ..Self::default()
                }
            }
        }
    };
}

mod dead_letters;
pub use dead_letters::{DeadLetterProgress, DeadLetterRequest, LetterRange, ProgressRange};

/// The envelope of a record, borrowed.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are documented once, where the records are declared")]
pub struct EnvelopeRef<'a> {
    pub message_id: &'a str,
    pub trace_id: &'a str,
    pub request_id: Option<&'a str>,
    pub identity: &'a str,
    pub site_id: &'a str,
    pub device_id: &'a str,
    pub stream: &'a str,
    pub epoch: Option<i64>,
    pub seq: Option<i64>,
    pub occurred_at: Timestamp,
    pub received_at: Timestamp,
    pub flags: &'a [String],
}

impl EnvelopeRef<'_> {
    /// Returns epoch and seq where the message has sequence identity.
    pub fn sequence(&self) -> Option<(i64, i64)> {
        if self.identity == IDENTITY_SEQUENCE { self.epoch.zip(self.seq) } else { None }
    }

    /// Says whether the device gave a time of its own.
    pub fn has_own_time(&self) -> bool {
        !self.flags.iter().any(|f| f == flag::NO_TS)
    }

    /// Returns the device's own time where it gave one that is not certainly wrong.
    pub fn trusted_time(&self, bounds: TimeBounds) -> Option<Timestamp> {
        let trusted = self.has_own_time() && bounds.accept(self.occurred_at, self.received_at);
        trusted.then_some(self.occurred_at)
    }

    /// Says whether the message is the replay of a dead letter, as its flags tell.
    pub fn is_replay(&self) -> bool {
        self.flags.iter().any(|f| f == flag::REPLAYED)
    }

    /// Returns the message id, or the nil UUID where a foreign producer wrote something else.
    pub fn message_uuid(&self) -> Uuid {
        self.message_id.parse().unwrap_or(Uuid::nil())
    }

    /// Returns the trace id where it is valid.
    pub fn trace(&self) -> Option<TraceId> {
        self.trace_id.parse().ok()
    }

    /// Returns `site/device` where the record is about a device.
    pub fn device_key(&self) -> Option<DeviceKey> {
        DeviceKey::new(self.site_id, self.device_id).ok()
    }
}

/// A record that carries the envelope.
pub trait Enveloped {
    /// Borrows the envelope's fields.
    fn envelope(&self) -> EnvelopeRef<'_>;

    /// Starts a record that `stage` derives from `parent`: same trace, device, times and sequence; an id
    /// of its own from (parent, stage, output key).
    fn derived_from(parent: &dyn Enveloped, stage: &str, output_key: &str) -> Self
    where
        Self: Sized;
}

/// One named value: exactly one of number, text and flag is set, or none for a JSON null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Name; nested objects become dotted names.
    pub name: String,
    /// A number; JSON numbers are always here but integers beyond 2^53.
    #[serde(default)]
    pub number: Option<f64>,
    /// A text.
    #[serde(default)]
    pub text: Option<String>,
    /// A boolean.
    #[serde(default)]
    pub flag: Option<bool>,
    /// Unit of the number as the sender or the feed states it.
    #[serde(default)]
    pub unit: Option<String>,
}

record! {
    /// What a device says: telemetry, event, heartbeat, response and reported, and, checked and once,
    /// `data_core.reading.v1`.
    DeviceMessage {
        /// The values, in the order of the payload.
        measurements: Vec<Measurement>,
    }
}

record! {
    /// What became of a device's connection (`device.session.v1`).
    Session {
        /// `connected`, `disconnected`, `will` or `taken_over`.
        event: String,
        /// MQTT client id.
        client_id: String,
        /// Why it ended: `client`, `keep_alive`, `protocol_error`, `takeover`, `shutdown`, …
        #[serde(default)]
        cause: Option<String>,
        /// `mqtt/3.1.1` or `mqtt/5`.
        protocol: String,
        /// Generation of the session: rises with each connection of the client id on any instance.
        session_generation: i64,
        /// What an acknowledgement means on this session: `kafka`, `edge_spool` or `external_broker`.
        boundary: String,
    }
}

record! {
    /// A raise or clear (`service_platform.alert.v1`), keyed by device.
    Alert {
        /// The same for a raise and its clear.
        alert_id: String,
        /// The rule.
        rule_id: String,
        /// The version of the rule that was in force.
        rule_version: i64,
        /// `info`, `warning`, `critical`.
        severity: String,
        /// `raised` or `cleared`.
        state: String,
        /// When the condition came to hold, µs UTC.
        raised_at: Timestamp,
        /// When it ceased to hold.
        #[serde(default)]
        cleared_at: Option<Timestamp>,
        /// One sentence for people.
        summary: String,
        /// The values that the condition saw.
        values: Vec<Measurement>,
    }
}

record! {
    /// A command for a device (`device.command.v1`).
    Command {
        /// What to do.
        command: String,
        /// With what.
        arguments: Vec<Measurement>,
        /// After this it must not be carried out, µs UTC.
        expires_at: Timestamp,
    }
}

record! {
    /// A rule (`service_platform.rule.v1`, compacted, key = rule id). The definition is the text that was
    /// applied, so that `rules list` shows what its author wrote.
    RuleRecord {
        /// The rule's id.
        rule_id: String,
        /// Rises with every change, from 1.
        rule_version: i64,
        /// Whether it is evaluated.
        enabled: bool,
        /// The rule as TOML.
        definition: String,
    }
}

/// One field of a twin with its own time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TwinField {
    /// Name of the field.
    pub name: String,
    /// A number.
    #[serde(default)]
    pub number: Option<f64>,
    /// A text.
    #[serde(default)]
    pub text: Option<String>,
    /// A boolean.
    #[serde(default)]
    pub flag: Option<bool>,
    /// Unit of the number.
    #[serde(default)]
    pub unit: Option<String>,
    /// When the value came about: device time for reported, platform time for desired; µs UTC.
    pub at: Timestamp,
    /// The side's version at which this field last changed.
    pub version: i64,
    /// Order of the value within its stream: the newest (epoch, generation, seq) wins.
    #[serde(default)]
    pub epoch: Option<i64>,
    /// Generation of the device's runs under that epoch.
    #[serde(default)]
    pub generation: Option<i64>,
    /// Sequence number.
    #[serde(default)]
    pub seq: Option<i64>,
    /// The stream that the order belongs to.
    #[serde(default)]
    pub stream: Option<String>,
}

/// The newest position of one stream of a device that a state has taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamPosition {
    /// The stream.
    pub stream: String,
    /// Newest epoch.
    pub epoch: i64,
    /// Generation of the runs under that epoch.
    pub generation: i64,
    /// Newest seq.
    pub seq: i64,
    /// Newest device time accepted, µs UTC.
    pub occurred_at: Timestamp,
}

record! {
    /// A device's twin (`service_platform.twin.v1`, compacted): this topic is its truth.
    Twin {
        /// What the device said last, by name.
        reported: Vec<TwinField>,
        /// What it shall be, by name.
        desired: Vec<TwinField>,
        /// The desired fields that the reported do not meet.
        delta: Vec<TwinField>,
        /// Rises with every change of reported.
        reported_version: i64,
        /// Rises with every change of desired.
        desired_version: i64,
        /// `online`, `offline` or `unknown`.
        presence: String,
        /// Why presence is what it is.
        presence_reason: String,
        /// When presence changed last, µs UTC.
        presence_at: Timestamp,
        /// Newest message of any kind, µs UTC, platform clock.
        last_seen_at: Timestamp,
        /// Newest heartbeat, µs UTC, platform clock.
        #[serde(default)]
        heartbeat_at: Option<Timestamp>,
        /// Generation of the newest session seen.
        #[serde(default)]
        session_generation: Option<i64>,
        /// What has been taken from each stream.
        positions: Vec<StreamPosition>,
        /// Which messages the twin has taken, so that a successor of the stage recognises a redelivery.
        #[serde(default)]
        runs: Option<crate::seq_runs::StreamsText>,
    }
}

record! {
    /// Asks `update_twin` to change a twin's desired fields (`service_platform.twin_request.v1`).
    TwinRequest {
        /// Fields to set; one whose values are all absent is removed.
        desired: Vec<Measurement>,
        /// The desired version that the asker saw; a mismatch is rejected. Absent: any.
        #[serde(default)]
        expected_version: Option<i64>,
    }
}

record! {
    /// What became of a twin request (`service_platform.twin_response.v1`); the envelope's response_code
    /// and reason carry the result.
    TwinResponse {
        /// The desired version after it.
        desired_version: i64,
    }
}

record! {
    /// Where to look for an id that came from outside (`service_platform.locator.v1`, key = that id).
    Locator {
        /// The id as the sender gave it.
        outside_id: String,
        /// The topic that the message went to.
        topic: String,
    }
}
