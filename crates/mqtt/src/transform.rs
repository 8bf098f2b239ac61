//! From an MQTT message to records: the one path that listener, external broker and replay share.

use crate::dead_letter;
use crate::feeds::expressions::Expressions;
use crate::feeds::{Feed, Form, Publish, Reject, Router, native};
use crate::json::Json;
use crate::message::{Message, write_hex};
use crate::random::Random;
use crate::values::{TEXT_BYTES_MAX, Values};
use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::envelope::{Enveloped, IDENTITY_NONE, IDENTITY_SEQUENCE, Locator, flag};
use throughline_model::ids::{TraceId, check_name, sequence_message_id, timed_message_id};
use throughline_model::record::Outbox;
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_LOCATOR_V1;
use uuid::Uuid;

/// The records of one message together. A list of the shortest readings that fits the largest packet becomes
/// less; more is a payload made to fill memory, and is dead-lettered.
pub const RECORDS_BYTES_MAX: usize = 8 << 20;

/// What a client may publish as.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scope<'a> {
    /// Its sites; `None`: every site.
    pub sites: Option<&'a [String]>,
    /// Its devices, as `site/device`; `None`: every device of its sites.
    pub devices: Option<&'a [String]>,
}

impl Scope<'_> {
    /// Says whether it permits less than everything.
    pub const fn is_bound(&self) -> bool {
        self.sites.is_some() || self.devices.is_some()
    }

    /// Says whether the client may speak for the device.
    pub fn permits(&self, site: &str, device: &str) -> bool {
        let same = |key: &String| {
            key.split_once('/').is_some_and(|(key_site, key_device)| key_site == site && key_device == device)
        };
        self.sites.is_none_or(|sites| sites.iter().any(|s| s == site))
            && self.devices.is_none_or(|devices| devices.iter().any(same))
    }
}

/// What became of a message. The records to be written are in [`Transformer::records`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It became records.
    Accepted,
    /// It did not decode or matched no feed; its dead letter is to be written. Carries the code.
    DeadLettered(&'static str),
    /// The client may not publish this; nothing is to be written. Carries the reason.
    Forbidden(&'static str),
}

/// Where a replayed dead letter lay; its ids follow from it.
#[derive(Clone, Copy, Debug)]
pub struct Replay<'a> {
    /// `topic/partition/offset` of the first dead letter.
    pub origin: &'a str,
}

enum Stop {
    Reject(Reject),
    Forbidden(&'static str),
}

impl From<Reject> for Stop {
    fn from(reject: Reject) -> Self {
        Self::Reject(reject)
    }
}

/// One element on its way into a record.
struct Reading<'a> {
    site: &'a str,
    device: &'a str,
    epoch: Option<i64>,
    seq: Option<i64>,
    time: Option<Timestamp>,
    clock_offset: Option<i64>,
    outside_trace: Option<TraceId>,
    request_id: Option<&'a str>,
    request_code: Option<&'a str>,
    response_code: Option<&'a str>,
    reason: Option<&'a str>,
    agent_version: Option<&'a str>,
    config_version: Option<&'a str>,
    element: &'a [u8],
    index: usize,
}

/// The transform with its buffers. One a thread; nothing is allocated a message on the native path but
/// what the codec needs.
pub struct Transformer {
    router: Arc<Router>,
    writer: Writer,
    values: Values,
    rejected: Option<Reject>,
}

struct Writer {
    codec: Arc<Codec>,
    instance: String,
    random: Random,
    out: Outbox,
    locator_topic: Arc<str>,
    key: String,
    trace: String,
    traceparent: String,
}

impl Transformer {
    /// Makes a transform of `instance`, which signs as `received_by`.
    pub fn new(router: Arc<Router>, codec: Arc<Codec>, instance: &str) -> Self {
        let writer = Writer {
            codec,
            instance: instance.to_owned(),
            random: Random::from_os(),
            out: Outbox::default(),
            locator_topic: SERVICE_PLATFORM_LOCATOR_V1.into(),
            key: String::new(),
            trace: String::new(),
            traceparent: String::new(),
        };
        Self { router, writer, values: Values::default(), rejected: None }
    }

    /// Turns a message into records, or into its dead letter. A list of which one element is bad is
    /// dead-lettered whole and none of it accepted, so that its replay is complete.
    pub fn admit(
        &mut self,
        publish: &Publish<'_>,
        scope: &Scope<'_>,
        replay: Option<&Replay<'_>>,
    ) -> Verdict {
        self.writer.out.clear();
        self.writer.key.clear();
        if publish.topic.starts_with('$') || is_downward(publish.topic) {
            return Verdict::Forbidden("topic_reserved");
        }
        let router = Arc::clone(&self.router);
        let mut captured = Vec::new();
        for feed in router.feeds() {
            if !feed.matches(publish.topic, &mut captured) {
                continue;
            }
            match self.through(feed, publish, &captured, scope, replay) {
                Ok(true) => return Verdict::Accepted,
                Ok(false) => captured.clear(),
                Err(Stop::Forbidden(reason)) => {
                    self.writer.out.clear();
                    return Verdict::Forbidden(reason);
                }
                Err(Stop::Reject(reject)) => return self.dead_letter(Some(feed), publish, reject, scope),
            }
        }
        let shown: String = publish.topic.chars().take(200).collect();
        let reject = Reject::new("topic_unmatched", format!("no feed takes MQTT topic `{shown}`"));
        self.dead_letter(None, publish, reject, scope)
    }

    /// Replaces the records of a message by its dead letter: Kafka does not take them.
    pub fn refuse(&mut self, publish: &Publish<'_>, scope: &Scope<'_>, why: &str) -> Verdict {
        let router = Arc::clone(&self.router);
        let mut captured = Vec::new();
        let feed = router.feeds().iter().find(|feed| feed.matches(publish.topic, &mut captured));
        self.dead_letter(feed, publish, Reject::new("record_refused", why.to_owned()), scope)
    }

    /// Returns the records of the message admitted last.
    pub const fn records(&self) -> &Outbox {
        &self.writer.out
    }

    /// Takes what was wrong with the message dead-lettered last.
    pub const fn take_rejected(&mut self) -> Option<Reject> {
        self.rejected.take()
    }

    /// Takes them, leaving empty buffers.
    pub fn take_records(&mut self) -> Outbox {
        std::mem::take(&mut self.writer.out)
    }

    /// Returns site and device of the message accepted last.
    pub fn device(&self) -> Option<(&str, &str)> {
        // A site has no `/`, so the first one parts the key.
        self.writer.key.split_once('/')
    }

    /// Returns the next random number of this thread.
    pub fn random(&mut self) -> u64 {
        self.writer.random.next()
    }

    fn dead_letter(
        &mut self,
        feed: Option<&Feed>,
        publish: &Publish<'_>,
        reject: Reject,
        scope: &Scope<'_>,
    ) -> Verdict {
        let out = &mut self.writer.out;
        out.clear();
        let topic = feed.map_or_else(|| self.router.unmatched(), |feed| &feed.dead_letters);
        let name = feed.map_or("", |feed| &feed.name);
        dead_letter::push(out, topic, publish, name, &self.writer.instance, &reject, scope);
        let code = reject.code;
        self.rejected = Some(reject);
        Verdict::DeadLettered(code)
    }

    fn through(
        &mut self,
        feed: &Feed,
        publish: &Publish<'_>,
        captured: &[(&str, &str)],
        scope: &Scope<'_>,
        replay: Option<&Replay<'_>>,
    ) -> Result<bool, Stop> {
        match &feed.form {
            Form::Native { values_required } => {
                self.native(feed, *values_required, publish, captured, scope, replay).map(|()| true)
            }
            Form::Expressions(expressions) => {
                self.expressions(feed, expressions, publish, captured, scope, replay)
            }
        }
    }

    fn native(
        &mut self,
        feed: &Feed,
        values_required: bool,
        publish: &Publish<'_>,
        captured: &[(&str, &str)],
        scope: &Scope<'_>,
        replay: Option<&Replay<'_>>,
    ) -> Result<(), Stop> {
        let capture = |name: &str| captured.iter().find(|(n, _)| *n == name).map_or("", |(_, v)| *v);
        let (site, device) = (capture("site"), capture("device"));
        check_device(site, device, scope)?;
        let text = std::str::from_utf8(publish.payload)
            .map_err(|e| Reject::new("payload_not_utf8", format!("the payload is not UTF-8: {e}")))?;
        let mut json = Json::new(text);
        let is_list = json.peek() == Some(b'[');
        let mut first = true;
        if is_list {
            json.token().map_err(Reject::json)?;
        }
        let mut index = 0;
        while !is_list && index == 0 || is_list && json.next_element(&mut first).map_err(Reject::json)? {
            json.peek();
            let start = json.position();
            let fields = native::read_object(&mut json, values_required, &mut self.values)?;
            let reading = Reading {
                site,
                device,
                epoch: fields.epoch,
                seq: fields.seq,
                time: fields.time,
                clock_offset: fields.clock_offset,
                outside_trace: fields.trace_id.as_deref().and_then(outside_trace),
                request_id: fields.request_id.as_deref(),
                request_code: fields.request_code.as_deref(),
                response_code: fields.response_code.as_deref(),
                reason: fields.reason.as_deref(),
                agent_version: fields.agent_version.as_deref(),
                config_version: fields.config_version.as_deref(),
                element: json.since(start).as_bytes(),
                index,
            };
            self.writer.write(feed, publish, &reading, &self.values, replay)?;
            index += 1;
        }
        json.end().map_err(Reject::json)?;
        if index == 0 {
            return Err(empty().into());
        }
        Ok(())
    }

    fn expressions(
        &mut self,
        feed: &Feed,
        expressions: &Expressions,
        publish: &Publish<'_>,
        captured: &[(&str, &str)],
        scope: &Scope<'_>,
        replay: Option<&Replay<'_>>,
    ) -> Result<bool, Stop> {
        let Some(decoded) = expressions.decode(publish, captured)? else { return Ok(false) };
        if decoded.count() == 0 {
            return Err(empty().into());
        }
        for index in 0..decoded.count() {
            let picked = expressions.pick(publish, captured, &decoded, index, &mut self.values)?;
            check_device(&picked.site, &picked.device, scope)?;
            let reading = Reading {
                site: &picked.site,
                device: &picked.device,
                epoch: picked.epoch,
                seq: picked.seq,
                time: picked.time,
                clock_offset: None,
                outside_trace: picked.trace_id.as_deref().and_then(outside_trace),
                request_id: picked.request_id.as_deref(),
                request_code: picked.request_code.as_deref(),
                response_code: picked.response_code.as_deref(),
                reason: picked.reason.as_deref(),
                agent_version: None,
                config_version: None,
                element: decoded.element_bytes(index),
                index,
            };
            self.writer.write(feed, publish, &reading, &self.values, replay)?;
        }
        Ok(true)
    }
}

impl Writer {
    fn write(
        &mut self,
        feed: &Feed,
        publish: &Publish<'_>,
        reading: &Reading<'_>,
        values: &Values,
        replay: Option<&Replay<'_>>,
    ) -> Result<(), Reject> {
        if values.is_too_large() {
            let message = format!("names and texts of the values have more than {TEXT_BYTES_MAX} bytes");
            return Err(Reject::new("values_too_large", message));
        }
        self.key.clear();
        self.key.push_str(reading.site);
        self.key.push('/');
        self.key.push_str(reading.device);
        let id = self.message_id(feed, publish, reading, replay);
        let outside = reading.outside_trace.or_else(|| traceparent_property(publish.properties));
        let trace = outside.unwrap_or_else(|| {
            // A replay repeats to the bit, so its randomness comes from its id.
            let random = match replay {
                Some(_) => u64::from_be_bytes(id.as_bytes()[8..].try_into().expect("8 bytes")),
                None => self.random.next(),
            };
            TraceId::mint(publish.received_at, self.key.as_bytes(), random)
        });
        self.trace.clear();
        write_hex(&trace.0, &mut self.trace);
        write_traceparent(&self.trace, id, &mut self.traceparent);
        let mut flags: [&'static str; 3] = [""; 3];
        let mut count = 0;
        for (set, name) in [
            (reading.time.is_none(), flag::NO_TS),
            (values.has_big_integer(), flag::BIG_INTEGER),
            (replay.is_some(), flag::REPLAYED),
        ] {
            if set {
                flags[count] = name;
                count += 1;
            }
        }
        let mut id_text = Uuid::encode_buffer();
        let sequence = reading.epoch.is_some() && reading.seq.is_some();
        let message = Message {
            message_id: id.hyphenated().encode_lower(&mut id_text),
            trace_id: &self.trace,
            request_id: reading.request_id,
            request_code: reading.request_code,
            response_code: reading.response_code,
            reason: reading.reason,
            identity: if sequence { IDENTITY_SEQUENCE } else { IDENTITY_NONE },
            site_id: reading.site,
            device_id: reading.device,
            agent_version: reading.agent_version,
            config_version: reading.config_version,
            received_by: &self.instance,
            stream: &feed.stream,
            epoch: reading.epoch,
            seq: reading.seq,
            occurred_at: reading.time.unwrap_or(publish.received_at),
            received_at: publish.received_at,
            clock_offset: reading.clock_offset,
            flags: &flags[..count],
            measurements: values,
        };
        let headers = [("traceparent", self.traceparent.as_bytes())];
        let codec = &self.codec;
        self.out
            .push_with(&feed.topic, None, Some(self.key.as_bytes()), headers, |out| {
                codec.encode(&feed.topic, &message, out).map(|()| true)
            })
            .map_err(|e| Reject::new(e.code(), e.to_string()))?;
        if outside.is_some() {
            self.locate(feed, publish, reading, id)?;
        }
        if self.out.bytes_held() > RECORDS_BYTES_MAX {
            let message = format!("the records of the message have more than {RECORDS_BYTES_MAX} bytes");
            return Err(Reject::new("records_too_large", message));
        }
        Ok(())
    }

    fn message_id(
        &mut self,
        feed: &Feed,
        publish: &Publish<'_>,
        reading: &Reading<'_>,
        replay: Option<&Replay<'_>>,
    ) -> Uuid {
        if let (Some(epoch), Some(seq)) = (reading.epoch, reading.seq) {
            let Reading { time, site, device, element, .. } = reading;
            return sequence_message_id(*time, site, device, &feed.stream, epoch, seq, element);
        }
        if let Some(replay) = replay {
            let output = format!("{}#{}", replay.origin, reading.index);
            return timed_message_id(publish.received_at, dead_letter::BRIDGE, &output, &self.key);
        }
        let mut random = [0u8; 10];
        random[..8].copy_from_slice(&self.random.next().to_be_bytes());
        random[8..].copy_from_slice(&(self.random.next() as u16).to_be_bytes());
        let ms = u64::try_from(publish.received_at.as_millis()).unwrap_or(0);
        uuid::Builder::from_unix_timestamp_millis(ms, &random).into_uuid()
    }

    /// Says in the locator where the message with an id from outside went.
    fn locate(
        &mut self,
        feed: &Feed,
        publish: &Publish<'_>,
        reading: &Reading<'_>,
        id: Uuid,
    ) -> Result<(), Reject> {
        let parent = Locator {
            message_id: id.to_string(),
            trace_id: self.trace.clone(),
            identity: IDENTITY_NONE.to_owned(),
            site_id: reading.site.to_owned(),
            device_id: reading.device.to_owned(),
            stream: feed.stream.clone(),
            epoch: reading.epoch,
            seq: reading.seq,
            occurred_at: reading.time.unwrap_or(publish.received_at),
            received_at: publish.received_at,
            ..Locator::default()
        };
        let mut locator = Locator::derived_from(&parent, dead_letter::BRIDGE, "locator");
        locator.received_by.clone_from(&self.instance);
        locator.outside_id.clone_from(&self.trace);
        locator.topic = feed.topic.to_string();
        let headers = [("traceparent", self.traceparent.as_bytes())];
        let (codec, topic) = (&self.codec, &self.locator_topic);
        self.out
            .push_with(topic, None, Some(self.trace.as_bytes()), headers, |out| {
                codec.encode(topic, &locator, out).map(|()| true)
            })
            .map_err(|e| Reject::new(e.code(), e.to_string()))
    }
}

fn empty() -> Reject {
    Reject::new("payload_empty", "the payload is a list without elements".to_owned())
}

fn check_device(site: &str, device: &str, scope: &Scope<'_>) -> Result<(), Stop> {
    check_name("site", site).map_err(|e| Reject::new("site_invalid", e.to_string()))?;
    check_name("device", device).map_err(|e| Reject::new("device_invalid", e.to_string()))?;
    if scope.permits(site, device) { Ok(()) } else { Err(Stop::Forbidden("not_own_device")) }
}

/// Says whether a topic belongs to the platform's own direction, which no client may publish to.
fn is_downward(topic: &str) -> bool {
    topic.starts_with("tl/") && (topic.ends_with("/command") || topic.ends_with("/desired"))
}

/// Reads an id from outside: 32 hexadecimal digits or a `traceparent`. Anything else is ignored.
fn outside_trace(text: &str) -> Option<TraceId> {
    text.parse().ok().or_else(|| TraceId::from_traceparent(text))
}

fn traceparent_property(properties: &[(String, String)]) -> Option<TraceId> {
    let (_, value) = properties.iter().find(|(name, _)| name == "traceparent")?;
    TraceId::from_traceparent(value)
}

/// Writes what `TraceId::traceparent` returns, without allocating.
fn write_traceparent(trace_hex: &str, id: Uuid, out: &mut String) {
    let mut span = [0u8; 8];
    span.copy_from_slice(&id.as_bytes()[8..]);
    out.clear();
    out.push_str("00-");
    out.push_str(trace_hex);
    out.push('-');
    write_hex(&span, out);
    out.push_str("-01");
}
