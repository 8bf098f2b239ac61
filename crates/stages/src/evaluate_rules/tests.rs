mod bench;

use super::*;
use bench::*;
use proptest::prelude::*;
use std::sync::Arc;
use throughline_model::envelope::{IDENTITY_NONE, IDENTITY_SEQUENCE, Measurement, flag};
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::topics::{DATA_CORE_FORWARDED_V1, SCHEMA_FILES};

const HOT: &str =
    "id = 'hot'\nsummary = 'Too hot.'\nseverity = 'critical'\nwhen = 'temperature > 90'\nlateness = '60s'\n";

fn with(rule: &str, more: &str) -> String {
    format!("{rule}{more}\n")
}

/// One message: arrival and own time in seconds, seq, temperature, outcome with reason, what comes out.
type Line = (i64, i64, i64, f64, &'static str, &'static [&'static str]);

#[test]
fn alerts_come_and_go_as_the_table_says() {
    let hysteresis = with(HOT, "clear_when = 'temperature < 80'");
    let held = with(HOT, "for = '30s'");
    let acting = with(
        HOT,
        "forward = 'data_core.forwarded.v1'\n[[command]]\nname = 'stop'\nexpires_in = '5s'\narguments = { speed = 0 }",
    );
    let silent = with(HOT, "alert = false\n[[command]]\nname = 'stop'");
    let elsewhere = with(HOT, "sites = ['other-*']");
    let cases: Vec<(&str, &str, Vec<Line>)> = vec![
        (
            "raises once and clears when it ceases to hold",
            HOT,
            vec![
                (1, 1, 1, 91.0, "emitted", &["raised hot@1 critical"]),
                (2, 2, 2, 92.0, "filtered", &[]),
                (3, 3, 3, 90.0, "emitted", &["cleared hot@1 critical"]),
                (4, 4, 4, 90.0, "filtered", &[]),
                (5, 5, 5, 95.0, "emitted", &["raised hot@1 critical"]),
            ],
        ),
        (
            "clears only by clear_when where there is one",
            &hysteresis,
            vec![
                (1, 1, 1, 91.0, "emitted", &["raised hot@1 critical"]),
                (2, 2, 2, 85.0, "filtered", &[]),
                (3, 3, 3, 91.0, "filtered", &[]),
                (4, 4, 4, 79.0, "emitted", &["cleared hot@1 critical"]),
            ],
        ),
        (
            "raises after the condition held for long enough, without a further message",
            &held,
            vec![
                (1, 1, 1, 91.0, "emitted", &[]),
                (20, 20, 2, 92.0, "filtered", &[]),
                (40, 40, 3, 92.0, "filtered", &["raised hot@1 critical"]),
                (41, 41, 4, 80.0, "emitted", &["cleared hot@1 critical"]),
                (50, 50, 5, 91.0, "emitted", &[]),
                (60, 60, 6, 80.0, "emitted", &[]),
                (100, 100, 7, 80.0, "filtered", &[]),
            ],
        ),
        (
            "a redelivery does nothing",
            HOT,
            vec![
                (1, 1, 1, 91.0, "emitted", &["raised hot@1 critical"]),
                (2, 1, 1, 91.0, "duplicate redelivered", &[]),
                (3, 3, 2, 50.0, "emitted", &["cleared hot@1 critical"]),
                (4, 1, 1, 91.0, "duplicate stale_ts", &[]),
            ],
        ),
        (
            "what is older than the newest neither raises nor clears",
            HOT,
            vec![
                (1, 1, 5, 50.0, "filtered", &[]),
                (2, 0, 4, 99.0, "ignored superseded", &[]),
                (3, 3, 6, 91.0, "emitted", &["raised hot@1 critical"]),
                (4, 2, 3, 10.0, "ignored superseded", &[]),
            ],
        ),
        (
            "what is later than the bound does not alert",
            HOT,
            vec![
                (100, 39, 1, 91.0, "filtered late", &[]),
                (101, 41, 2, 91.0, "emitted", &["raised hot@1 critical"]),
                (200, 100, 3, 10.0, "filtered late", &[]),
            ],
        ),
        (
            "commands and forwards",
            &acting,
            vec![
                (
                    1,
                    1,
                    1,
                    91.0,
                    "emitted",
                    &["command stop rule:hot", "raised hot@1 critical", "data_core.forwarded.v1 seq 1"],
                ),
                (2, 2, 2, 92.0, "emitted", &["data_core.forwarded.v1 seq 2"]),
                (3, 3, 3, 10.0, "emitted", &["cleared hot@1 critical"]),
            ],
        ),
        (
            "acts without an alert",
            &silent,
            vec![
                (1, 1, 1, 91.0, "emitted", &["command stop rule:hot"]),
                (2, 2, 2, 92.0, "filtered", &[]),
                (3, 3, 3, 10.0, "emitted", &[]),
                (4, 4, 4, 91.0, "emitted", &["command stop rule:hot"]),
            ],
        ),
        ("is not about this site", &elsewhere, vec![(1, 1, 1, 91.0, "filtered", &[])]),
    ];
    for (name, rule, lines) in cases {
        let mut bench = Bench::new(&[rule]);
        for (arrives, own, seq, temperature, outcome, out) in lines {
            let settled = bench.send(arrives, &message(own, seq, &[("temperature", temperature)]));
            let got = format!("{} {}", settled.outcome, settled.reason);
            assert_eq!(got.trim(), outcome, "{name}: second {arrives}");
            assert_eq!(bench.out(), out, "{name}: second {arrives}");
        }
    }
}

#[test]
fn an_alert_says_what_and_why_under_the_trace_of_the_reading() {
    let mut bench = Bench::new(&[HOT]);
    bench.send(1, &message(1, 1, &[("temperature", 91.0), ("humidity", 3.0)]));
    let raised = bench.alerts().remove(0);
    assert_eq!(raised.alert_id, raised.message_id);
    assert_eq!(
        (raised.trace_id.as_str(), raised.site_id.as_str(), raised.device_id.as_str()),
        (TRACE, "s", "d")
    );
    assert_eq!((raised.raised_at, raised.cleared_at, raised.summary.as_str()), (at(1), None, "Too hot."));
    assert_eq!(raised.values.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["temperature"]);
    bench.send(2, &message(2, 2, &[("temperature", 1.0)]));
    let cleared = bench.alerts().remove(0);
    assert_eq!((&cleared.alert_id, cleared.cleared_at), (&raised.alert_id, Some(at(2))));
    assert_ne!(cleared.message_id, raised.message_id);
}

#[test]
fn a_command_expires_and_names_its_rule() {
    let text = with(
        HOT,
        "[[command]]\nname = 'stop'\nexpires_in = '5s'\nrequest_code = 'protect'\narguments = { speed = 0 }",
    );
    let mut bench = Bench::new(&[&text]);
    bench.send(1, &message(1, 1, &[("temperature", 91.0)]));
    let outgoing = bench.effects.outbox().get(0);
    assert_eq!((outgoing.topic, outgoing.key), (DEVICE_COMMAND_V1, Some(b"s/d".as_slice())));
    assert_eq!(outgoing.headers.last("tl-rule"), Some(b"hot@1".as_slice()));
    let command: Command = bench.codec.decode(outgoing.value).expect("fits");
    assert_eq!((command.expires_at, command.request_code.as_deref()), (at(6), Some("protect")));
    assert_eq!((command.arguments[0].number, command.trace_id.as_str()), (Some(0.0), TRACE));
}

#[test]
fn an_alert_clears_when_its_rule_changes_or_goes() {
    for (change, reason, then) in [
        ("change", "rule_changed", vec!["raised hot@2 critical"]),
        ("disable", "rule_disabled", vec![]),
        ("delete", "rule_disabled", vec![]),
        ("break", "rule_disabled", vec![]),
    ] {
        let mut bench = Bench::new(&[HOT]);
        bench.send(1, &message(1, 1, &[("temperature", 91.0)]));
        bench.out();
        let settled = match change {
            "change" => bench.apply(2, HOT),
            "disable" => bench.apply(2, &with(HOT, "enabled = false")),
            "delete" => bench.table("hot", None),
            _ => bench.apply(2, "id = 'hot'\nwhen = 'temperature >'\n"),
        };
        assert_eq!(settled.outcome == Outcome::DeadLettered, change == "break", "{settled:?}");
        assert_eq!(bench.stage.problems().count(), usize::from(change == "break"));
        let settled = bench.send(2, &message(2, 2, &[("temperature", 92.0)]));
        assert_eq!(settled.outcome, Outcome::Emitted, "{change}");
        let mut expected = vec![format!("cleared hot@1 critical {reason}")];
        expected.extend(then.into_iter().map(str::to_owned));
        assert_eq!(bench.out(), expected, "{change}");
    }
}

#[test]
fn a_rule_that_changed_while_it_was_pending_begins_anew() {
    let held = with(HOT, "for = '30s'");
    let other = "id = 'other'\nsummary = 'S.'\nseverity = 'info'\nwhen = 'temperature > 50'\n";
    let mut bench = Bench::new(&[&held, other]);
    bench.send(1, &message(1, 1, &[("temperature", 91.0)]));
    assert_eq!(bench.out(), ["raised other@1 info"]);
    bench.apply(2, &held);
    bench.table("other", None);
    bench.pass(at(40));
    assert_eq!(bench.out(), ["cleared other@1 info rule_disabled"], "the timer raises nothing but tidies up");
    bench.send(41, &message(41, 2, &[("temperature", 91.0)]));
    bench.pass(at(80));
    assert_eq!(bench.out(), ["raised hot@2 critical"]);
}

#[test]
fn a_timer_raises_under_the_trace_of_the_reading_that_began_it() {
    let mut bench = Bench::new(&[&with(HOT, "for = '30s'")]);
    bench.send(1, &message(1, 1, &[("temperature", 91.0)]));
    bench.pass(at(31));
    let raised = bench.alerts().remove(0);
    assert_eq!((raised.raised_at, raised.seq, raised.trace_id.as_str()), (at(1), Some(1), TRACE));
    assert_eq!(raised.values[0].number, Some(91.0));
}

#[test]
fn a_missing_measurement_neither_raises_nor_clears() {
    let mut bench = Bench::new(&[HOT]);
    bench.send(1, &message(1, 1, &[("temperature", 91.0)]));
    bench.out();
    let mut text = message(2, 2, &[]);
    text.measurements.push(Measurement {
        name: "temperature".into(),
        text: Some("hot".into()),
        ..Default::default()
    });
    for (seconds, message) in [(2, text), (3, message(3, 3, &[("humidity", 1.0)]))] {
        assert_eq!(bench.send(seconds, &message), Settled::filtered());
    }
    assert!(bench.out().is_empty());
}

#[test]
fn previous_values_are_those_of_the_message_before() {
    let rule =
        "id = 'jump'\nsummary = 'S.'\nseverity = 'info'\nwhen = 'temperature - previous.temperature > 10'\n";
    let mut bench = Bench::new(&[rule]);
    let mut sent = Vec::new();
    for (second, temperature) in [(1, 10.0), (2, 15.0), (3, 26.0), (4, 27.0)] {
        bench.send(second, &message(second, second, &[("temperature", temperature)]));
        sent.push(bench.out());
        bench.restore();
    }
    assert_eq!(
        sent,
        [vec![], vec![], vec!["raised jump@1 info".to_owned()], vec!["cleared jump@1 info".to_owned()]]
    );
}

#[test]
fn without_sequence_identity_the_order_of_kafka_decides() {
    let mut bench = Bench::new(&[HOT]);
    for (second, own, temperature, expected) in
        [(5, 5, 91.0, vec!["raised hot@1 critical"]), (6, 1, 10.0, vec!["cleared hot@1 critical"])]
    {
        let mut message = message(own, 1, &[("temperature", temperature)]);
        (message.identity, message.epoch, message.flags) =
            (IDENTITY_NONE.to_owned(), None, vec![flag::NO_TS.to_owned()]);
        bench.send(second, &message);
        assert_eq!(bench.out(), expected);
    }
}

#[test]
fn what_cannot_be_processed_is_dead_lettered() {
    let mut bench = Bench::new(&[HOT]);
    let mut value = Vec::new();
    bench.codec.encode(DEVICE_TELEMETRY_V1, &message(1, 1, &[]), &mut value).expect("fits");
    let mut spaced = message(1, 1, &[]);
    spaced.device_id = "a b".into();
    let mut spaced_value = Vec::new();
    bench.codec.encode(DEVICE_TELEMETRY_V1, &spaced, &mut spaced_value).expect("fits");
    for (key, value, code) in [
        ("s/d", None, "value_absent"),
        ("s/d", Some(b"{}".as_slice()), "not_framed"),
        ("s/d", Some(&value[..9]), "datum_invalid"),
        ("s/other", Some(value.as_slice()), "key_mismatch"),
        ("", Some(value.as_slice()), "key_mismatch"),
        ("s/a b", Some(spaced_value.as_slice()), "device_invalid"),
    ] {
        let settled = bench.raw(DEVICE_TELEMETRY_V1, at(1), key, value, false);
        assert_eq!((settled.outcome, &*settled.reason), (Outcome::DeadLettered, code), "{key}");
        assert!(settled.message.is_some());
    }
    assert_eq!(bench.state.len(), 0, "what cannot be processed leaves no state");
}

#[test]
fn a_rule_of_the_table_that_does_not_fit_is_a_problem_and_stops_nothing() {
    let mut bench = Bench::new(&[HOT]);
    let broken = HOT.replace("hot", "cold").replace("temperature > 90", "temperature > device.foo");
    let settled = bench.apply(1, &broken);
    assert_eq!((settled.outcome, &*settled.reason), (Outcome::DeadLettered, "rule_invalid"));
    let problem = bench.stage.problems().next().expect("one").1.to_owned();
    assert!(problem.contains("rule cold:4:23: `when`: unknown name `device.foo`"), "{problem}");
    let record = RuleRecord { rule_id: "else".into(), enabled: true, ..RuleRecord::default() };
    assert_eq!(&*bench.table("cold", Some(record)).reason, "rule_key_mismatch");
    bench.send(1, &message(1, 1, &[("temperature", 91.0)]));
    assert_eq!(bench.out(), ["raised hot@1 critical"]);
    assert_eq!(bench.apply(2, &HOT.replace("hot", "cold")).outcome, Outcome::Emitted);
    assert_eq!(bench.stage.problems().count(), 0);
}

#[test]
fn only_catalog_topics_that_carry_messages_take_forwards() {
    assert_eq!(throughline_model::rules::forward_topics(), [DATA_CORE_FORWARDED_V1]);
}

// ---- Determinism ----

#[derive(Clone, Debug)]
enum Op {
    /// Seconds passed, how far its own clock lags, device, seq, whether it carries epoch and seq, values.
    Send(i64, i64, u8, i64, bool, Option<f64>, Option<f64>),
    /// A timer tick without a message.
    Pass(i64),
    Apply(i64),
    Remove,
}

fn op() -> impl Strategy<Value = Op> {
    let value = || prop::option::weighted(0.8, prop::sample::select(vec![10.0, 60.0, 85.0, 91.0, 99.0]));
    prop_oneof![
        12 => (0i64..20, 0i64..90, 0u8..3, 1i64..30, prop::bool::weighted(0.8), value(), value())
            .prop_map(|(s, l, d, q, i, t, h)| Op::Send(s, l, d, q, i, t, h)),
        1 => (0i64..60).prop_map(Op::Pass),
        1 => (1i64..4).prop_map(Op::Apply),
        1 => Just(Op::Remove),
    ]
}

fn rules() -> Vec<String> {
    vec![
        with(HOT, "for = '30s'\nclear_when = 'temperature < 80'\n[[command]]\nname = 'stop'"),
        "id = 'jump'\nsummary = 'S.'\nseverity = 'info'\nwhen = 'humidity > previous.humidity'\n".into(),
        "id = 'dry'\nsummary = 'S.'\nseverity = 'info'\nwhen = '!has(humidity)'\nfor = 10\nforward = 'data_core.forwarded.v1'\n"
            .into(),
    ]
}

/// What came out and what is kept after `ops`, with a restart before each of the steps that `restarts` says.
fn run(ops: &[Op], restarts: &[bool]) -> (Vec<String>, Vec<(String, RulesState)>) {
    let texts = rules();
    let mut bench = Bench::new(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let mut now = 100;
    let mut log = Vec::new();
    for (op, restart) in ops.iter().zip(restarts) {
        if *restart {
            bench.restore();
        }
        match op {
            Op::Send(seconds, lag, device, seq, sequenced, temperature, humidity) => {
                now += seconds;
                let mut values = Vec::new();
                values.extend(temperature.map(|t| ("temperature", t)));
                values.extend(humidity.map(|h| ("humidity", h)));
                let mut message = message(now - lag, *seq, &values);
                message.device_id = format!("d{device}");
                if !sequenced {
                    message.identity = IDENTITY_NONE.to_owned();
                }
                let settled = bench.send(now, &message);
                log.push(format!("{} {}", settled.outcome, settled.reason));
            }
            Op::Pass(seconds) => {
                now += seconds;
                bench.pass(at(now));
            }
            Op::Apply(version) => drop(bench.apply(*version, &texts[0])),
            Op::Remove => drop(bench.table("jump", None)),
        }
        for o in bench.effects.outbox().iter() {
            log.push(format!("{} {:?} {:?}", o.topic, o.key, o.value));
        }
        bench.effects.outbox_mut().clear();
    }
    let mut kept: Vec<_> = bench.state.iter().map(|(k, s)| (k.to_owned(), s.clone())).collect();
    kept.sort_by(|(a, _), (b, _)| a.cmp(b));
    (log, kept)
}

proptest! {
    #[test]
    fn results_do_not_depend_on_where_a_restart_happens(
        steps in prop::collection::vec((op(), any::<bool>()), 1..60),
    ) {
        let (ops, restarts): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
        let never = vec![false; ops.len()];
        prop_assert_eq!(run(&ops, &restarts), run(&ops, &never));
    }

    #[test]
    fn a_redelivered_message_changes_nothing(
        ops in prop::collection::vec(op(), 1..40),
        again in any::<prop::sample::Index>(),
    ) {
        // Messages with sequence identity and times that rise: sent twice in a row, the second is recognised.
        let sequenced: Vec<Op> = (1..).zip(ops).map(|(i, op)| match op {
            Op::Send(s, _, d, _, _, t, h) => Op::Send(s + 1, 0, d, i, true, t, h),
            op => op,
        }).collect();
        let at = again.index(sequenced.len());
        let mut repeated = sequenced.clone();
        if let Op::Send(_, _, d, q, _, t, h) = sequenced[at] {
            repeated.insert(at + 1, Op::Send(0, 0, d, q, true, t, h));
        }
        let (log, state) = run(&sequenced, &vec![false; sequenced.len()]);
        let (mut log_again, state_again) = run(&repeated, &vec![false; repeated.len()]);
        log_again.retain(|line| line != "duplicate redelivered");
        prop_assert_eq!((log, state), (log_again, state_again));
    }
}

#[test]
fn one_time_from_the_far_future_does_not_blind_the_devices_next_life() {
    let mut bench = Bench::new(&[HOT]);
    let mut wild = message(1, 1, &[("temperature", 20.0)]);
    wild.occurred_at = at(2_000_000_000);
    bench.send(1, &wild);
    bench.send(2, &message(2, 2, &[("temperature", 20.0)]));
    bench.restore();
    for (second, seq, expected) in [(10, 1, "raised hot@1 critical"), (11, 2, "cleared hot@1 critical")] {
        let mut restarted = message(second, seq, &[("temperature", if seq == 1 { 91.0 } else { 20.0 })]);
        restarted.message_id = Uuid::from_u128(0x9000_0000_8000_0000_0000 + seq as u128).to_string();
        let settled = bench.send(second, &restarted);
        assert_eq!((settled.outcome, bench.out()), (Outcome::Emitted, vec![expected.to_owned()]));
    }
}

#[test]
fn what_comes_out_of_its_turn_does_not_put_back_a_previous_value() {
    let jump = "id = 'jump'\nsummary = 'It jumps.'\nseverity = 'info'\n\
                when = 'temperature - previous.temperature > 10'\nlateness = '60s'\n";
    let unsequenced = |seconds, value, replayed: bool| {
        let mut message = message(seconds, seconds, &[("temperature", value)]);
        message.identity = IDENTITY_NONE.to_owned();
        if replayed {
            message.flags = vec![flag::REPLAYED.to_owned()];
        }
        message
    };
    for (what, old) in [
        ("late", unsequenced(5, 10.0, false)),
        ("replayed, within the lateness bound", unsequenced(990, 10.0, true)),
    ] {
        let mut bench = Bench::new(&[jump]);
        bench.send(1_000, &unsequenced(1_000, 50.0, false));
        bench.send(1_001, &old);
        bench.restore();
        bench.send(1_002, &unsequenced(1_002, 55.0, false));
        assert_eq!(bench.out(), Vec::<String>::new(), "{what}");
        bench.send(1_003, &unsequenced(1_001, 20.0, false));
        bench.send(1_004, &unsequenced(1_004, 40.0, false));
        assert_eq!(bench.out(), ["raised jump@1 info"], "in its turn the order of Kafka decides");
    }
}

#[test]
fn a_restart_below_everything_seen_is_evaluated_at_once() {
    let mut bench = Bench::new(&[HOT]);
    bench.send(1, &message(1, 1_000_000, &[("temperature", 20.0)]));
    let settled = bench.send(10, &message(10, 1, &[("temperature", 91.0)]));
    assert_eq!((settled.outcome, bench.out()), (Outcome::Emitted, vec!["raised hot@1 critical".to_owned()]));
}

#[test]
fn what_is_kept_of_a_message_fits_into_a_record_whatever_the_device_writes() {
    let mut bench = Bench::new(&[
        "id = 'mode'\nsummary = 'S.'\nseverity = 'info'\nwhen = 'mode != \"auto\"'\nfor = 10\n",
    ]);
    let mut long = message(0, 1, &[]);
    long.measurements = vec![Measurement {
        name: "mode".to_owned(),
        text: Some("\u{1}".repeat(60_000)),
        ..Measurement::default()
    }];
    long.flags = vec!["f".repeat(1_000); 500];
    assert_eq!(bench.send(0, &long).outcome, Outcome::Emitted);
    let mut bytes = Vec::new();
    bench.state.get("s/d").expect("a rule is pending").encode(&bench.codec, &mut bytes).expect("fits");
    assert!(bytes.len() < 64 * 1_024, "{} bytes", bytes.len());

    let mut versions = message(1, 2, &[("temperature", 1.0)]);
    versions.agent_version = Some("v".repeat(1_025));
    let settled = bench.send(1, &versions);
    assert_eq!((settled.outcome, &*settled.reason), (Outcome::DeadLettered, "text_too_long"));
}

#[test]
fn an_alert_repeats_the_beginning_of_a_text_and_so_many_flags() {
    let mut bench =
        Bench::new(&["id = 'mode'\nsummary = 'S.'\nseverity = 'info'\nwhen = 'mode != \"auto\"'\n"]);
    let mut long = message(0, 1, &[]);
    // The bound lies within a letter of two bytes, which is left out.
    long.measurements = vec![text("mode", &format!("x{}", "ä".repeat(600)))];
    long.flags = (0..17).map(|number| format!("f{number}")).collect();
    bench.send(0, &long);
    let alerts = bench.effects.outbox();
    assert_eq!(alerts.len(), 1);
    let alert: Alert = bench.codec.decode(alerts.get(0).value).expect("fits");
    assert_eq!(alert.values[0].text, Some(format!("x{}", "ä".repeat(511))), "1,023 bytes");
    assert_eq!(alert.flags, long.flags[..16]);
}

#[test]
fn a_text_beyond_the_bound_is_no_value_before() {
    for (bytes, compares) in [(1_024, true), (1_025, false)] {
        let mut bench =
            Bench::new(&["id = 'mode'\nsummary = 'S.'\nseverity = 'info'\nwhen = 'mode != previous.mode'\n"]);
        for (second, value) in [(0, "x".repeat(bytes)), (1, "auto".to_owned())] {
            let mut message = message(second, second + 1, &[]);
            message.measurements = vec![text("mode", &value)];
            bench.send(second, &message);
        }
        assert_eq!(bench.effects.outbox().len(), usize::from(compares), "{bytes}");
    }
}
