//! What messages, sessions and requests make of a twin.

use proptest::prelude::*;
use std::collections::BTreeMap;
use throughline_model::codec::Codec;
use throughline_model::envelope::{
    DeviceMessage, Enveloped as _, IDENTITY_NONE, IDENTITY_SEQUENCE, Measurement, Session, Twin, TwinField,
    TwinRequest, flag,
};
use throughline_model::keyed::KeyedState as _;
use throughline_model::seq_runs::{
    Admission, EPOCHS_MAX, REASON_DEAD_LETTERED_BEFORE, REASON_REDELIVERED, RECENT_MAX, Streams, StreamsText,
};
use throughline_model::time::{TimeBounds, Timestamp};
use throughline_model::topics;
use throughline_model::twin::{
    Answer, DESIRED_BYTES_MAX, ENVELOPE_TEXT_BYTES_MAX, FIELD_NAME_BYTES_MAX, FIELD_TEXT_BYTES_MAX,
    FIELD_UNIT_BYTES_MAX, FIELDS_MAX, REPORTED_BYTES_MAX, SessionChange, Taken, TwinState, take_heartbeat,
    take_request, take_session, take_values,
};

const T0: i64 = 1_800_000_000_000_000;

fn number(name: &str, value: f64) -> Measurement {
    Measurement { name: name.into(), number: Some(value), ..Measurement::default() }
}

fn text(name: &str, value: &str) -> Measurement {
    Measurement { name: name.into(), text: Some(value.into()), ..Measurement::default() }
}

fn message(stream: &str, seq: i64, measurements: &[Measurement]) -> DeviceMessage {
    DeviceMessage {
        message_id: format!("00000000-0000-8000-8000-{seq:012}"),
        trace_id: format!("{seq:032x}"),
        identity: IDENTITY_SEQUENCE.into(),
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        stream: stream.into(),
        epoch: Some(1),
        seq: Some(seq),
        occurred_at: Timestamp(T0 + seq * 1_000_000),
        received_at: Timestamp(T0 + seq * 1_000_000 + 5_000),
        measurements: measurements.to_vec(),
        ..DeviceMessage::default()
    }
}

fn take(twin: &mut TwinState, message: &DeviceMessage) -> Taken {
    take_values(&mut twin.0, message, TimeBounds::default())
}

fn field<'a>(fields: &'a [TwinField], name: &str) -> &'a TwinField {
    fields.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("{name} in {fields:?}"))
}

fn reported(twin: &TwinState, name: &str) -> Option<f64> {
    field(&twin.0.reported, name).number
}

fn codec() -> Codec {
    let codec = Codec::default();
    let file = format!("{}.avsc", topics::SERVICE_PLATFORM_TWIN_V1);
    let (_, schema) = topics::SCHEMA_FILES.iter().find(|(name, _)| *name == file).expect("declared");
    codec.bind(topics::SERVICE_PLATFORM_TWIN_V1, 7, schema).expect("valid");
    codec
}

fn through_avro(twin: &TwinState, codec: &Codec) -> TwinState {
    let mut bytes = Vec::new();
    twin.encode(codec, &mut bytes).expect("fits its schema");
    TwinState::decode(&bytes, codec).expect("reads")
}

#[test]
fn the_newest_value_wins_field_by_field() {
    let mut twin = TwinState::default();
    take(&mut twin, &message("telemetry", 5, &[number("a", 5.0)]));
    take(&mut twin, &message("telemetry", 4, &[number("a", 4.0), number("b", 4.0)]));
    assert_eq!((reported(&twin, "a"), reported(&twin, "b")), (Some(5.0), Some(4.0)));
    let late = take(&mut twin, &message("telemetry", 3, &[number("a", 3.0)]));
    assert_eq!(late, Taken::Superseded);
    let again = take(&mut twin, &message("telemetry", 5, &[number("a", 5.0)]));
    assert_eq!(again, Taken::Duplicate { reason: REASON_REDELIVERED });
    assert_eq!(twin.0.positions[0].seq, 5);
    assert_eq!(twin.0.trace_id, format!("{:032x}", 4), "the last message that changed it");
}

#[test]
fn a_restart_under_the_old_epoch_is_newer_than_everything_before_it() {
    let mut twin = TwinState::default();
    take(&mut twin, &message("telemetry", 500, &[number("a", 1.0)]));
    let mut restarted = message("telemetry", 500, &[number("a", 2.0)]);
    restarted.occurred_at = Timestamp(T0 + 501_000_000);
    take(&mut twin, &restarted);
    assert_eq!(reported(&twin, "a"), Some(2.0));
    assert_eq!(field(&twin.0.reported, "a").generation, Some(1));

    let mut twin = TwinState::default();
    for (seq, id, value) in [(1, "x", 91.0), (2, "y", 92.0), (1, "z", 50.0)] {
        let mut message = message("telemetry", seq, &[number("a", value)]);
        message.flags = vec![flag::NO_TS.into()];
        message.message_id = id.into();
        take(&mut twin, &message);
    }
    assert_eq!(reported(&twin, "a"), Some(50.0), "without times the id tells");
}

#[test]
fn a_clock_that_is_certainly_wrong_counts_as_no_clock() {
    let mut twin = TwinState::default();
    let mut wild = message("telemetry", 1, &[number("a", 1.0)]);
    wild.occurred_at = Timestamp(T0 * 2);
    take(&mut twin, &wild);
    assert_eq!(field(&twin.0.reported, "a").at, wild.received_at);
    take(&mut twin, &message("telemetry", 2, &[number("a", 2.0)]));
    assert_eq!(reported(&twin, "a"), Some(2.0));
}

#[test]
fn between_two_streams_the_time_decides_whichever_arrives_first() {
    let telemetry = message("telemetry", 10, &[number("a", 10.0)]);
    let state = message("reported", 2, &[number("a", 2.0)]);
    for order in [[&telemetry, &state], [&state, &telemetry]] {
        let mut twin = TwinState::default();
        for message in order {
            take(&mut twin, message);
        }
        assert_eq!(reported(&twin, "a"), Some(10.0));
    }
}

#[test]
fn without_sequence_identity_the_order_of_kafka_decides() {
    let mut twin = TwinState::default();
    for value in [3.0, 1.0] {
        let mut message = message("telemetry", 1, &[number("a", value)]);
        message.identity = IDENTITY_NONE.into();
        assert!(matches!(take(&mut twin, &message), Taken::Applied(_)));
    }
    assert_eq!(reported(&twin, "a"), Some(1.0));
    assert!(twin.0.positions.is_empty());
}

#[test]
fn versions_rise_with_changed_values_and_times_with_every_report() {
    let mut twin = TwinState::default();
    for (seq, a, version, changed_at) in [(1, 1.0, 1, 1), (2, 1.0, 1, 1), (3, 2.0, 2, 2)] {
        take(&mut twin, &message("telemetry", seq, &[number("a", a)]));
        assert_eq!(twin.0.reported_version, version, "seq {seq}");
        let a = field(&twin.0.reported, "a");
        assert_eq!((a.version, a.at), (changed_at, Timestamp(T0 + seq * 1_000_000)), "seq {seq}");
    }
}

#[test]
fn delta_holds_what_desired_asks_for_and_reported_does_not_meet() {
    let mut twin = TwinState::default();
    let names = |twin: &TwinState| twin.0.delta.iter().map(|f| f.name.clone()).collect::<Vec<_>>();
    take(&mut twin, &message("reported", 1, &[text("mode", "auto")]));
    let request = |desired: &[Measurement], expected_version| TwinRequest {
        desired: desired.to_vec(),
        expected_version,
        ..TwinRequest::default()
    };
    let done = Answer { response_code: "success", reason: None };
    let rejected = |reason| Answer { response_code: "rejected", reason: Some(reason) };
    let ask = |twin: &mut TwinState, r: &TwinRequest| take_request(&mut twin.0, r, Timestamp(T0));
    let both = request(&[text("mode", "auto"), number("target", 21.0)], Some(0));
    assert_eq!(ask(&mut twin, &both), done);
    assert_eq!((names(&twin), twin.0.desired_version), (vec!["target".to_owned()], 1));
    assert_eq!(ask(&mut twin, &both), rejected("version_conflict"));
    let unchanged = Answer { response_code: "success", reason: Some("unchanged") };
    assert_eq!(ask(&mut twin, &request(&[number("target", 21.0)], Some(1))), unchanged);
    take(&mut twin, &message("reported", 2, &[number("target", 21.0), text("mode", "manual")]));
    assert_eq!(names(&twin), ["mode"]);
    let remove = Measurement { name: "mode".into(), ..Measurement::default() };
    assert_eq!(ask(&mut twin, &request(&[remove], None)), done);
    assert_eq!((names(&twin), twin.0.desired_version, twin.0.desired.len()), (Vec::new(), 2, 1));
    for (desired, reason) in [
        (vec![], "empty_request"),
        (vec![number("", 1.0)], "invalid_name"),
        (vec![number("x\n", 1.0)], "invalid_name"),
        (vec![number("x", f64::NAN)], "invalid_value"),
        ((0..=FIELDS_MAX).map(|i| number(&format!("f{i}"), 1.0)).collect(), "too_many_fields"),
    ] {
        let before = twin.clone();
        assert_eq!(ask(&mut twin, &request(&desired, None)), rejected(reason));
        assert_eq!(twin, before, "a rejected request changes nothing");
    }
}

#[test]
fn presence_follows_the_newest_session_and_heartbeats() {
    // (what, event or heartbeat, generation, received after seconds, presence, reason)
    let steps = [
        ("first session", "connected", 10, 1, "online", "connected"),
        (
            "a newer one took over before the old one's end was read",
            "connected",
            11,
            2,
            "online",
            "connected",
        ),
        ("the old one's end", "taken_over", 10, 3, "online", "connected"),
        ("an old will", "will", 10, 4, "online", "connected"),
        ("the current one ends", "will", 11, 5, "offline", "will"),
        ("its end again", "disconnected", 11, 6, "offline", "will"),
        ("its begin again", "connected", 11, 7, "offline", "will"),
        ("a heartbeat from before the end", "heartbeat", 0, 4, "offline", "will"),
        ("a heartbeat over another way", "heartbeat", 0, 8, "online", "heartbeat"),
        ("a session that ended before its begin was read", "disconnected", 12, 9, "offline", "keep_alive"),
        ("its late begin", "connected", 12, 9, "offline", "keep_alive"),
    ];
    let mut twin = TwinState::default();
    assert_eq!((twin.0.presence.as_str(), twin.0.presence_reason.as_str()), ("unknown", "no_session"));
    for (what, event, session_generation, seconds, presence, reason) in steps {
        let received_at = Timestamp(T0 + seconds * 1_000_000);
        if event == "heartbeat" {
            let mut beat = message("heartbeat", seconds, &[]);
            beat.received_at = received_at;
            beat.identity = IDENTITY_NONE.into();
            take_heartbeat(&mut twin.0, &beat, TimeBounds::default());
        } else {
            let session = Session {
                event: event.into(),
                cause: (event == "disconnected").then(|| "keep_alive".into()),
                session_generation,
                received_at,
                ..Session::default()
            };
            let change = SessionChange::of(&session).expect("known");
            take_session(&mut twin.0, &session, change);
        }
        assert_eq!((twin.0.presence.as_str(), twin.0.presence_reason.as_str()), (presence, reason), "{what}");
    }
    assert_eq!(twin.0.last_seen_at, Timestamp(T0 + 9_000_000));
    assert_eq!(twin.0.heartbeat_at, Some(Timestamp(T0 + 8_000_000)));
    assert_eq!(SessionChange::of(&Session { event: "paused".into(), ..Session::default() }), None);
}

#[test]
fn a_device_that_makes_up_names_is_bounded() {
    let mut twin = TwinState::default();
    let many: Vec<_> = (0..FIELDS_MAX).map(|i| number(&format!("f{i}"), 1.0)).collect();
    assert!(matches!(take(&mut twin, &message("telemetry", 1, &many)), Taken::Applied(_)));
    assert_eq!(take(&mut twin, &message("telemetry", 2, &[number("one_more", 1.0)])), Taken::TooManyFields);
    assert_eq!(twin.0.reported.len(), FIELDS_MAX);
    let known = take(&mut twin, &message("telemetry", 3, &[number("f7", 2.0)]));
    assert!(matches!(known, Taken::Applied(_)), "{known:?}");
}

#[test]
fn a_device_that_sends_long_texts_is_bounded() {
    let mut twin = TwinState::default();
    let long = "x".repeat(FIELD_TEXT_BYTES_MAX);
    let fits = REPORTED_BYTES_MAX / (FIELD_TEXT_BYTES_MAX + 200);
    for at in 0..fits {
        let taken = take(&mut twin, &message("telemetry", at as i64, &[text(&format!("t{at}"), &long)]));
        assert!(matches!(taken, Taken::Applied(_)), "{at}: {taken:?}");
    }
    let one_more = message("telemetry", 100, &[text("one_more", &long)]);
    assert_eq!(take(&mut twin, &one_more), Taken::TooLarge);
    let again = Taken::Duplicate { reason: REASON_DEAD_LETTERED_BEFORE };
    assert_eq!(take(&mut twin, &one_more), again, "it is in a dead letter");
    let replayed = DeviceMessage { flags: vec![flag::REPLAYED.into()], ..one_more };
    assert_eq!(take(&mut twin, &replayed), Taken::TooLarge, "and so is its replay that fails again");
    let other = "y".repeat(FIELD_TEXT_BYTES_MAX);
    let known = take(&mut twin, &message("telemetry", 101, &[text("t0", &other), number("n", 1.0)]));
    assert!(matches!(known, Taken::Applied(_)), "known fields go on: {known:?}");
}

#[test]
fn a_request_beyond_the_bounds_of_desired_is_rejected() {
    let long = "x".repeat(FIELD_TEXT_BYTES_MAX);
    let mut twin = TwinState::default();
    let mut ask = |desired: &[Measurement], request_id: &str| {
        let request = TwinRequest {
            desired: desired.to_vec(),
            request_id: Some(request_id.into()),
            ..TwinRequest::default()
        };
        take_request(&mut twin.0, &request, Timestamp(T0)).reason
    };
    assert_eq!(ask(&[text("a", &long)], "user:ann"), None);
    assert_eq!(ask(&[text("b", &long)], "user:ann"), Some("twin_too_large"));
    assert_eq!(ask(&[text("a", &format!("{long}x"))], "user:ann"), Some("text_too_long"));
    let unit = Some("u".repeat(FIELD_UNIT_BYTES_MAX + 1));
    assert_eq!(ask(&[Measurement { unit, ..number("a", 1.0) }], "user:ann"), Some("text_too_long"));
    assert_eq!(ask(&[number("a", 1.0)], &"u".repeat(ENVELOPE_TEXT_BYTES_MAX + 1)), Some("text_too_long"));
    assert_eq!(ask(&[text("a", "short"), text("b", "short")], "user:ann"), None);
    assert_eq!(ask(&[text("b", &long)], "user:ann"), None, "there is room again");
}

/// Runs as long as they can be: every bound reached, with the longest numbers.
fn longest_runs(streams: &[String]) -> Streams {
    let mut runs = Streams::default();
    let mut clock = T0;
    for stream in streams {
        let mut say = |epoch: i64, seq: i64, is_good: bool, is_timed: bool| {
            clock += 1;
            let mut message = message(stream, 0, &[]);
            (message.epoch, message.seq) = (Some(i64::MAX - epoch), Some(i64::MAX - 4_000 + seq));
            (message.occurred_at, message.message_id) =
                (Timestamp(clock), format!("{stream}{epoch}{seq}{clock}"));
            if !is_timed {
                message.flags = vec![flag::NO_TS.into()];
            }
            let envelope = message.envelope();
            if is_good {
                runs.admit(&envelope);
            } else {
                runs.refuse(&envelope);
            }
        };
        for epoch in (0..EPOCHS_MAX as i64).rev() {
            for _generation in 0..2 {
                say(epoch, 0, true, true);
                for seq in 1..200 {
                    say(epoch, 10 + 2 * seq, false, true);
                }
            }
        }
        for seq in 0..RECENT_MAX as i64 {
            say(0, 1_000 + seq, true, false);
        }
    }
    runs
}

#[test]
fn a_twin_at_every_bound_fits_into_a_record() {
    let codec = codec();
    let streams: Vec<String> = (0..6).map(|i| format!("stream_{i}")).collect();
    let mut twin = TwinState::default();
    let runs = longest_runs(&streams);
    let runs_bytes = serde_json::to_string(&runs).expect("serializes").len();
    twin.0.runs = Some(StreamsText(runs));
    assert!(runs_bytes > 6 * 50_000 && runs_bytes < 6 * 62_000, "{runs_bytes} bytes of runs");
    for fill in 0..FIELDS_MAX {
        let mut message = message(&streams[fill % 6], 0, &[]);
        message.identity = IDENTITY_NONE.into();
        message.request_id = Some("r".repeat(ENVELOPE_TEXT_BYTES_MAX));
        message.agent_version = Some("a".repeat(ENVELOPE_TEXT_BYTES_MAX));
        message.config_version = Some("c".repeat(ENVELOPE_TEXT_BYTES_MAX));
        let name = format!("{fill:0>w$}", w = FIELD_NAME_BYTES_MAX);
        let unit = Some("u".repeat(FIELD_UNIT_BYTES_MAX));
        message.measurements = vec![Measurement { unit: unit.clone(), ..number(&name, f64::MAX) }];
        take(&mut twin, &message);
        let desired = vec![Measurement { unit, ..text(&name, "d") }];
        let request = TwinRequest { desired, stream: "twin_request".into(), ..TwinRequest::default() };
        take_request(&mut twin.0, &request, Timestamp(T0));
    }
    assert_eq!(twin.0.delta.len(), twin.0.desired.len(), "the worst case: nothing is met");
    assert!(twin.0.reported.len() < FIELDS_MAX && twin.0.desired.len() > 100);
    let mut bytes = Vec::new();
    twin.encode(&codec, &mut bytes).expect("fits its schema");
    let fields = bytes.len() - runs_bytes;
    assert!(fields <= REPORTED_BYTES_MAX + 2 * DESIRED_BYTES_MAX + 16 * 1_024, "{fields} bytes without runs");
    assert!(bytes.len() < 1_000_000, "{} bytes", bytes.len());
}

#[test]
fn a_replay_without_sequence_identity_is_taken_by_its_time() {
    let mut twin = TwinState::default();
    let at = |seconds: i64, value: f64| {
        let mut message = message("telemetry", seconds, &[number("a", value)]);
        message.identity = IDENTITY_NONE.into();
        message
    };
    let replay = |message: DeviceMessage| DeviceMessage {
        flags: vec![flag::REPLAYED.into()],
        agent_version: Some("old".into()),
        ..message
    };
    take(&mut twin, &DeviceMessage { agent_version: Some("new".into()), ..at(100, 100.0) });
    assert_eq!(take(&mut twin, &replay(at(1, 1.0))), Taken::Superseded);
    assert_eq!((reported(&twin, "a"), twin.0.agent_version.as_deref()), (Some(100.0), Some("new")));
    let mut other = replay(at(2, 2.0));
    other.measurements.push(number("b", 2.0));
    assert!(matches!(take(&mut twin, &other), Taken::Applied(_)), "a field that nothing newer has");
    assert_eq!((reported(&twin, "a"), reported(&twin, "b")), (Some(100.0), Some(2.0)));
    assert!(matches!(take(&mut twin, &replay(at(200, 200.0))), Taken::Applied(_)));
    assert_eq!(reported(&twin, "a"), Some(200.0), "what is newer by its time is taken");

    let beat = |seconds| DeviceMessage { measurements: Vec::new(), ..at(seconds, 0.0) };
    let bounds = TimeBounds::default();
    take_heartbeat(&mut twin.0, &beat(300), bounds);
    assert_eq!(take_heartbeat(&mut twin.0, &replay(beat(250)), bounds), Taken::Superseded);
    assert_eq!(twin.0.agent_version.as_deref(), Some("new"));
}

#[test]
fn a_restart_below_everything_seen_shows_at_once() {
    let mut twin = TwinState::default();
    take(&mut twin, &message("telemetry", 1_000_000, &[number("a", 1.0)]));
    let mut restarted = message("telemetry", 1, &[number("a", 2.0)]);
    (restarted.occurred_at, restarted.received_at) =
        (Timestamp(T0 + 1_000_001_000_000), Timestamp(T0 + 1_000_001_000_000));
    let taken = take(&mut twin, &restarted);
    assert!(matches!(taken, Taken::Applied(Admission::EpochReused { .. })), "{taken:?}");
    assert_eq!(reported(&twin, "a"), Some(2.0));
}

#[test]
fn a_twin_survives_its_avro_form() {
    let codec = codec();
    let mut twin = TwinState::default();
    take(&mut twin, &message("telemetry", 1, &[number("a", 1.5), text("b", "x")]));
    let mut untimed = message("event", 1, &[Measurement { flag: Some(true), ..number("c", 1.0) }]);
    untimed.flags = vec![flag::NO_TS.into()];
    take(&mut twin, &untimed);
    assert_eq!(through_avro(&twin, &codec), twin);
    assert_eq!(through_avro(&TwinState::default(), &codec), TwinState::default());
}

fn newest_by_name(messages: &[DeviceMessage]) -> BTreeMap<String, (i64, Option<f64>)> {
    let mut newest: BTreeMap<String, (i64, Option<f64>)> = BTreeMap::new();
    for message in messages {
        let seq = message.seq.expect("sequenced");
        for m in &message.measurements {
            let entry = newest.entry(m.name.clone()).or_insert((seq, m.number));
            if seq > entry.0 {
                *entry = (seq, m.number);
            }
        }
    }
    newest
}

fn shown(twin: &Twin) -> BTreeMap<String, (i64, Option<f64>)> {
    twin.reported.iter().map(|f| (f.name.clone(), (f.seq.expect("sequenced"), f.number))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// However messages are reordered and repeated, and wherever the twin is written and read back, each
    /// field shows the newest message that has it.
    #[test]
    fn arrival_order_and_repetition_do_not_show(
        names in prop::collection::vec(prop::collection::btree_set("[a-e]", 1..4), 1..40),
        arrivals in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..120),
        with_ts in any::<bool>(),
    ) {
        let codec = codec();
        let messages: Vec<DeviceMessage> = names.iter().enumerate().map(|(seq, names)| {
            let values: Vec<_> = names.iter().map(|n| number(n, seq as f64)).collect();
            let mut message = message("telemetry", seq as i64, &values);
            if !with_ts {
                message.flags = vec![flag::NO_TS.into()];
            }
            message
        }).collect();
        let mut twin = TwinState::default();
        let mut arrived: Vec<DeviceMessage> = Vec::new();
        for (pick, dice) in arrivals {
            let message = &messages[pick.index(messages.len())];
            let taken = take(&mut twin, message);
            let repeated = arrived.contains(message);
            let recognised = matches!(taken, Taken::Duplicate { .. });
            prop_assert_eq!(repeated, recognised);
            if !repeated {
                arrived.push(message.clone());
            }
            if dice == 0 {
                twin = through_avro(&twin, &codec);
            }
            prop_assert_eq!(shown(&twin.0), newest_by_name(&arrived));
        }
    }
}
