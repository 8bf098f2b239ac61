//! `notify`: what is posted for an alert.

use crate::driver::{Fed, T0, fed, request};
use std::time::Duration;
use throughline_model::envelope::{Alert, Measurement};
use throughline_model::outcome::Outcome;
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_ALERT_V1;
use throughline_stages::notify::Notify;
use throughline_testkit::{codec, measurement};

const KEY: &str = "site-1/pump-7";
const ID: &str = "01890000-0000-7000-8000-000000000001";

fn alert() -> Alert {
    let mode = Measurement { name: "mode".into(), text: Some("auto".into()), ..Measurement::default() };
    let warm = Measurement { unit: Some("°C".into()), ..measurement("temperature", 91.0) };
    Alert {
        message_id: ID.into(),
        trace_id: format!("{:032x}", 7),
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        alert_id: "a".into(),
        rule_id: "hot".into(),
        rule_version: 3,
        severity: "critical".into(),
        state: "raised".into(),
        raised_at: Timestamp(T0),
        occurred_at: Timestamp(T0),
        received_at: Timestamp(T0 + 1_500_000),
        summary: "Too \"hot\".".into(),
        values: vec![warm, mode],
        ..Alert::default()
    }
}

#[test]
fn an_alert_becomes_one_json_object_under_its_message_id() {
    let codec = codec();
    let record = fed(&codec, SERVICE_PLATFORM_ALERT_V1, KEY, &alert());
    let delivery = request(&mut Notify::new(None), &codec, &record).expect("it is to be sent");
    assert_eq!(
        String::from_utf8(delivery.body.clone()).expect("JSON is text"),
        concat!(
            r#"{"message_id":"01890000-0000-7000-8000-000000000001","trace_id":"00000000000000000000000000000007","#,
            r#""alert_id":"a","state":"raised","severity":"critical","summary":"Too \"hot\".","#,
            r#""rule_id":"hot","rule_version":3,"site_id":"site-1","device_id":"pump-7","#,
            r#""raised_at":"2027-01-15T08:00:00.000000Z","cleared_at":null,"#,
            r#""occurred_at":"2027-01-15T08:00:00.000000Z","received_at":"2027-01-15T08:00:01.500000Z","#,
            r#""values":{"temperature":{"value":91,"unit":"°C"},"mode":{"value":"auto"}}}"#
        )
    );
    assert_eq!(delivery.id, ID);
    let expected = "00-00000000000000000000000000000007-8000000000000001-01";
    assert_eq!(delivery.traceparent.as_deref(), Some(expected));
    assert_eq!(delivery.expires_at, None);
    let again = request(&mut Notify::new(None), &codec, &record.clone().replayed());
    assert_eq!(again, Ok(delivery), "a replay is the same");
}

#[test]
fn a_clear_says_when_and_an_age_sets_the_expiry() {
    let codec = codec();
    let clear = Alert { state: "cleared".into(), cleared_at: Some(Timestamp(T0 + 2_000_000)), ..alert() };
    let record = fed(&codec, SERVICE_PLATFORM_ALERT_V1, KEY, &clear);
    let delivery = request(&mut Notify::new(Some(Duration::from_secs(60))), &codec, &record);
    let delivery = delivery.expect("it is to be sent");
    let body = String::from_utf8(delivery.body).expect("JSON is text");
    assert!(body.contains(r#""state":"cleared""#) && body.contains(r#""cleared_at":"2027-01-15T08:00:02"#));
    assert_eq!(delivery.expires_at, Some(Timestamp(T0 + 60_000_000)));
}

#[test]
fn a_name_that_comes_twice_is_told_once_with_its_last_value() {
    let codec = codec();
    let twice = Alert { values: vec![measurement("t", 1.0), measurement("t", 2.0)], ..alert() };
    let record = fed(&codec, SERVICE_PLATFORM_ALERT_V1, KEY, &twice);
    let delivery = request(&mut Notify::new(None), &codec, &record).expect("it is to be sent");
    let body = String::from_utf8(delivery.body).expect("JSON is text");
    assert!(body.ends_with(r#""values":{"t":{"value":2}}}"#), "{body}");
}

#[test]
fn what_no_receiver_could_take_is_dead_lettered() {
    let codec = codec();
    let nameless = Alert { message_id: "42".into(), ..alert() };
    let endless = Alert { values: vec![measurement("t", f64::NAN)], ..alert() };
    for (code, record) in [
        ("message_id_invalid", fed(&codec, SERVICE_PLATFORM_ALERT_V1, KEY, &nameless)),
        ("number_not_finite", fed(&codec, SERVICE_PLATFORM_ALERT_V1, KEY, &endless)),
        ("not_framed", Fed::bytes(SERVICE_PLATFORM_ALERT_V1, KEY, Some(b"garbage"))),
        ("value_absent", Fed::bytes(SERVICE_PLATFORM_ALERT_V1, KEY, None)),
    ] {
        let settled = request(&mut Notify::new(None), &codec, &record).expect_err(code);
        assert_eq!((settled.outcome, settled.reason.as_ref()), (Outcome::DeadLettered, code));
        assert!(settled.message.is_some_and(|m| m.contains(KEY)), "{code}");
    }
}
