//! `load_warehouse` and `project_twins`: which rows a record becomes.

use crate::driver::{Fed, T0, fed, load};
use throughline_model::envelope::{Alert, DeviceMessage, Measurement, Session, Twin, TwinField};
use throughline_model::outcome::Outcome;
use throughline_model::rows::{Rows, TwinRow};
use throughline_model::time::Timestamp;
use throughline_model::topics::{
    DATA_CORE_READING_V1, DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1, SERVICE_PLATFORM_ALERT_V1,
    SERVICE_PLATFORM_TWIN_V1,
};
use throughline_stages::load_warehouse::LoadWarehouse;
use throughline_stages::project_twins::ProjectTwins;
use throughline_testkit::{codec, device_message, measurement};

const KEY: &str = "site-1/pump-7";
const ID: &str = "01890000-0000-7000-8000-000000000001";

fn trace() -> String {
    format!("{:032x}", 7)
}

fn reading() -> DeviceMessage {
    let running = Measurement { name: "running".into(), flag: Some(true), ..Measurement::default() };
    device_message("site-1", "pump-7", 42, Timestamp(T0), vec![measurement("temperature", 21.5), running])
}

#[test]
fn a_reading_becomes_one_row_a_measurement() {
    let codec = codec();
    let reading = reading();
    let record = fed(&codec, DATA_CORE_READING_V1, KEY, &reading);
    let (settled, rows) = load(&mut LoadWarehouse::new(), &codec, &record);
    assert_eq!(settled.outcome, Outcome::Emitted);
    assert_eq!(rows.readings.len(), 2);
    for (row, m) in rows.readings.iter().zip(&reading.measurements) {
        assert_eq!((row.site_id.as_str(), row.device_id.as_str()), ("site-1", "pump-7"));
        assert_eq!((row.epoch, row.seq, row.stream.as_str()), (Some(1), Some(42), "telemetry"));
        assert_eq!((&row.name, row.number, row.flag), (&m.name, m.number, m.flag));
        assert_eq!((row.occurred_at, row.received_at), (Timestamp(T0), Timestamp(T0)));
        assert_eq!((&row.message_id, &row.trace_id), (&reading.message_id, &reading.trace_id));
    }
    let again = load(&mut LoadWarehouse::new(), &codec, &record);
    assert_eq!(again, (settled, rows), "it is pure");
}

#[test]
fn alerts_and_sessions_become_their_rows() {
    let codec = codec();
    let alert = Alert {
        message_id: ID.into(),
        trace_id: trace(),
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        alert_id: "a".into(),
        rule_id: "hot".into(),
        rule_version: 3,
        severity: "critical".into(),
        state: "cleared".into(),
        raised_at: Timestamp(T0),
        cleared_at: Some(Timestamp(T0 + 1)),
        ..Alert::default()
    };
    let record = fed(&codec, SERVICE_PLATFORM_ALERT_V1, KEY, &alert);
    let (settled, rows) = load(&mut LoadWarehouse::new(), &codec, &record);
    assert_eq!((settled.outcome, rows.len()), (Outcome::Emitted, 1));
    assert_eq!((rows.alerts[0].alert_id.as_str(), rows.alerts[0].rule_version), ("a", 3));
    assert_eq!(rows.alerts[0].cleared_at, Some(Timestamp(T0 + 1)));

    let session = Session {
        message_id: ID.into(),
        trace_id: trace(),
        event: "disconnected".into(),
        cause: Some("keep_alive".into()),
        client_id: "c".into(),
        session_generation: 4,
        ..Session::default()
    };
    let record = fed(&codec, DEVICE_SESSION_V1, KEY, &session);
    let (settled, rows) = load(&mut LoadWarehouse::new(), &codec, &record);
    assert_eq!((settled.outcome, rows.len()), (Outcome::Emitted, 1));
    assert_eq!(
        (rows.sessions[0].cause.as_deref(), rows.sessions[0].session_generation),
        (Some("keep_alive"), 4)
    );
}

#[test]
fn what_a_store_could_not_hold_is_dead_lettered_without_rows() {
    type Spoil = fn(&mut DeviceMessage);
    let codec = codec();
    let cases: [(&str, Spoil); 6] = [
        ("nul_in_text", |m| {
            let text = Some("a\0b".into());
            m.measurements.push(Measurement { name: "t".into(), text, ..Measurement::default() });
        }),
        ("number_not_finite", |m| m.measurements[1].number = Some(f64::NEG_INFINITY)),
        ("name_invalid", |m| m.measurements[1].name = "n".repeat(257)),
        ("message_id_invalid", |m| m.message_id = "42".into()),
        ("trace_id_invalid", |m| m.trace_id = "none".into()),
        ("nul_in_text", |m| m.site_id = "\0".into()),
    ];
    let mut records: Vec<(&str, Fed)> = Vec::new();
    for (code, spoil) in cases {
        let mut reading = reading();
        reading.measurements[1].flag = None;
        spoil(&mut reading);
        records.push((code, fed(&codec, DATA_CORE_READING_V1, KEY, &reading)));
    }
    for (code, state, summary) in [
        ("nul_in_text", "raised", "\0"),
        ("alert_state_invalid", "cleared", ""),
        ("alert_state_invalid", "paused", ""),
    ] {
        let alert = Alert {
            message_id: ID.into(),
            trace_id: trace(),
            state: state.into(),
            summary: summary.into(),
            ..Alert::default()
        };
        records.push((code, fed(&codec, SERVICE_PLATFORM_ALERT_V1, KEY, &alert)));
    }
    let client_id = "x".repeat(70_000);
    let session = Session { message_id: ID.into(), trace_id: trace(), client_id, ..Session::default() };
    records.push(("text_too_long", fed(&codec, DEVICE_SESSION_V1, KEY, &session)));
    records.push(("not_framed", Fed::bytes(DATA_CORE_READING_V1, KEY, Some(b"garbage"))));
    records.push(("value_absent", Fed::bytes(SERVICE_PLATFORM_ALERT_V1, KEY, None)));
    records.push(("unexpected_topic", Fed::bytes(DEVICE_TELEMETRY_V1, KEY, None)));
    for (code, record) in records {
        let (settled, rows) = load(&mut LoadWarehouse::new(), &codec, &record);
        assert_eq!((settled.outcome, settled.reason.as_ref()), (Outcome::DeadLettered, code));
        assert_eq!(rows, Rows::default(), "{code}");
    }
}

#[test]
fn a_twin_becomes_a_row_with_its_document_and_a_tombstone_removes_it() {
    let codec = codec();
    let field = |name: &str, number| TwinField {
        name: name.into(),
        number: Some(number),
        at: Timestamp(T0),
        version: 2,
        ..TwinField::default()
    };
    let text = TwinField { text: Some("auto".into()), number: None, ..field("mode", 0.0) };
    let twin = Twin {
        message_id: ID.into(),
        trace_id: trace(),
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        reported: vec![text, TwinField { unit: Some("°C".into()), ..field("temperature", 91.0) }],
        desired: vec![field("temperature", 21.5)],
        reported_version: 2,
        desired_version: 1,
        presence: "online".into(),
        presence_reason: "connected".into(),
        presence_at: Timestamp(T0),
        last_seen_at: Timestamp(T0 + 1_500_000),
        ..Twin::default()
    };
    let record = fed(&codec, SERVICE_PLATFORM_TWIN_V1, KEY, &twin);
    let (settled, rows) = load(&mut ProjectTwins::new(), &codec, &record);
    assert_eq!((settled.outcome, rows.len()), (Outcome::Emitted, 1));
    assert_eq!((rows.twins[0].reported_version, rows.twins[0].presence.as_str()), (2, "online"));
    assert_eq!(
        rows.twins[0].document,
        concat!(
            r#"{"site_id":"site-1","device_id":"pump-7","reported":{"#,
            r#""mode":{"value":"auto","at":"2027-01-15T08:00:00.000000Z","version":2},"#,
            r#""temperature":{"value":91,"unit":"°C","at":"2027-01-15T08:00:00.000000Z","version":2}},"#,
            r#""desired":{"temperature":{"value":21.5,"at":"2027-01-15T08:00:00.000000Z","version":2}},"#,
            r#""delta":{},"reported_version":2,"desired_version":1,"#,
            r#""presence":"online","presence_reason":"connected","presence_at":"2027-01-15T08:00:00.000000Z","#,
            r#""last_seen_at":"2027-01-15T08:00:01.500000Z","heartbeat_at":null,"session_generation":null,"#,
            r#""agent_version":null,"config_version":null,"#,
            r#""message_id":"01890000-0000-7000-8000-000000000001","trace_id":"00000000000000000000000000000007"}"#
        )
    );
    let tombstone = Fed::bytes(SERVICE_PLATFORM_TWIN_V1, KEY, None);
    let (settled, rows) = load(&mut ProjectTwins::new(), &codec, &tombstone);
    assert_eq!(settled.outcome, Outcome::Emitted);
    assert_eq!(rows.twins, [TwinRow::removal("site-1", "pump-7")]);
    for (key, value, code) in [
        ("pump-7", None, "device_invalid"),
        ("site-2/pump-7", record.value.as_deref(), "key_mismatch"),
        (KEY, Some(b"garbage".as_slice()), "not_framed"),
    ] {
        let (settled, rows) =
            load(&mut ProjectTwins::new(), &codec, &Fed::bytes(SERVICE_PLATFORM_TWIN_V1, key, value));
        assert_eq!((settled.outcome, settled.reason.as_ref(), rows.len()), (Outcome::DeadLettered, code, 0));
    }
}
