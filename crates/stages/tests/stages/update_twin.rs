//! `update_twin`: the only writer of twins.

use crate::driver::{Driver, Fed, T0, fed};
use proptest::prelude::*;
use std::collections::BTreeMap;
use throughline_model::envelope::{
    DeviceMessage, IDENTITY_NONE, Measurement, Session, Twin, TwinRequest, TwinResponse, flag,
};
use throughline_model::outcome::Outcome;
use throughline_model::time::Timestamp;
use throughline_model::topics::{
    DEVICE_HEARTBEAT_V1, DEVICE_REPORTED_V1, DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1,
    SERVICE_PLATFORM_TWIN_REQUEST_V1, SERVICE_PLATFORM_TWIN_RESPONSE_V1,
};
use throughline_model::twin::{FIELD_TEXT_BYTES_MAX, FIELDS_MAX};
use throughline_stages::update_twin::UpdateTwin;
use throughline_testkit::{device_message, measurement};

const KEY: &str = "site-1/pump-7";

fn message(site: &str, seq: i64, value: f64) -> DeviceMessage {
    let at = Timestamp(T0 + seq * 1_000_000);
    device_message(site, "pump-7", seq, at, vec![measurement("temperature", value)])
}

fn of(outcome: Outcome, reason: &str) -> (Outcome, String) {
    (outcome, reason.to_owned())
}

fn twin<'a>(driver: &'a Driver<UpdateTwin>, key: &str) -> &'a Twin {
    &driver.state.get(key).unwrap_or_else(|| panic!("no twin of {key}")).0
}

fn value(twin: &Twin, name: &str) -> Option<f64> {
    twin.reported.iter().find(|f| f.name == name).and_then(|f| f.number)
}

fn request(expected_version: Option<i64>, desired: &[Measurement]) -> TwinRequest {
    TwinRequest {
        message_id: "01890000-0000-7000-8000-000000000001".into(),
        trace_id: format!("{:032x}", 9),
        request_id: Some("user:ann".into()),
        request_code: Some("set_twin".into()),
        identity: IDENTITY_NONE.into(),
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        stream: "twin_request".into(),
        desired: desired.to_vec(),
        expected_version,
        ..TwinRequest::default()
    }
}

#[test]
fn telemetry_and_reported_messages_show_in_the_twin() {
    let mut driver = Driver::new(UpdateTwin::default());
    let first = message("site-1", 1, 91.0);
    assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &first), of(Outcome::Emitted, ""));
    let mut state = message("site-1", 1, 0.0);
    state.stream = "reported".into();
    state.measurements = vec![measurement("target", 21.0)];
    assert_eq!(driver.take(DEVICE_REPORTED_V1, KEY, &state), of(Outcome::Emitted, ""));
    let twin = twin(&driver, KEY);
    assert_eq!((value(twin, "temperature"), value(twin, "target")), (Some(91.0), Some(21.0)));
    assert_eq!(twin.trace_id, state.trace_id);
    assert_ne!(twin.message_id, state.message_id, "a twin is a message of its own");
    assert!(driver.outputs().is_empty(), "the changelog is the twin topic; nothing is emitted besides");
}

#[test]
fn redelivered_older_and_restarted_messages_are_told_apart() {
    let mut driver = Driver::new(UpdateTwin::default());
    let mut restarted = message("site-1", 1, 7.0);
    restarted.occurred_at = Timestamp(T0 + 9_000_000);
    restarted.received_at = restarted.occurred_at;
    for (what, message, expected) in [
        ("new", message("site-1", 5, 5.0), of(Outcome::Emitted, "")),
        ("again", message("site-1", 5, 5.0), of(Outcome::Duplicate, "redelivered")),
        ("older", message("site-1", 1, 1.0), of(Outcome::Ignored, "superseded")),
        ("older again", message("site-1", 1, 1.0), of(Outcome::Duplicate, "stale_ts")),
        ("restarted", restarted, of(Outcome::Emitted, flag::EPOCH_REUSED)),
    ] {
        assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &message), expected, "{what}");
        driver.restart();
    }
    assert_eq!(value(twin(&driver, KEY), "temperature"), Some(7.0));
}

#[test]
fn a_request_is_answered_once_and_changes_the_twin_only_at_the_expected_version() {
    let mut driver = Driver::new(UpdateTwin::default());
    driver.take(DEVICE_TELEMETRY_V1, KEY, &message("site-1", 1, 20.0));
    let target = [measurement("temperature", 21.0)];
    // (expected version, response code, reason, desired version after)
    for (expected, code, reason, after) in [
        (Some(1), "rejected", Some("version_conflict"), 0),
        (Some(0), "success", None, 1),
        (Some(0), "rejected", Some("version_conflict"), 1),
        (None, "success", Some("unchanged"), 1),
    ] {
        let asked = request(expected, &target);
        let settled = driver.take(SERVICE_PLATFORM_TWIN_REQUEST_V1, KEY, &asked);
        assert_eq!(settled, of(Outcome::Emitted, reason.unwrap_or_default()));
        let outputs = driver.outputs();
        assert_eq!(outputs.len(), 1);
        assert_eq!(outputs[0].topic, SERVICE_PLATFORM_TWIN_RESPONSE_V1);
        let response: TwinResponse = driver.codec.decode(Some(&outputs[0].value)).expect("reads");
        assert_eq!((response.response_code.as_deref(), response.reason.as_deref()), (Some(code), reason));
        assert_eq!(response.desired_version, after);
        let answers = driver.answers();
        let counted = answers.iter().map(|a| (&*a.request_code, a.response_code, a.reason));
        let asked_for = asked.request_code.as_deref().unwrap_or_default();
        assert_eq!(counted.collect::<Vec<_>>(), [(asked_for, code, reason.unwrap_or_default())]);
        assert_eq!(response.trace_id, asked.trace_id);
        assert_eq!(
            (response.request_id, response.request_code),
            (asked.request_id.clone(), asked.request_code.clone())
        );
        driver.restart();
    }
    let twin = twin(&driver, KEY);
    assert_eq!((twin.delta.len(), twin.desired.len()), (1, 1));
    assert_eq!(twin.desired[0].at, Timestamp(T0), "the platform's time of the request");
}

#[test]
fn the_delta_goes_when_the_device_reports_what_was_desired() {
    let mut driver = Driver::new(UpdateTwin::default());
    let asked = request(None, &[measurement("temperature", 21.0)]);
    driver.take(SERVICE_PLATFORM_TWIN_REQUEST_V1, KEY, &asked);
    assert_eq!(twin(&driver, KEY).delta.len(), 1);
    driver.take(DEVICE_REPORTED_V1, KEY, &message("site-1", 1, 21.0));
    assert!(twin(&driver, KEY).delta.is_empty());
}

#[test]
fn a_rejected_request_makes_no_twin() {
    let mut driver = Driver::new(UpdateTwin::default());
    driver.take(SERVICE_PLATFORM_TWIN_REQUEST_V1, KEY, &request(Some(3), &[measurement("a", 1.0)]));
    assert!(driver.state.is_empty());
    assert_eq!(driver.outputs().len(), 1);
}

#[test]
fn sessions_and_heartbeats_make_presence() {
    let session = |event: &str, generation, seconds: i64| Session {
        message_id: "01890000-0000-7000-8000-000000000002".into(),
        identity: IDENTITY_NONE.into(),
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        event: event.into(),
        session_generation: generation,
        received_at: Timestamp(T0 + seconds * 1_000_000),
        ..Session::default()
    };
    let mut driver = Driver::new(UpdateTwin::default());
    for (event, generation, seconds, expected, presence) in [
        ("connected", 1, 1, of(Outcome::Emitted, ""), "online"),
        ("connected", 2, 2, of(Outcome::Emitted, ""), "online"),
        ("taken_over", 1, 3, of(Outcome::Ignored, "superseded"), "online"),
        ("will", 2, 4, of(Outcome::Emitted, ""), "offline"),
        ("disconnected", 2, 5, of(Outcome::Ignored, "superseded"), "offline"),
    ] {
        assert_eq!(driver.take(DEVICE_SESSION_V1, KEY, &session(event, generation, seconds)), expected);
        assert_eq!(twin(&driver, KEY).presence, presence, "{event} of {generation}");
        driver.restart();
    }
    assert_eq!(twin(&driver, KEY).presence_reason, "will");
    let mut beat = message("site-1", 10, 0.0);
    beat.stream = "heartbeat".into();
    assert_eq!(driver.take(DEVICE_HEARTBEAT_V1, KEY, &beat), of(Outcome::Emitted, ""));
    assert_eq!(twin(&driver, KEY).presence, "online");
    assert_eq!(twin(&driver, KEY).heartbeat_at, Some(beat.received_at));
    assert!(twin(&driver, KEY).reported.is_empty(), "a heartbeat reports nothing");
    let unknown = driver.take(DEVICE_SESSION_V1, KEY, &session("paused", 3, 6));
    assert_eq!(unknown, of(Outcome::DeadLettered, "event_unknown"));
    let nobody = Session { device_id: String::new(), ..session("connected", 1, 1) };
    assert_eq!(driver.take(DEVICE_SESSION_V1, "client", &nobody), of(Outcome::Filtered, "no_device"));
}

#[test]
fn what_cannot_be_taken_is_dead_lettered_and_left_open() {
    let mut driver = Driver::new(UpdateTwin::default());
    for topic in [DEVICE_TELEMETRY_V1, DEVICE_SESSION_V1, SERVICE_PLATFORM_TWIN_REQUEST_V1] {
        let settled = driver.feed(&Fed::bytes(topic, KEY, Some(b"garbage")));
        assert_eq!(
            (settled.outcome, settled.reason.as_ref()),
            (Outcome::DeadLettered, "not_framed"),
            "{topic}"
        );
    }
    assert!(driver.state.is_empty());
    let mut bad = message("site-1", 1, f64::NAN);
    let expected = of(Outcome::DeadLettered, "number_not_finite");
    assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &bad), expected);
    let again = of(Outcome::Duplicate, "dead_lettered_before");
    assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &bad), again);
    bad.measurements[0].number = Some(1.0);
    driver.restart();
    assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &bad), of(Outcome::Emitted, ""));
    let mut wide = message("site-1", 2, 0.0);
    wide.measurements = (0..FIELDS_MAX).map(|i| measurement(&format!("f{i}"), 0.0)).collect();
    let expected = of(Outcome::DeadLettered, "too_many_fields");
    assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &wide), expected);
}

#[test]
fn a_device_cannot_grow_its_twin_beyond_a_record() {
    let mut driver = Driver::new(UpdateTwin::default());
    let long = |name: String| Measurement {
        name,
        text: Some("x".repeat(FIELD_TEXT_BYTES_MAX)),
        ..Measurement::default()
    };
    let mut seq = 0;
    let mut send = |driver: &mut Driver<UpdateTwin>, values: Vec<Measurement>| {
        seq += 1;
        let mut message = message("site-1", seq, 0.0);
        message.measurements = values;
        driver.take(DEVICE_TELEMETRY_V1, KEY, &message)
    };
    for i in 0..4 {
        assert_eq!(send(&mut driver, vec![long(format!("t{i}"))]), of(Outcome::Emitted, ""), "{i}");
    }
    assert_eq!(send(&mut driver, vec![long("t4".into())]), of(Outcome::DeadLettered, "twin_too_large"));
    assert_eq!(send(&mut driver, vec![measurement("temperature", 1.0)]), of(Outcome::Emitted, ""));
    driver.restart();
    assert_eq!(twin(&driver, KEY).reported.len(), 5);
    let fields = [long("a".into())];
    assert_eq!(driver.take(SERVICE_PLATFORM_TWIN_REQUEST_V1, KEY, &request(None, &fields)).1, "");
    let fields = [long("b".into())];
    let settled = driver.take(SERVICE_PLATFORM_TWIN_REQUEST_V1, KEY, &request(None, &fields));
    assert_eq!(settled, of(Outcome::Emitted, "twin_too_large"), "the request is answered");
}

#[test]
fn a_long_text_of_the_envelope_is_dead_lettered_and_leaves_no_trace() {
    type Spoil = fn(&mut DeviceMessage);
    let cases: [Spoil; 5] = [
        |m| m.trace_id = "t".repeat(1_025),
        |m| m.agent_version = Some("v".repeat(1_025)),
        |m| m.config_version = Some("v".repeat(1_025)),
        |m| m.request_id = Some("r".repeat(1_025)),
        |m| m.stream = "s".repeat(1_025),
    ];
    for topic in [DEVICE_TELEMETRY_V1, DEVICE_HEARTBEAT_V1] {
        for spoil in cases {
            let mut driver = Driver::new(UpdateTwin::default());
            let mut message = message("site-1", 1, 1.0);
            spoil(&mut message);
            assert_eq!(driver.take(topic, KEY, &message), of(Outcome::DeadLettered, "text_too_long"));
            assert!(driver.state.is_empty());
        }
    }
}

#[test]
fn replays_are_dead_lettered_again_and_do_not_turn_the_twin_back() {
    let mut driver = Driver::new(UpdateTwin::default());
    let replay = |driver: &mut Driver<UpdateTwin>, message: &DeviceMessage| {
        let record = fed(&driver.codec, DEVICE_TELEMETRY_V1, KEY, message).replayed();
        let settled = driver.feed(&record);
        (settled.outcome, settled.reason.into_owned())
    };
    let bad = message("site-1", 1, f64::NAN);
    let dead = of(Outcome::DeadLettered, "number_not_finite");
    assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &bad), dead);
    assert_eq!(replay(&mut driver, &bad), dead);
    let unsequenced = |seconds, value| DeviceMessage {
        identity: IDENTITY_NONE.into(),
        ..message("site-1", seconds, value)
    };
    assert_eq!(driver.take(DEVICE_TELEMETRY_V1, KEY, &unsequenced(100, 5.0)), of(Outcome::Emitted, ""));
    assert_eq!(replay(&mut driver, &unsequenced(50, 3.0)), of(Outcome::Ignored, "superseded"));
    assert_eq!(value(twin(&driver, KEY), "temperature"), Some(5.0));
    assert_eq!(replay(&mut driver, &unsequenced(150, 6.0)), of(Outcome::Emitted, ""));
    assert_eq!(value(twin(&driver, KEY), "temperature"), Some(6.0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Two sites with equal devices and seqs, any order, any repetition: twins equal the last reading of
    /// each device, wherever the state was written and read back.
    #[test]
    fn twins_equal_the_last_reading_of_each_device(
        arrivals in prop::collection::vec((0usize..2, 0i64..60, any::<bool>()), 1..150),
        with_ts in any::<bool>(),
    ) {
        let mut steady = Driver::new(UpdateTwin::default());
        let mut restarting = Driver::new(UpdateTwin::default());
        let mut last: BTreeMap<String, i64> = BTreeMap::new();
        for (site, seq, restart) in arrivals {
            let site = ["site-1", "site-2"][site];
            let key = format!("{site}/pump-7");
            let mut message = message(site, seq, seq as f64);
            if !with_ts {
                message.flags = vec![flag::NO_TS.into()];
            }
            let expected = steady.take(DEVICE_TELEMETRY_V1, &key, &message);
            prop_assert_eq!(restarting.take(DEVICE_TELEMETRY_V1, &key, &message), expected);
            if restart {
                restarting.restart();
            }
            let newest = last.entry(key).or_insert(seq);
            *newest = seq.max(*newest);
        }
        for (key, seq) in last {
            prop_assert_eq!(value(twin(&steady, &key), "temperature"), Some(seq as f64));
            prop_assert_eq!(twin(&restarting, &key), twin(&steady, &key));
        }
    }
}
