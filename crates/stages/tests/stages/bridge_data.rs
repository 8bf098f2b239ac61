//! `bridge_data`: each reading once, checked.

use crate::driver::{Driver, Fed, T0, fed};
use proptest::prelude::*;
use std::collections::HashSet;
use throughline_model::envelope::{DeviceMessage, IDENTITY_NONE, Measurement, flag};
use throughline_model::outcome::Outcome;
use throughline_model::time::Timestamp;
use throughline_model::topics::{DATA_CORE_READING_V1, DEVICE_TELEMETRY_V1};
use throughline_stages::bridge_data::BridgeData;
use throughline_stages::checks::{MEASUREMENTS_MAX, TEXT_BYTES_MAX};
use throughline_testkit::{device_message, measurement};

const DAY: i64 = 86_400_000_000;

fn reading(site: &str, seq: i64) -> DeviceMessage {
    let at = Timestamp(T0 + seq * 1_000_000);
    device_message(site, "pump-7", seq, at, vec![measurement("temperature", seq as f64)])
}

fn key(message: &DeviceMessage) -> String {
    format!("{}/{}", message.site_id, message.device_id)
}

fn take(driver: &mut Driver<BridgeData>, message: &DeviceMessage) -> (Outcome, String) {
    driver.take(DEVICE_TELEMETRY_V1, &key(message), message)
}

fn of(outcome: Outcome, reason: &str) -> (Outcome, String) {
    (outcome, reason.to_owned())
}

#[test]
fn a_reading_passes_once_and_stays_the_same_message() {
    let mut driver = Driver::new(BridgeData::default());
    let message = reading("site-1", 1);
    assert_eq!(take(&mut driver, &message), of(Outcome::Emitted, ""));
    assert_eq!(take(&mut driver, &message), of(Outcome::Duplicate, "redelivered"));
    let outputs = driver.outputs();
    assert_eq!(outputs.len(), 1);
    assert_eq!((outputs[0].topic.as_str(), outputs[0].key.as_str()), (DATA_CORE_READING_V1, "site-1/pump-7"));
    let header = outputs[0].traceparent.as_deref().expect("traced");
    assert!(header.contains(&message.trace_id), "{header}");
    let written: DeviceMessage = driver.codec.decode(Some(&outputs[0].value)).expect("reads");
    assert_eq!(written, message);
}

#[test]
fn equal_device_names_and_seqs_at_two_sites_are_two_readings() {
    let mut driver = Driver::new(BridgeData::default());
    for site in ["site-1", "site-2"] {
        assert_eq!(take(&mut driver, &reading(site, 1)), of(Outcome::Emitted, ""), "{site}");
    }
    assert_eq!(driver.outputs().len(), 2);
}

#[test]
fn a_reading_that_fails_a_check_is_dead_lettered_with_its_code() {
    type Spoil = fn(&mut DeviceMessage);
    let cases: [(&str, Spoil); 14] = [
        ("time_out_of_range", |m| m.occurred_at = Timestamp(m.received_at.0 - 30 * DAY - 1)),
        ("time_out_of_range", |m| m.occurred_at = Timestamp(m.received_at.0 + DAY / 24 + 1)),
        ("no_measurements", |m| m.measurements.clear()),
        ("name_invalid", |m| m.measurements[0].name.clear()),
        ("name_invalid", |m| m.measurements[0].name = "a\0".into()),
        ("name_invalid", |m| m.measurements[0].name = "n".repeat(257)),
        ("text_too_long", |m| m.measurements[0].unit = Some("u".repeat(65))),
        ("number_not_finite", |m| m.measurements[0].number = Some(f64::NAN)),
        ("value_ambiguous", |m| m.measurements[0].flag = Some(true)),
        ("nul_in_text", |m| m.measurements[0].unit = Some("\0".into())),
        ("name_repeated", |m| m.measurements.push(m.measurements[0].clone())),
        ("text_too_long", |m| {
            let text = Some("x".repeat(TEXT_BYTES_MAX + 1));
            m.measurements.push(Measurement { name: "t".into(), text, ..Measurement::default() });
        }),
        ("too_many_measurements", |m| {
            m.measurements = (0..=MEASUREMENTS_MAX).map(|i| measurement(&format!("m{i}"), 0.0)).collect();
        }),
        ("name_repeated", |m| {
            m.measurements = (0..100).map(|i| measurement(&format!("m{}", i % 99), 0.0)).collect();
        }),
    ];
    for (code, spoil) in cases {
        let mut driver = Driver::new(BridgeData::default());
        let mut message = reading("site-1", 1);
        spoil(&mut message);
        assert_eq!(take(&mut driver, &message), of(Outcome::DeadLettered, code));
        assert_eq!(take(&mut driver, &message), of(Outcome::Duplicate, "dead_lettered_before"), "{code}");
        assert!(driver.outputs().is_empty(), "{code}");
    }
}

#[test]
fn times_on_the_bounds_pass_and_an_absent_time_is_not_checked() {
    for occurred_at in [T0 - 30 * DAY, T0 + DAY / 24] {
        let mut message = reading("site-1", 0);
        message.occurred_at = Timestamp(occurred_at);
        let mut driver = Driver::new(BridgeData::default());
        assert_eq!(take(&mut driver, &message), of(Outcome::Emitted, ""), "{occurred_at}");
    }
    let mut message = reading("site-1", 0);
    (message.occurred_at, message.flags) = (Timestamp(0), vec![flag::NO_TS.into()]);
    assert_eq!(take(&mut Driver::new(BridgeData::default()), &message), of(Outcome::Emitted, ""));
}

#[test]
fn bytes_that_do_not_read_are_dead_lettered() {
    let mut driver = Driver::new(BridgeData::default());
    let whole = fed(&driver.codec, DEVICE_TELEMETRY_V1, "site-1/pump-7", &reading("site-1", 1));
    let mut torn = whole.clone();
    torn.value.as_mut().expect("a value").truncate(40);
    let bytes = |value: Option<&[u8]>| Fed::bytes(DEVICE_TELEMETRY_V1, "site-1/pump-7", value);
    for (record, code) in [
        (bytes(Some(b"{\"temperature\":1}")), "not_framed"),
        (bytes(Some(&[0, 0, 0])), "not_framed"),
        (bytes(Some(&[0, 0, 0, 255, 255, 1])), "unknown_schema"),
        (bytes(None), "value_absent"),
        (torn, "datum_invalid"),
        (Fed { key: "site-2/pump-7".into(), ..whole.clone() }, "key_mismatch"),
        (Fed { key: String::new(), ..whole }, "key_mismatch"),
    ] {
        let settled = driver.feed(&record);
        assert_eq!((settled.outcome, settled.reason.as_ref()), (Outcome::DeadLettered, code));
        assert!(settled.message.is_some_and(|m| !m.is_empty()), "{code}");
    }
    assert!(driver.state.is_empty() && driver.outputs().is_empty());
}

#[test]
fn a_name_that_is_no_device_is_dead_lettered() {
    let mut message = reading("site-1", 1);
    message.device_id = "pump 7".into();
    let settled = take(&mut Driver::new(BridgeData::default()), &message);
    assert_eq!(settled, of(Outcome::DeadLettered, "device_invalid"));
}

#[test]
fn the_first_successful_replay_closes_an_open_seq() {
    let mut driver = Driver::new(BridgeData::default());
    let mut early = reading("site-1", 1);
    early.received_at = Timestamp(early.occurred_at.0 - DAY);
    assert_eq!(take(&mut driver, &early), of(Outcome::DeadLettered, "time_out_of_range"));
    assert_eq!(take(&mut driver, &reading("site-1", 2)), of(Outcome::Emitted, ""));
    driver.restart();
    driver.outputs();
    let corrected =
        fed(&driver.codec, DEVICE_TELEMETRY_V1, "site-1/pump-7", &reading("site-1", 1)).replayed();
    assert_eq!(driver.feed(&corrected).outcome, Outcome::Emitted);
    assert_eq!(driver.feed(&corrected).outcome, Outcome::Duplicate);
    let written: Vec<DeviceMessage> = driver.outputs_as();
    assert_eq!(written.len(), 1);
    assert_eq!(written[0].flags, [flag::REPLAYED]);
}

#[test]
fn a_replay_that_fails_again_is_dead_lettered_again() {
    let mut driver = Driver::new(BridgeData::default());
    let mut bad = reading("site-1", 1);
    bad.measurements[0].number = Some(f64::NAN);
    let replay = fed(&driver.codec, DEVICE_TELEMETRY_V1, "site-1/pump-7", &bad).replayed();
    let dead = of(Outcome::DeadLettered, "number_not_finite");
    assert_eq!(take(&mut driver, &bad), dead);
    for _ in 0..2 {
        assert_eq!(driver.feed(&replay).outcome, Outcome::DeadLettered, "else its replays are not counted");
    }
    assert_eq!(take(&mut driver, &bad), of(Outcome::Duplicate, "dead_lettered_before"), "a redelivery");
    let corrected =
        fed(&driver.codec, DEVICE_TELEMETRY_V1, "site-1/pump-7", &reading("site-1", 1)).replayed();
    assert_eq!(driver.feed(&corrected).outcome, Outcome::Emitted, "it stayed open");
}

#[test]
fn a_restarted_devices_other_bad_reading_is_dead_lettered_too() {
    type Spoil = fn(&mut DeviceMessage);
    let cases: [(&str, Spoil); 3] = [
        ("after a restart", |m| m.occurred_at = Timestamp(T0 + 60_000_000)),
        ("with its clock set back", |m| m.occurred_at = Timestamp(T0 - 60_000_000)),
        ("without a time", |m| m.flags = vec![flag::NO_TS.into()]),
    ];
    for (what, change) in cases {
        let mut driver = Driver::new(BridgeData::default());
        let mut bad = reading("site-1", 1);
        bad.measurements.clear();
        assert_eq!(take(&mut driver, &bad), of(Outcome::DeadLettered, "no_measurements"));
        change(&mut bad);
        bad.message_id = "01890000-0000-8000-8000-0000000000ff".into();
        assert_eq!(take(&mut driver, &bad), of(Outcome::DeadLettered, "no_measurements"), "{what}");
        driver.restart();
        assert_eq!(take(&mut driver, &bad), of(Outcome::Duplicate, "dead_lettered_before"), "{what}");
    }
}

#[test]
fn a_restart_with_a_clock_that_is_certainly_wrong_leaves_its_bytes_in_a_letter() {
    let mut driver = Driver::new(BridgeData::default());
    assert_eq!(take(&mut driver, &reading("site-1", 1)), of(Outcome::Emitted, ""));
    let mut restarted = reading("site-1", 1);
    restarted.message_id = "01890000-0000-8000-8000-0000000000ff".into();
    restarted.occurred_at = Timestamp(0);
    assert_eq!(take(&mut driver, &restarted), of(Outcome::DeadLettered, "time_out_of_range"));
    assert_eq!(take(&mut driver, &restarted), of(Outcome::Duplicate, "dead_lettered_before"));
}

#[test]
fn without_sequence_identity_nothing_is_remembered() {
    let mut driver = Driver::new(BridgeData::default());
    let mut message = reading("site-1", 1);
    message.identity = IDENTITY_NONE.into();
    for _ in 0..2 {
        assert_eq!(take(&mut driver, &message), of(Outcome::Emitted, ""));
    }
    message.measurements.clear();
    assert_eq!(take(&mut driver, &message), of(Outcome::DeadLettered, "no_measurements"));
    assert!(driver.state.is_empty());
}

#[test]
fn a_reused_epoch_and_a_seq_below_the_floor_are_flagged_and_counted() {
    let mut driver = Driver::new(BridgeData::default());
    take(&mut driver, &reading("site-1", 5));
    let mut restarted = reading("site-1", 5);
    restarted.occurred_at = Timestamp(T0 + 6_000_000);
    assert_eq!(take(&mut driver, &restarted), of(Outcome::Emitted, flag::EPOCH_REUSED));
    for epoch in 2..=5 {
        take(&mut driver, &DeviceMessage { epoch: Some(epoch), ..reading("site-1", 1) });
    }
    assert_eq!(take(&mut driver, &reading("site-1", 5)), of(Outcome::Emitted, flag::BELOW_FLOOR));
    let flags: Vec<Vec<String>> =
        driver.outputs_as::<DeviceMessage>().into_iter().map(|m| m.flags).filter(|f| !f.is_empty()).collect();
    assert_eq!(flags, [[flag::EPOCH_REUSED], [flag::BELOW_FLOOR]]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Two sites with equal devices and seqs, any order, any repetition, bad readings among them: what
    /// comes out does not depend on where the state was written and read back, and each good reading
    /// comes out once.
    #[test]
    fn restoring_the_state_anywhere_changes_nothing(
        arrivals in prop::collection::vec((0usize..2, 0i64..50, any::<bool>()), 1..150),
    ) {
        let mut steady = Driver::new(BridgeData::default());
        let mut restarting = Driver::new(BridgeData::default());
        let mut good = HashSet::new();
        for (site, seq, restart) in arrivals {
            let mut message = reading(["site-1", "site-2"][site], seq);
            if seq % 7 == 3 {
                message.measurements[0].number = Some(f64::INFINITY);
            } else {
                good.insert((site, seq));
            }
            let expected = take(&mut steady, &message);
            prop_assert_eq!(take(&mut restarting, &message), expected);
            if restart {
                restarting.restart();
            }
        }
        let outputs = steady.outputs();
        prop_assert_eq!(outputs.len(), good.len());
        prop_assert_eq!(restarting.outputs(), outputs);
    }
}
