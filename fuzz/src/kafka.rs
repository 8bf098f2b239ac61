//! What is read back from Kafka and the registry: values, schemas, headers, commit metadata, states.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use throughline_model::books::{Books, METADATA_BYTES_MAX};
use throughline_model::catalog::schema;
use throughline_model::codec::{Codec, framed_id};
use throughline_model::dead_letter::Letter;
use throughline_model::envelope::{
    Alert, Command, DeadLetterProgress, DeadLetterRequest, DeviceMessage, EnvelopeRef, Locator, RuleRecord,
    Session, Twin, TwinRequest, TwinResponse,
};
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, Headers, Outbox, Record, TopicPartition};
use throughline_model::seq_runs::{Refusal, Streams};
use throughline_model::time::Timestamp;
use throughline_model::topics::{self, SCHEMA_FILES};
use throughline_mqtt::dead_letter::{self, Remembered};
use throughline_mqtt::feeds::{Publish, Reject};
use throughline_mqtt::transform::Scope;
use throughline_runtime::{Fault, Retry, push_dead_letter, push_replay, push_retry};

/// The id of a schema from outside; the embedded ones have their place from 1.
const FOREIGN: u32 = 1_000;

/// Returns a codec that knows the embedded schemas, the first under id 1.
pub fn codec() -> Arc<Codec> {
    let codec = Codec::default();
    for ((file, text), id) in SCHEMA_FILES.iter().zip(1..) {
        codec.bind(file.trim_end_matches(".avsc"), id, text).expect("a sound schema");
    }
    Arc::new(codec)
}

thread_local! {
    /// One codec a thread: parsing the schemas takes longer than most inputs.
    pub static CODEC: Arc<Codec> = codec();
}

/// Frames a datum of the embedded schema at `index`, counted around.
pub fn framed(index: u8, datum: &[u8]) -> (&'static str, Vec<u8>) {
    let at = usize::from(index) % SCHEMA_FILES.len();
    let mut value = vec![0];
    value.extend_from_slice(&(at as u32 + 1).to_be_bytes());
    value.extend_from_slice(datum);
    (SCHEMA_FILES[at].0.trim_end_matches(".avsc"), value)
}

/// A value as it lies in Kafka: a byte that picks the topic, then the datum. What reads is written again
/// and reads as the same.
pub fn envelope(data: &[u8]) {
    let _ = framed_id(data);
    let Some((index, datum)) = data.split_first() else { return };
    let (topic, value) = framed(*index, datum);
    let again = match topic {
        topics::DEVICE_SESSION_V1 => again::<Session>,
        topics::DEVICE_COMMAND_V1 => again::<Command>,
        topics::SERVICE_PLATFORM_ALERT_V1 => again::<Alert>,
        topics::SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1 => again::<DeadLetterProgress>,
        topics::SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1 => again::<DeadLetterRequest>,
        topics::SERVICE_PLATFORM_LOCATOR_V1 => again::<Locator>,
        topics::SERVICE_PLATFORM_RULE_V1 => again::<RuleRecord>,
        topics::SERVICE_PLATFORM_TWIN_V1 => again::<Twin>,
        topics::SERVICE_PLATFORM_TWIN_REQUEST_V1 => again::<TwinRequest>,
        topics::SERVICE_PLATFORM_TWIN_RESPONSE_V1 => again::<TwinResponse>,
        _ => again::<DeviceMessage>,
    };
    CODEC.with(|codec| {
        if let Some(first) = again(codec, topic, &value) {
            assert_eq!(again(codec, topic, &first), Some(first), "{topic}");
        }
        let _ = codec.decode::<serde_json::Value>(Some(&value));
    });
}

fn again<T: Serialize + DeserializeOwned>(codec: &Codec, topic: &str, value: &[u8]) -> Option<Vec<u8>> {
    let read: T = codec.decode(Some(value)).ok()?;
    let mut written = Vec::new();
    codec.encode(topic, &read, &mut written).expect("what was read is written");
    Some(written)
}

/// A schema from a registry, a NUL, and a datum under it.
pub fn schema(data: &[u8]) {
    let (text, datum) = super::parted(data, 0);
    let Ok(text) = std::str::from_utf8(text) else { return };
    for (file, embedded) in SCHEMA_FILES.iter().take(2) {
        let _ = schema::compare(embedded, text);
        let name = file.trim_end_matches(".avsc").parse().expect("a topic's name");
        let _ = schema::check(&name, text);
    }
    let codec = Codec::default();
    if codec.add(FOREIGN, text).is_err() {
        return;
    }
    let mut value = vec![0];
    value.extend_from_slice(&FOREIGN.to_be_bytes());
    value.extend_from_slice(datum);
    let _ = codec.decode::<DeviceMessage>(Some(&value));
    let _ = codec.decode::<Twin>(Some(&value));
    let _ = codec.decode::<serde_json::Value>(Some(&value));
    if codec.bind(topics::DEVICE_TELEMETRY_V1, FOREIGN, text).is_ok() {
        let _ = codec.encode(topics::DEVICE_TELEMETRY_V1, &DeviceMessage::default(), &mut Vec::new());
    }
}

/// Names of headers that are read somewhere.
const NAMES: [&str; 23] = [
    "tl-mqtt-topic",
    "tl-mqtt-client-id",
    "tl-mqtt-properties",
    "tl-mqtt-user",
    "tl-mqtt-scope",
    "tl-received-at",
    "tl-bridge-origin",
    "tl-replay-id",
    "tl-replay-count",
    "traceparent",
    "kafka_dlt-original-topic",
    "kafka_dlt-original-offset",
    "__connect.errors.exception.message",
    "other",
    "tl-retry-count",
    "tl-retry-not-before",
    "tl-rule",
    "kafka_dlt-original-partition",
    "kafka_dlt-original-timestamp",
    "__connect.errors.exception.class.name",
    "__connect.errors.connector.name",
    "__connect.errors.topic",
    "kafka_dlt-original-consumer-group",
];

/// Headers of a record: for each a byte that picks its name, a byte with its length, its value.
pub fn headers(data: &[u8]) {
    let mut pairs = Vec::new();
    let mut rest = data;
    while let [name, len, tail @ ..] = rest {
        let (value, tail) = tail.split_at(tail.len().min(usize::from(*len)));
        pairs.push((NAMES[usize::from(*name) % NAMES.len()], value));
        rest = tail;
    }
    let mut batch = Batch::new(TopicPartition::new("t", 0));
    batch.push(7, Timestamp(1), Some(b"k"), Some(b"v"), pairs.iter().copied());
    let record = batch.get(0);
    assert!(record.headers.iter().eq(pairs.iter().copied()));
    remember(record.headers);

    for (name, value) in &pairs {
        assert!(!throughline_platform::header(name, value).is_null());
    }
    let fault = Fault {
        stage: "stage",
        topic: "t",
        partition: 0,
        replayed: false,
        step: "TASK_PUT",
        code: "code",
        message: "what was wrong",
    };
    fails_again(&batch, pairs.len(), &|outbox, record| {
        push_dead_letter(outbox, &"t.dlt".into(), record, &Fault { replayed: true, ..fault });
    });
    // Set aside again and again, and at last a dead letter that says nothing of it.
    fails_again(&batch, pairs.len(), &|outbox, record| {
        let read = Retry::of(record);
        let retry = Retry { count: read.count.saturating_add(1), not_before: read.not_before };
        push_retry(outbox, &"t.retry".into(), record, &fault, retry);
        let again = Retry::of(&read_back(outbox).get(0));
        let not_before = Timestamp::from_millis(read.not_before.as_millis().max(0));
        assert_eq!(again, Retry { count: retry.count, not_before });
    });
    let mut outbox = Outbox::default();
    push_retry(&mut outbox, &"t.retry".into(), &record, &fault, Retry { count: 1, not_before: Timestamp(0) });
    let aside = read_back(&outbox);
    let mut outbox = Outbox::default();
    push_dead_letter(&mut outbox, &"t.dlt".into(), &aside.get(0), &fault);
    let never = Retry { count: 0, not_before: Timestamp(0) };
    assert_eq!(Retry::of(&read_back(&outbox).get(0)), never);
    // A letter that is replayed and fails, again and again; its replays are counted.
    let letters = TopicPartition::new("device.telemetry.v1.bridge-dlt", 0);
    fails_again(&batch, pairs.len() + 3, &|outbox, record| {
        let before = Letter::of(0, record).replays;
        let mut replay = Outbox::default();
        push_replay(&mut replay, &letters, record, "request-1");
        let replay = read_back(&replay);
        assert_eq!(Letter::of(0, &replay.get(0)).replays, before.saturating_add(1));
        push_dead_letter(outbox, &"t.dlt".into(), &replay.get(0), &Fault { replayed: true, ..fault });
    });
}

/// However often a record fails, it keeps key and value and carries the same number of headers.
fn fails_again(first: &Batch, most: usize, fail: &dyn Fn(&mut Outbox, &Record<'_>)) {
    let mut lens = Vec::new();
    let mut record = first.clone();
    for _ in 0..3 {
        let mut outbox = Outbox::default();
        fail(&mut outbox, &record.get(0));
        let out = outbox.get(0);
        assert_eq!((out.key, out.value), (first.get(0).key, first.get(0).value));
        lens.push(out.headers.iter().count());
        record = read_back(&outbox);
    }
    assert!(lens[0] <= most + 17 && lens[1] == lens[2], "{lens:?}");
}

/// Returns what was written as it is read.
fn read_back(outbox: &Outbox) -> Batch {
    let out = outbox.get(0);
    let mut batch = Batch::new(TopicPartition::new("t", 0));
    batch.push(7, Timestamp(1), out.key, out.value, out.headers.iter());
    batch
}

/// What a dead letter of the bridge remembers is remembered by the letter of its replay too.
fn remember(headers: Headers<'_>) {
    let Some(remembered) = Remembered::read(headers) else { return };
    let publish = Publish {
        topic: &remembered.topic,
        payload: b"",
        client_id: &remembered.client_id,
        user: remembered.user.as_deref(),
        login_site: None,
        properties: &remembered.properties,
        received_at: remembered.received_at.unwrap_or_default(),
    };
    let scope = Scope { sites: remembered.sites.as_deref(), devices: remembered.devices.as_deref() };
    let mut outbox = Outbox::default();
    let reject = Reject::new("code", String::new());
    dead_letter::push(&mut outbox, &"t".into(), &publish, "feed", "bridge-0", &reject, &scope);
    let again = Remembered::read(outbox.get(0).headers).expect("it has a topic");
    let received_at = Some(publish.received_at);
    assert_eq!(again, Remembered { received_at, ..remembered.clone() });
}

/// Commit metadata, which foreign tools can write too.
pub fn books(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut books = match Books::from_metadata(text) {
        Ok(books) => books,
        Err(foreign) => return assert!(foreign.0.len() <= 320, "{foreign}"),
    };
    let before = books.records_read();
    for outcome in Outcome::ALL {
        books.add(outcome, "reason", 1 << 40);
    }
    assert!(books.records_read() > before);
    let metadata = books.to_metadata();
    assert!(metadata.len() <= METADATA_BYTES_MAX, "{} bytes", metadata.len());
    let again = Books::from_metadata(&metadata).expect("what was written reads");
    assert_eq!((again.counts, again.to_metadata()), (books.counts, metadata));
}

/// Sequence runs from a changelog (up to a NUL), then messages: 17 bytes each.
pub fn sequence_runs(data: &[u8]) {
    let (json, rest) = super::parted(data, 0);
    let Ok(mut streams) = serde_json::from_slice::<Streams>(json) else { return };
    let before = serde_json::to_string(&streams).expect("serialises").len();
    for message in rest.chunks_exact(17).take(64) {
        let number = |at: usize| i64::from_be_bytes(message[at..at + 8].try_into().expect("8 bytes"));
        let envelope = EnvelopeRef {
            message_id: "01890000-0000-7000-8000-000000000001",
            trace_id: "4bf92f3577b34da6a3ce929d0e0e4736",
            request_id: None,
            identity: "sequence",
            site_id: "s",
            device_id: "d",
            stream: "telemetry",
            epoch: Some(i64::from(message[0] >> 2)),
            seq: Some(number(1)),
            occurred_at: Timestamp(number(9)),
            received_at: Timestamp(0),
            flags: &[],
        };
        let _ = match message[0] & 3 {
            0 => matches!(streams.refuse(&envelope), Refusal::DeadLetter),
            1 => streams.admit_with_time(&envelope, None).is_newest(),
            _ => streams.admit(&envelope).is_newest(),
        };
    }
    let after = serde_json::to_string(&streams).expect("serialises");
    assert!(after.len() <= before + 64 * 128 + 4_096, "{} became {} bytes", before, after.len());
    assert_eq!(serde_json::from_str::<Streams>(&after).expect("what was written reads"), streams);
}
