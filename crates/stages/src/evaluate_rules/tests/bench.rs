//! A stage with its state under a table of messages.

use super::*;

pub(super) const DAY: i64 = 1_800_000_000;
pub(super) const TRACE: &str = "0123456789abcdef0123456789abcdef";

pub(super) fn codec() -> Arc<Codec> {
    let codec = Codec::default();
    for ((file, text), id) in SCHEMA_FILES.iter().zip(1..) {
        codec.bind(file.strip_suffix(".avsc").expect("schemas end so"), id, text).expect("valid");
    }
    Arc::new(codec)
}

pub(super) fn at(seconds: i64) -> Timestamp {
    Timestamp((DAY + seconds) * 1_000_000)
}

/// A message of `s/d`, by default with sequence identity, at second `seconds` by its own clock.
pub(super) fn message(seconds: i64, seq: i64, values: &[(&str, f64)]) -> DeviceMessage {
    let measurement = |(name, number): &(&str, f64)| Measurement {
        name: (*name).to_owned(),
        number: Some(*number),
        ..Measurement::default()
    };
    DeviceMessage {
        message_id: Uuid::from_u128(0x8000_0000_8000_0000_0000 + seq as u128).to_string(),
        trace_id: TRACE.to_owned(),
        identity: IDENTITY_SEQUENCE.to_owned(),
        site_id: "s".to_owned(),
        device_id: "d".to_owned(),
        received_by: "bridge-0".to_owned(),
        stream: "telemetry".to_owned(),
        epoch: Some(1),
        seq: Some(seq),
        occurred_at: at(seconds),
        received_at: at(seconds),
        measurements: values.iter().map(measurement).collect(),
        ..DeviceMessage::default()
    }
}

pub(super) fn text(name: &str, text: &str) -> Measurement {
    Measurement { name: name.to_owned(), text: Some(text.to_owned()), ..Measurement::default() }
}

/// The stage with its state, and what came out of it.
pub(super) struct Bench {
    pub(super) codec: Arc<Codec>,
    pub(super) stage: EvaluateRules,
    pub(super) state: Keyed<RulesState>,
    pub(super) effects: Effects,
    rules: Vec<(String, Option<RuleRecord>)>,
}

impl Bench {
    pub(super) fn new(rules: &[&str]) -> Self {
        let codec = codec();
        let effects = Effects::new(Arc::clone(&codec));
        let mut bench =
            Self { codec, stage: EvaluateRules::new(), state: Keyed::default(), effects, rules: Vec::new() };
        for rule in rules {
            let settled = bench.apply(1, rule);
            assert_eq!(settled.outcome, Outcome::Emitted, "{settled:?}");
        }
        bench
    }

    /// Puts a rule into the table; its id stands first in its text.
    pub(super) fn apply(&mut self, version: i64, definition: &str) -> Settled {
        let id = definition.split('\'').nth(1).expect("the id is quoted").to_owned();
        let record = RuleRecord {
            rule_id: id.clone(),
            rule_version: version,
            enabled: true,
            definition: definition.to_owned(),
            ..RuleRecord::default()
        };
        self.table(&id, Some(record))
    }

    pub(super) fn table(&mut self, id: &str, record: Option<RuleRecord>) -> Settled {
        let mut value = Vec::new();
        if let Some(record) = &record {
            self.codec.encode(SERVICE_PLATFORM_RULE_V1, record, &mut value).expect("fits");
        }
        self.rules.push((id.to_owned(), record.clone()));
        let value = record.is_some().then_some(value);
        self.raw(SERVICE_PLATFORM_RULE_V1, Timestamp(0), id, value.as_deref(), true)
    }

    pub(super) fn raw(
        &mut self,
        topic: &str,
        time: Timestamp,
        key: &str,
        value: Option<&[u8]>,
        table: bool,
    ) -> Settled {
        let mut batch = Batch::new(TopicPartition::new(topic, 0));
        batch.push(0, time, Some(key.as_bytes()), value, []);
        let record = batch.get(0);
        let input = Input { topic, replayed: false, partition: 0, record, codec: &self.codec };
        if table {
            self.stage.table(&input)
        } else {
            self.stage.process(&input, &mut self.state, &mut self.effects)
        }
    }

    /// Passes a message that arrives at second `seconds`; timers that were due before fire first.
    pub(super) fn send(&mut self, seconds: i64, message: &DeviceMessage) -> Settled {
        self.pass(Timestamp(at(seconds).0 - 1));
        let mut value = Vec::new();
        self.codec.encode(DEVICE_TELEMETRY_V1, message, &mut value).expect("fits");
        let key = format!("{}/{}", message.site_id, message.device_id);
        self.raw(DEVICE_TELEMETRY_V1, at(seconds), &key, Some(&value), false)
    }

    /// Lets the timers fire that are due at `now`, in order of (due time, key).
    pub(super) fn pass(&mut self, now: Timestamp) {
        loop {
            let due = self.state.iter().filter_map(|(k, s)| Some((self.stage.due_at(s)?, k.to_owned())));
            let Some((due, key)) = due.min().filter(|(due, _)| *due <= now) else { return };
            self.stage.fire(&key, due, &mut self.state, &mut self.effects);
            let next = self.state.get(&key).and_then(|s| self.stage.due_at(s));
            assert!(next.is_none_or(|next| next > due), "a timer that fired is not due any more");
        }
    }

    /// Takes what came out, in words.
    pub(super) fn out(&mut self) -> Vec<String> {
        assert!(self.effects.take_failure().is_none());
        let words = self.effects.outbox().iter().map(|o| {
            assert_eq!(o.headers.last("traceparent").map(|t| &t[3..35]), Some(TRACE.as_bytes()));
            assert!(o.headers.last(header::RULE).is_some_and(|rule| rule.contains(&b'@')), "what made it");
            match o.topic {
                SERVICE_PLATFORM_ALERT_V1 => {
                    let a: Alert = self.codec.decode(o.value).expect("fits");
                    let reason = a.reason.map(|r| format!(" {r}")).unwrap_or_default();
                    format!("{} {}@{} {}{reason}", a.state, a.rule_id, a.rule_version, a.severity)
                }
                DEVICE_COMMAND_V1 => {
                    let c: Command = self.codec.decode(o.value).expect("fits");
                    format!("command {} {}", c.command, c.request_id.unwrap_or_default())
                }
                _ => {
                    let m: DeviceMessage = self.codec.decode(o.value).expect("fits");
                    format!("{} seq {}", o.topic, m.seq.unwrap_or_default())
                }
            }
        });
        let words = words.collect();
        self.effects.outbox_mut().clear();
        words
    }

    pub(super) fn alerts(&mut self) -> Vec<Alert> {
        let outbox = self.effects.outbox();
        let alerts = outbox.iter().filter(|o| o.topic == SERVICE_PLATFORM_ALERT_V1);
        let alerts = alerts.map(|o| self.codec.decode(o.value).expect("fits")).collect();
        self.effects.outbox_mut().clear();
        alerts
    }

    /// Goes through changelog and rule table as after a restart.
    pub(super) fn restore(&mut self) {
        let mut state = Keyed::default();
        for (key, value) in self.state.iter() {
            let mut bytes = Vec::new();
            value.encode(&self.codec, &mut bytes).expect("serializes");
            state.restore(key, Some(RulesState::decode(&bytes, &self.codec).expect("ours")));
        }
        self.state = state;
        self.stage = EvaluateRules::new();
        for (id, record) in std::mem::take(&mut self.rules) {
            self.table(&id, record);
        }
    }
}
